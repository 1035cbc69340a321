"""Inception-v3's features, in which FID and KID are published, beside an embedder's: torch-fidelity's network, with weights from a file.

    picture → 8 bits → 299×299, bilinear, without antialiasing, as TensorFlow 1 did → (x − 128)/128 → means over places of Mixed_7c (2048)

**Resizing is a part of the number.** clean-fid (MACE, RECE, SPM, CA) resizes bicubically with antialiasing, torchmetrics bilinearly with
it, UnlearnCanvas with OpenCV and other weights: for one pair of folders each gives another FID. A record names the package, its version
and the first digits of the file's SHA-256; those of the published file, TensorFlow's weights of 2015-12-05, are 6726825d.

They are read without running code, from a state dict in safetensors or of `torch.save`. Nothing is downloaded. Features come first of the
embedder and then of Inception, whose columns texts have at 0: so the agreement of pictures with texts is the embedder's own.

Source: Heusel et al., arXiv 1706.08500; Obukhov et al., torch-fidelity; on resizing Parmar et al. (clean-fid), arXiv 2104.11222.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from efface.core.errors import MissingExtra
from efface.core.evidence import Embedder
from efface.core.statedict import Weights, digest

WIDTH = 2048
BATCH = 16
"""Pictures at once: some 300 MB."""
PUBLISHED = "6726825d0af5"
"""The first digits of the SHA-256 of the published file."""
FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
WEIGHTS = Weights(
    "Inception",
    "inception",
    f"expected torch-fidelity's {FILE} (96 MB) from {URL}, or its tensors as safetensors; give the file, or the folder that holds it, as "
    "--inception PATH or inception = 'PATH'",
)


@final
@dataclass(frozen=True, eq=False)
class Inception(Embedder):
    """An embedder, and behind its features those of Inception; `load` makes the published one, and any other network can be handed in."""

    beside: Embedder
    """Whose features come first, and who alone knows texts."""
    net: Callable[[Tensor], Tensor]
    """Pictures (b 3 h w) of 8 bits to features (b width)."""
    package: str
    """Where network and resizing come from."""
    digest: str
    """Recognises the weights."""
    width: int = WIDTH
    """How many features `net` has."""

    @classmethod
    def load(cls, path: str | Path, beside: Embedder) -> Inception:
        """The network of torch-fidelity with the weights of a file, or of the one such file of a folder.

        Raises EffaceError for weights that are not there, that cannot be read, or that are of another network; MissingExtra without
        torch-fidelity, or torchvision, which it imports."""
        file = WEIGHTS.find(path)
        if find_spec("torch_fidelity") is None or find_spec("torchvision") is None:
            raise MissingExtra(
                "FID and KID need torch-fidelity and torchvision, which are not installed; "
                "run `pip install -e '.[metrics]'` in efface's folder"
            )
        state = WEIGHTS.read(file)
        buffer = io.BytesIO()  # its constructor takes a file alone, and unpickles that without restraint: so it gets one of ours
        torch.save(state, buffer)
        buffer.seek(0)
        module = import_module("torch_fidelity.feature_extractor_inceptionv3")
        try:
            net = module.FeatureExtractorInceptionV3("inception-v3", [str(WIDTH)], feature_extractor_weights_path=buffer)
        except RuntimeError as error:
            raise WEIGHTS.foreign(file) from error
        return cls(beside, lambda pixels: net(pixels)[0], f"torch-fidelity {version('torch-fidelity')}", digest(file))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.beside.name} + inception-v3"

    @property
    def version(self) -> str:
        """ "1a2b… + torch-fidelity 0.4.0/6726825d0af5": the embedder's, the package's, and the weights'."""
        return f"{self.beside.version} + {self.package}/{self.digest}"

    @property
    def published(self) -> bool:
        """Whether the weights are the file that everybody takes."""
        return self.digest == PUBLISHED

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(b 3 h w) in [0, 1] to the embedder's features and, in the last `width` columns, Inception's."""
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        features = torch.cat([self.net(part) for part in pixels.split(BATCH)])
        return torch.cat([self.beside.embed_images(images).float().cpu(), features.float()], dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """The embedder's, and 0 in the last `width` columns."""
        return F.pad(self.beside.embed_texts(texts).float().cpu(), (0, self.width))

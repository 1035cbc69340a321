"""UnlearnCanvas' own two classifiers: a ViT-L/16 for its 50 styles and its photos, and one for its 20 objects.

    picture → 8 bits → 224×224 (Pillow, bilinear) → 2x − 1 → ViT-L/16 (b 1024) → a linear map (b 51) or (b 20)

The network is timm's vit_large_patch16_224.augreg_in21k. The surest class counts however unsure it is, so the threshold is 0. The benchmark
reads its pictures back from JPEG files; here they are looked at as they were drawn. The weights are files that somebody names, read without
running code; nothing is downloaded.

Source: Zhang et al., arXiv 2402.11846; OPTML-Group/UnlearnCanvas, machine_unlearning/evaluation/quantitative/accuracy.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from efface.concepts.canvas import canvas
from efface.core.errors import MissingExtra
from efface.core.evidence import DEPTH, Detector, Sighting
from efface.core.statedict import SUFFIXES, Weights, fingerprint

ARCHITECTURE = "vit_large_patch16_224.augreg_in21k"
PIXELS = 224
FILES = {"style": "style50", "object": "style50_cls"}
"""The file of each classifier, without its suffix."""
WEIGHTS = Weights(
    "UnlearnCanvas' classifiers",
    "style50",
    "expected a folder with the benchmark's style50.pth (51 styles) and style50_cls.pth (20 objects), the cls_model that its page "
    "OPTML-Group/UnlearnCanvas links to; give the folder as --canvas FOLDER or canvas = 'FOLDER'",
    key="model_state_dict",
)


@final
@dataclass(frozen=True, eq=False)
class CanvasJudge(Detector):
    """Two classifiers; `load` makes the benchmark's, and any other networks can be handed in."""

    styles: nn.Module
    """Pictures (b 3 224 224) in [-1, 1] to logits (b 51), in the order of `concepts.canvas`."""
    objects: nn.Module
    """The same to (b 20)."""
    package: str = ""
    """Where the networks come from."""
    name = "unlearncanvas-vit-l16"

    @classmethod
    def load(cls, folder: str | Path) -> CanvasJudge:
        """The benchmark's, with the two files of a folder; on the graphics card where there is one.

        Raises EffaceError for files that are not there, that cannot be read, or that are of another network; MissingExtra without timm."""
        style, thing = (WEIGHTS.find(_file(Path(folder).expanduser(), FILES[kind])) for kind in ("style", "object"))
        if find_spec("timm") is None or find_spec("torchvision") is None:
            raise MissingExtra(
                "UnlearnCanvas' classifiers need timm and torchvision, which are not installed; run `pip install -e '.[metrics]'` in "
                "efface's folder, or judge with --detector clip"
            )
        return cls(_network(style, "style"), _network(thing, "object"), f"timm {version('timm')}")

    @cached_property
    def version(self) -> str:
        """ "timm 1.0.20/1a2b…": the package, and the first digits of the SHA-256 of both networks' parameters."""
        return f"{self.package or 'handed in'}/{fingerprint(self.styles.state_dict(), self.objects.state_dict())}"

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return canvas().styles if kind == "style" else canvas().objects

    def threshold(self, kind: str = "object") -> float:
        return 0.0

    @torch.no_grad()
    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        """One sighting for each image (b 3 h w) in [0, 1]: the ten surest classes; undetermined where an image is not finite."""
        net, labels = self.styles if kind == "style" else self.objects, self.labels(kind)
        device = next((tensor.device for tensor in net.parameters()), torch.device("cpu"))
        logits = net(torch.stack([prepared(image) for image in images.nan_to_num()]).to(device))
        best = logits.float().softmax(-1).cpu().topk(DEPTH)
        rows = zip(images.isfinite().flatten(1).all(-1).tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
        return [Sighting(tuple(labels[i] for i in found), tuple(scores), 0.0) if fine else Sighting() for fine, found, scores in rows]


def prepared(image: Tensor) -> Tensor:
    """A picture (3 h w) in [0, 1] to (3 224 224) in [-1, 1]."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    small = Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


def _file(folder: Path, stem: str) -> Path:
    """That of a classifier; where there is none, the name that the benchmark gives it."""
    return next((file for suffix in SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()), folder / f"{stem}.pth")


def _network(file: Path, kind: str) -> nn.Module:
    classes = len(canvas().styles if kind == "style" else canvas().objects)
    net: nn.Module = import_module("timm").create_model(ARCHITECTURE, pretrained=False, num_classes=classes)
    try:
        net.load_state_dict(WEIGHTS.read(file))
    except RuntimeError as error:
        raise WEIGHTS.foreign(file) from error
    return net.eval().to("cuda" if torch.cuda.is_available() else "cpu")

"""ResNet-50 on ImageNet's thousand classes, as torchvision ships it: the classifier of Imagenette's ESR and PSR.

Weights IMAGENET1K_V2 with their own preprocessing (resize 232, crop 224), labels in lower case ("chain saw", "english springer"). AP, AGE,
ESD and RECE take the order of the classes without a threshold, so the threshold is 0. Other weights shift the figures by points; a record
names the package's version and the hash of the parameters. The weights are a file that is named, and read without running code, or those
that torchvision finds where torch's hub keeps them, and downloads otherwise.

Source: torchvision, `ResNet50_Weights.DEFAULT`; Bui et al., arXiv 2410.15618, §5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from efface.core.errors import EffaceError, MissingExtra, Unsupported
from efface.core.evidence import DEPTH, Detector, Sighting
from efface.core.statedict import Weights, fingerprint

WEIGHTS = Weights(
    "ResNet-50",
    "resnet50",
    "expected torchvision's resnet50-11ad3fa6.pth (98 MB) from https://download.pytorch.org/models/resnet50-11ad3fa6.pth, or its tensors "
    "as safetensors; give the file, or the folder that holds it, as --resnet PATH or resnet = 'PATH'",
)


@final
@dataclass(frozen=True, eq=False)
class ImageNet(Detector):
    """A classifier of ImageNet's classes; `load` makes the published one, and any other network can be handed in."""

    net: nn.Module
    """Prepared pictures (b 3 h w) to logits (b, classes)."""
    prepare: Callable[[Tensor], Tensor]
    """Pictures (b 3 h w) in [0, 1] to what `net` takes."""
    classes: tuple[str, ...]
    """In the network's order, in lower case."""
    package: str = ""
    """Where network and preprocessing come from."""
    name = "imagenet-resnet50"

    @classmethod
    def load(cls, path: str | Path = "") -> ImageNet:
        """The published one, with the weights of a file or of the one such file of a folder, or torchvision's own where none is named.

        Raises EffaceError for a file that is not there, that cannot be read, or that is of another network, and without a file where
        torchvision's own can be neither found nor downloaded; MissingExtra without torchvision."""
        file = WEIGHTS.find(path) if path else None
        if find_spec("torchvision") is None:
            raise MissingExtra(
                "ResNet-50 comes with torchvision, which is not installed; run `pip install -e '.[metrics]'` in efface's folder"
            )
        models = import_module("torchvision.models")
        own = models.ResNet50_Weights.IMAGENET1K_V2
        try:
            net = models.resnet50(weights=None if file else own)
        except OSError as error:
            raise EffaceError(f"ResNet-50's weights can be neither found nor downloaded ({error}); {WEIGHTS.wanted}") from error
        if file:
            try:
                net.load_state_dict(WEIGHTS.read(file))
            except RuntimeError as error:
                raise WEIGHTS.foreign(file) from error
        classes = tuple(name.lower() for name in own.meta["categories"])
        return cls(net.eval(), own.transforms(), classes, f"torchvision {version('torchvision')}")

    @property
    def version(self) -> str:
        """ "torchvision 0.28.0/1a2b…": the package, and the first digits of the SHA-256 of the parameters."""
        return f"{self.package or 'handed in'}/{fingerprint(self.net.state_dict())}"

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        if kind != "object":
            raise Unsupported(f"ImageNet's classes are concepts of kind 'object', and it was asked for kind {kind!r}")
        return self.classes

    def threshold(self, kind: str = "object") -> float:
        return 0.0

    @torch.no_grad()
    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        """One sighting for each image (b 3 h w) in [0, 1]: the ten surest classes; undetermined where an image is not finite."""
        self.labels(kind)
        fine = images.isfinite().flatten(1).all(-1).tolist()
        return [self._seen(images[i : i + 1]) if ok else Sighting() for i, ok in enumerate(fine)]

    def _seen(self, image: Tensor) -> Sighting:
        best = self.net(self.prepare(image)).softmax(-1)[0].topk(min(DEPTH, len(self.classes)))
        return Sighting(tuple(self.classes[i] for i in best.indices.tolist()), tuple(best.values.tolist()), 0.0)

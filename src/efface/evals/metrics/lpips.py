"""LPIPS between the pictures of the un-erased and of the erased model from the same noise, at a resolution that its name tells.

    LPIPS(x, x') = Σ_layers mean over places of ‖w ⊙ (φ(x) − φ(x'))‖²,   φ a network's unit-length features, w learned

High on the erased concept, low on what must stay; but it measures the distance from the un-erased picture, and not how good either is. AP
takes AlexNet at the full 512 pixels; ESD, RECE and DuMo shrink both pictures to 64 first, which gives other, smaller numbers.

The learned distance is that of the package `lpips`, which ships w; its trunk is torchvision's, from a file that is named, or found or
downloaded by torchvision. Any other function of two batches can be handed in.
Source: Zhang et al., arXiv 1801.03924.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efface.core.errors import EffaceError, MissingExtra
from efface.core.evidence import Contrast, Direction, Metric, Needed, Role, Samples, Score, chosen
from efface.core.statedict import Weights, digest

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches (b 3 h w) in [−1, 1] to distances of b values."""
SMALL = 64
"""Pixels of ESD, RECE and DuMo."""
PUBLISHED = "7be5be79"
"""The first digits of the SHA-256 of AlexNet's published file."""
WEIGHTS = Weights(
    "AlexNet",
    "alexnet",
    "expected torchvision's alexnet-owt-7be5be79.pth (233 MB) from https://download.pytorch.org/models/alexnet-owt-7be5be79.pth, or its "
    "tensors as safetensors; give the file, or the folder that holds it, as --lpips PATH or lpips = 'PATH'",
)


def available() -> bool:
    """Whether the packages are installed."""
    return find_spec("lpips") is not None and find_spec("torchvision") is not None


def load(path: str | Path = "") -> Distance:
    """The learned distance on AlexNet, with the trunk's weights of a file or of the one such file of a folder, or torchvision's own.

    Raises EffaceError for a file that is not there, cannot be read, or is of another network, and where torchvision's own can be neither
    found nor downloaded; MissingExtra without the package."""
    file = WEIGHTS.find(path) if path else None
    if not available():
        raise MissingExtra(
            "LPIPS needs lpips and torchvision, which are not installed; run `pip install -e '.[metrics]'` in efface's folder"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision in a way that is about to go
            found = import_module("lpips").LPIPS(net="alex", pnet_rand=file is not None, verbose=False).eval()
    except OSError as error:
        raise EffaceError(f"AlexNet's weights can be neither found nor downloaded ({error}); {WEIGHTS.wanted}") from error
    if file:
        fill(found.net, file)
    return found


def fill(trunk: nn.Module, file: Path) -> None:
    """Fills the trunk of `lpips`, whose "slice2.3.weight" is AlexNet's "features.3.weight", from a file. Raises EffaceError."""
    state = WEIGHTS.read(file)
    features = {name: f"features.{name.partition('.')[2]}" for name in trunk.state_dict()}
    try:
        trunk.load_state_dict({name: state[feature] for name, feature in features.items()})
    except (KeyError, RuntimeError) as error:
        raise WEIGHTS.foreign(file) from error


def published(path: str | Path) -> bool:
    """Whether a file, or the one of a folder, is the trunk that everybody takes."""
    return digest(WEIGHTS.find(path)).startswith(PUBLISHED)


@dataclass(frozen=True, eq=False)
class Lpips(Metric):
    """The mean distance of pictures of the same noise, before and after."""

    needs: ClassVar[Needed] = "images"

    distance: Distance
    """What compares two batches."""
    roles: tuple[Role, ...] = ("target",)
    """Which shots are looked at."""
    pixels: int | None = None
    """The size to which both are shrunk first; None takes them as they are."""

    @property
    def name(self) -> str:
        return f"LPIPS ({self.pixels or 'full'})"

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """0 before, by definition; clustered by prompt. The scores' names tell the size. Raises ValueError without the pictures of both."""
        rows = chosen(before, after, lambda shot: shot.role in self.roles)
        if before.images is None or after.images is None:
            raise ValueError("LPIPS needs the pictures, and these samples hold none; measure again")
        values = [float(self._between(before.images[i], after.images[i])) for i in rows]
        prompts = [before.shots[i].prompt for i in rows]
        way: Direction = "higher" if self.roles == ("target",) else "lower"
        size = (self.pixels, self.pixels) if self.pixels else tuple(before.images.shape[-2:])
        name = f"LPIPS ({size[0]}×{size[1]} pixels)"
        found = Score.mean(name, values, prompts, way, "LPIPS", seed=seed)
        return Contrast(Score(name, 0.0, 0.0, 0.0, len(rows), way, "LPIPS"), found, found)

    @torch.no_grad()
    def _between(self, first: Tensor, second: Tensor) -> Tensor:
        pair = torch.stack([first, second]).float() / 127.5 - 1
        if self.pixels is not None:
            pair = F.interpolate(pair, size=(self.pixels, self.pixels), mode="bilinear", antialias=True)
        return self.distance(pair[:1], pair[1:]).flatten()[0]

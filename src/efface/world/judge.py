"""The judge: an independent classifier of object (multi-label), style and background.

It is trained on augmented sprites only, never on a generated picture, and shares no parameter with the bundled model. It plays
the part that ResNet-50 plays for Imagenette. Blank pictures, noise and textures are "none of these": their best object
stays under `threshold`, which is calibrated on such pictures and stored with the weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efface.core.whole import whole_file
from efface.world.convnet import Trunk

PIXELS = 64
"""The judge's input size; other pictures are resized to it."""


class JudgeNet(nn.Module):
    """A convolutional trunk with three linear heads."""

    channels = (32, 64, 128, 256)
    blocks = (0, 1, 1, 1)

    def __init__(self, objects: int, styles: int, backgrounds: int) -> None:
        super().__init__()
        self.trunk = Trunk(self.channels, self.blocks)
        self.objects = nn.Linear(self.trunk.width, objects)
        self.style = nn.Linear(self.trunk.width, styles)
        self.background = nn.Linear(self.trunk.width, backgrounds)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(b, 3, 64, 64) in [0, 1] to logits of objects, style and background, and features (b, 256)."""
        features = self.trunk(images)
        return self.objects(features), self.style(features), self.background(features), features


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in b pictures."""

    objects: Tensor
    """(b, n) probability that each object is there, independently of the others."""
    style: Tensor
    """(b, 7) probabilities, summing to one."""
    background: Tensor
    """(b, 8) probabilities, summing to one."""
    features: Tensor
    """(b, f) penultimate features, for the judge Fréchet distance (which is no FID)."""
    threshold: float
    """Object probability from which on an object counts as seen."""

    def top(self, k: int = 1) -> Tensor:
        """(b, k) int64: the k most probable objects, best first."""
        return self.objects.topk(k, dim=-1).indices

    def seen(self) -> Tensor:
        """(b, n) bool: which objects are seen, by the calibrated threshold."""
        return self.objects >= self.threshold

    def nothing(self) -> Tensor:
        """(b,) bool: whether no object is seen ("none of these")."""
        return ~self.seen().any(dim=-1)


@dataclass(frozen=True)
class Judge:
    """The frozen classifier with the names of its outputs."""

    net: JudgeNet
    names: tuple[str, ...]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]
    threshold: float
    version: str
    """The first 12 digits of the SHA-256 of its file: a record that quotes the judge names this."""

    @classmethod
    def load(cls, path: Path | None = None) -> Judge:
        """Reads a judge file (the bundled one by default).

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is no judge.
        """
        from safetensors import safe_open

        from efface.world import weights

        path = Path(path) if path is not None else weights() / "judge.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"no judge at {path}; expected a file that `efface world train judge` wrote")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "judge" not in metadata:
                raise ValueError(f"{path} is no judge: its header lacks the entry 'judge'")
            state = {key: file.get_tensor(key).float() for key in file.keys()}
        card = json.loads(metadata["judge"])
        net = JudgeNet(len(card["names"]), len(card["styles"]), len(card["backgrounds"]))
        net.load_state_dict(state)
        return cls(
            net=net.eval().requires_grad_(False),
            names=tuple(card["names"]),
            styles=tuple(card["styles"]),
            backgrounds=tuple(card["backgrounds"]),
            threshold=float(card["threshold"]),
            version=hashlib.sha256(path.read_bytes()).hexdigest()[:12],
        )

    def save(self, path: Path, dtype: torch.dtype = torch.float16) -> Path:
        """Writes the judge, whole or not at all; its names and threshold stand in the file's header."""
        from safetensors.torch import save_file

        card = {"names": self.names, "styles": self.styles, "backgrounds": self.backgrounds, "threshold": self.threshold}
        state = {key: value.to(dtype).contiguous().cpu() for key, value in self.net.state_dict().items()}
        with whole_file(Path(path)) as temporary:
            save_file(state, temporary, {"judge": json.dumps(card)})
        return Path(path)

    @torch.no_grad()
    def look(self, images: Tensor, batch: int = 256) -> Verdict:
        """Judges pictures.

        Args:
            images: (b, 3, h, w) in [0, 1]; resized to 64x64 where they are not.
            batch: pictures at a time.

        Raises:
            ValueError: if the tensor is no such batch.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"the judge takes pictures as (b, 3, h, w) in [0, 1], but got a tensor of shape {tuple(images.shape)}")
        device = self.net.objects.weight.device
        parts = [self.net(resize(chunk.to(device))) for chunk in images.float().split(batch)]
        if not parts:
            parts = [self.net(images.new_zeros(0, 3, PIXELS, PIXELS, device=device, dtype=torch.float32))]
        objects, style, background, features = (torch.cat(column) for column in zip(*parts, strict=True))
        return Verdict(objects.sigmoid(), style.softmax(-1), background.softmax(-1), features, self.threshold)


def resize(images: Tensor) -> Tensor:
    """(b, 3, h, w) to (b, 3, 64, 64), with antialiasing."""
    if images.shape[-2:] == (PIXELS, PIXELS):
        return images
    return F.interpolate(images, (PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False)

"""The bundled model's own CLIP: an image tower trained with its text encoder, and the score that both give.

Only the image tower, both projections and the temperature stand in `weights/clip`; the text encoder is the pipeline's
(`weights/emoji/text_encoder`). The numbers are those of this small CLIP and comparable with no other CLIP score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efface.world.convnet import Trunk

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

PIXELS = 64
"""The tower's input size; other pictures are resized to it."""


class ImageTower(nn.Module):
    """Pictures to embeddings; holds the text projection and the temperature as well."""

    channels = (32, 64, 128, 256)
    blocks = (0, 0, 1, 1)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.trunk = Trunk(self.channels, self.blocks)
        self.image_projection = nn.Linear(self.trunk.width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, 64, 64) in [0, 1] to (b, width), not normalised."""
        embedding: Tensor = self.image_projection(self.trunk(images))
        return embedding

    def project(self, pooled: Tensor) -> Tensor:
        """(b, width) pooled text rows to (b, width), not normalised."""
        embedding: Tensor = self.text_projection(pooled)
        return embedding

    def scale(self) -> Tensor:
        """The inverse temperature, at most 100."""
        return self.log_scale.exp().clamp(max=100.0)


@dataclass(frozen=True)
class Clip:
    """Text encoder and image tower, frozen."""

    tokenizer: CLIPTokenizer
    text: CLIPTextModel
    tower: ImageTower

    @classmethod
    def load(cls, path: Path | None = None) -> Clip:
        """Loads both from a weights folder (the bundled one by default) that holds `emoji/` and `clip/`."""
        from transformers import CLIPTextModel, CLIPTokenizer

        from efface.world import weights

        path = Path(path) if path is not None else weights()
        tokenizer = CLIPTokenizer.from_pretrained(path / "emoji" / "tokenizer", local_files_only=True)
        text = CLIPTextModel.from_pretrained(path / "emoji" / "text_encoder", local_files_only=True)
        return cls(tokenizer, text.eval().requires_grad_(False), load_tower(path / "clip"))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] to normalised (b, width)."""
        images = images.to(self.tower.log_scale.device).float()
        if images.shape[-2:] != (PIXELS, PIXELS):
            images = F.interpolate(images, (PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False)
        return F.normalize(self.tower(images), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """b texts to normalised (b, width)."""
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        pooled = self.text(ids.to(self.text.device)).pooler_output
        return F.normalize(self.tower.project(pooled), dim=-1)

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(b,) cosines of each picture with its own text, in [-1, 1].

        Raises:
            ValueError: if there is not one text for each picture.
        """
        if len(images) != len(texts):
            raise ValueError(f"a CLIP score takes one text for each picture, but got {len(images)} pictures and {len(texts)} texts")
        return (self.embed_images(images) * self.embed_texts(texts)).sum(dim=-1)

    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(pictures, texts) cosines; the arg max along the texts is the zero-shot classification."""
        return self.embed_images(images) @ self.embed_texts(texts).T


def save_tower(tower: ImageTower, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes `config.json` and `model.safetensors`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(dtype).contiguous() for k, v in tower.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": tower.width, "pixels": PIXELS}, indent=2) + "\n")


def load_tower(folder: Path) -> ImageTower:
    """Reads a tower that `save_tower` wrote, frozen, in float32."""
    from safetensors.torch import load_file

    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no CLIP image tower in {folder}; expected config.json and model.safetensors")
    tower = ImageTower(json.loads((folder / "config.json").read_text())["width"])
    tower.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return tower.eval().requires_grad_(False)


def save_text_encoder(text: CLIPTextModel, folder: Path) -> None:
    """Writes a text encoder with the `text_model.` prefix that older readers expect (newer ones take both)."""
    from safetensors.torch import load_file, save_file

    text.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in state.items()}, file, {"format": "pt"})

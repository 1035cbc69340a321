"""OpenAI's CLIP as an embedder: the backbone of most published CLIP scores, ViT-B/32 by default, from a folder or the Hub.

The embedder's name tells the backbone, since scores of two backbones do not compare. Pictures are resized and cut as OpenAI's code does it
(bicubic, by Pillow). Captions beyond 77 tokens are cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from efface.core.evidence import Embedder

BACKBONE = "openai/clip-vit-base-patch32"


@final
@dataclass(frozen=True, eq=False)
class Clip(Embedder):
    """A CLIP with its preparation."""

    model: Any
    """`transformers.CLIPModel`."""
    processor: Any
    """`transformers.CLIPProcessor`."""
    backbone: str = BACKBONE

    @classmethod
    def load(cls, source: str = "") -> Clip:
        """The CLIP of a folder or a Hub id, by default `BACKBONE`. Raises InvalidModel where it is not there or cannot be read."""
        from efface.models.clip import load_clip

        source = source or BACKBONE
        folder = Path(source).expanduser()
        return cls(*load_clip(source), folder.resolve().name if folder.is_dir() else source)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"clip {self.backbone}"

    @property
    def version(self) -> str:
        """The first digits of the SHA-256 of the two projections."""
        digest = hashlib.sha256()
        for layer in (self.model.visual_projection, self.model.text_projection):
            digest.update(layer.weight.detach().float().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    @property
    def scale(self) -> float:
        """The learned inverse temperature by which cosines are multiplied before a softmax; OpenAI's is 100."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(b 3 h w) in [0, 1] to (b d) of unit length."""
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        prepared = self.processor(images=list(pixels), return_tensors="pt")
        return F.normalize(_tensor(self.model.get_image_features(prepared["pixel_values"])).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """b texts to (b d) of unit length."""
        ids = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return F.normalize(_tensor(self.model.get_text_features(ids["input_ids"], ids["attention_mask"])).float(), dim=-1)


def _tensor(found: Any) -> Tensor:
    """Newer transformers return an output object, older ones the tensor."""
    pooled: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return pooled

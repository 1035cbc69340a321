"""OpenAI's CLIP as an embedder, loaded by torchmetrics: the backbone of most published CLIP scores, ViT-B/32 by default.

The embedder's name tells the backbone, since scores of two backbones do not compare. torchmetrics finds or downloads the weights by their
Hub id; transformers prepares the pictures, for which it needs torchvision. Captions beyond 77 tokens are cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from efface.core.errors import MissingExtra
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
    def load(cls, backbone: str = BACKBONE) -> Clip:
        """Raises MissingExtra without torchmetrics or torchvision, OSError where the weights can be neither found nor downloaded."""
        if find_spec("torchmetrics") is None or find_spec("torchvision") is None:
            raise MissingExtra(
                "CLIP scores need torchmetrics and torchvision, which are not installed; run `pip install 'efface[metrics]'`"
            )
        score = import_module("torchmetrics.multimodal").CLIPScore(model_name_or_path=backbone)
        return cls(score.model.eval(), score.processor, backbone)

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

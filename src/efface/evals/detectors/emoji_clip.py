"""The bundled world's CLIP as an embedder: pictures and prompts in one space.

Its image tower was trained on sprites and captions, never on a generated picture. Its text encoder is the bundled model's own: an edit of
the denoiser leaves it as it is, and it is loaded afresh from the weights, so that an edit of the text encoder does not reach it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from torch import Tensor

from efface.core.evidence import Embedder

if TYPE_CHECKING:
    from efface.world.clip import Clip


@final
@dataclass(frozen=True)
class EmojiClip(Embedder):
    """The bundled CLIP."""

    clip: Clip
    digest: str
    name = "emoji-clip"

    @classmethod
    def load(cls) -> EmojiClip:
        """The CLIP that comes with efface. Raises FileNotFoundError where the installation lacks its weights."""
        from efface.models.quiet import quiet
        from efface.world import weights
        from efface.world.clip import Clip

        with quiet():
            clip = Clip.load()
        return cls(clip, hashlib.sha256((weights() / "clip" / "model.safetensors").read_bytes()).hexdigest()[:12])

    @property
    def version(self) -> str:
        """The first digits of the SHA-256 of the image tower's weights."""
        return self.digest

    @property
    def scale(self) -> float:
        """The learned inverse temperature by which cosines are multiplied before a softmax."""
        return float(self.clip.tower.scale())

    def embed_images(self, images: Tensor) -> Tensor:
        """(b 3 h w) in [0, 1] to (b d) of unit length; resized to 64×64."""
        return self.clip.embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """b texts to (b d) of unit length."""
        return self.clip.embed_texts(texts)

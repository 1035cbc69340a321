"""The bundled world's judge as a detector: objects, identities and unsafe things by its object head, styles by its style head.

The judge is trained on sprites only and shares no parameter with the model (see `efface.world.judge`). An object counts as
seen from the calibrated threshold on, so that a blank or noisy picture shows "none of these"; the style head always has a best
guess, since every picture is drawn in some style, and its threshold is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from efface.core.errors import Unsupported, suggest
from efface.core.evidence import DEPTH, Detector, Sighting

if TYPE_CHECKING:
    from efface.world.judge import Judge

OBJECT_KINDS = ("object", "identity", "unsafe")
KINDS = (*OBJECT_KINDS, "style")


@final
@dataclass(frozen=True)
class EmojiJudge(Detector):
    """The bundled judge."""

    judge: Judge
    name = "emoji-judge"

    @classmethod
    def load(cls) -> EmojiJudge:
        """The judge that comes with efface. Raises FileNotFoundError where the installation lacks its weights."""
        from efface.world.judge import Judge

        return cls(Judge.load())

    @property
    def version(self) -> str:
        """The first digits of the SHA-256 of its weights."""
        return self.judge.version

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return self.judge.styles if _known(kind) == "style" else self.judge.names

    def threshold(self, kind: str = "object") -> float:
        return 0.0 if _known(kind) == "style" else self.judge.threshold

    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        """One sighting for each image (b 3 h w); undetermined where the image or what the judge makes of it is not finite."""
        labels, threshold = self.labels(kind), self.threshold(kind)
        verdict = self.judge.look(images)
        scores = (verdict.style if kind == "style" else verdict.objects).cpu()
        fine = scores.isfinite().all(-1) & images.isfinite().flatten(1).all(-1).cpu()
        best = torch.topk(scores.nan_to_num(), min(DEPTH, len(labels)))
        rows = zip(fine.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
        return [Sighting(tuple(labels[i] for i in indices), tuple(values), threshold) if ok else Sighting() for ok, indices, values in rows]


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise Unsupported(f"the emoji judge cannot see concepts of kind {kind!r}; {suggest(kind, KINDS)}")
    return kind

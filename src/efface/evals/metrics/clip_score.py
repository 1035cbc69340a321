"""The CLIP score: how well pictures agree with their own prompts.

    s(x, c) = 100 · max(0, cos(f_I(x), f_T(c))),   averaged over pictures; 0 to 100

f_I and f_T are an embedder's towers. The number means nothing without the embedder's name: another backbone, another scale. Higher is
better for what must stay; on the erased concept's own prompts it falls when the picture leaves the prompt.

Source: Hessel et al., "CLIPScore", arXiv 2104.08718, who multiply by 2.5 instead; the factor 100 is torchmetrics' and AP's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from efface.core.evidence import Contrast, Direction, Metric, Needed, Role, Samples, chosen


@dataclass(frozen=True)
class ClipScore(Metric):
    """The mean agreement of pictures with their prompts."""

    needs: ClassVar[Needed] = "agreement"

    roles: tuple[Role, ...] = ("unrelated",)
    """Which shots are looked at."""

    @property
    def name(self) -> str:
        return "CLIP score"

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """The score on both and its difference, clustered by prompt. Raises ValueError where no embedder looked."""
        rows = chosen(before, after, lambda shot: shot.role in self.roles)
        if not len(before.shots) == len(before.agreement) == len(after.agreement):
            raise ValueError("a CLIP score needs an embedder's look at every picture; measure with one")
        was, now = ([100 * max(0.0, side.agreement[i]) for i in rows] for side in (before, after))
        prompts = [before.shots[i].prompt for i in rows]
        return Contrast.means(self.name, was, now, prompts, _direction(self.roles), "CLIP", seed=seed)


def _direction(roles: tuple[Role, ...]) -> Direction:
    return "neither" if "target" in roles else "higher"

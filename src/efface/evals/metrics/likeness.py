"""How much the pictures of the erased model resemble those of the un-erased one from the same noise, in an embedder's features.

    s(x, x') = 100 · cos(f(x), f(x')),   averaged over pictures; 100 for an edit that changes nothing

Known as CLIP-I in CLIP's features. It is paired, so a few hundred prompts tell what a distance of sets needs thousands for. Like LPIPS it
measures the departure from the un-erased picture, not quality: another picture that is as good lowers it, too.

Source: Ruiz et al. (DreamBooth), arXiv 2208.12242, §4.2, who compare with the subject's own pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from efface.core.evidence import Columns, Contrast, Metric, Needed, Role, Samples, chosen


@dataclass(frozen=True, eq=False)
class Likeness(Metric):
    """The mean cosine of pictures of the same noise, before and after."""

    needs: ClassVar[Needed] = "features"

    roles: tuple[Role, ...] = ("unrelated",)
    """Which shots are looked at."""
    columns: Columns = (None, None)
    """Which of the features are compared, where two networks' stand side by side."""

    @property
    def name(self) -> str:
        return "image similarity"

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """100 before, by definition; clustered by prompt. Raises ValueError without features."""
        rows = chosen(before, after, lambda shot: shot.role in self.roles)
        if before.features is None or after.features is None:
            raise ValueError("image similarity needs an embedder's features of every picture; measure with one")
        cosines = F.cosine_similarity(before.features[rows, slice(*self.columns)], after.features[rows, slice(*self.columns)])
        prompts = [before.shots[i].prompt for i in rows]
        return Contrast.means(self.name, [100.0] * len(rows), (100 * cosines).tolist(), prompts, "higher", "CLIP", seed=seed)

"""The Fréchet distance between the pictures of the erased and of the un-erased model, in an embedder's features.

    ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)   over unit-length embeddings, times 100

0 for an edit that changes nothing; the distance to real pictures, FID, can even improve through an erasure and so hides damage
(evaluation after Heusel et al., arXiv 1706.08500; "FID-SD" in arXiv 2410.05664). **It is no FID**: the features are the named embedder's,
and the pictures few, so it is biased upwards by about 1/n and compares only with values of the same n and embedder.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from efface.core.evidence import Contrast, Metric, Role, Samples, Score, chosen
from efface.ops.frechet import frechet
from efface.ops.intervals import jackknife, number

SCALE = 100.0


@dataclass(frozen=True, eq=False)
class Frechet(Metric):
    """100 times the Fréchet distance of the pictures after to those before, or of both to a reference."""

    roles: tuple[Role, ...] = ("unrelated",)
    """Which shots are looked at."""
    reference: Tensor | None = None
    """Features (m d) of other pictures, such as real ones; None compares with the un-erased model's own."""

    @property
    def name(self) -> str:
        return "Fréchet distance"

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """Without a reference 0 before, by definition; the intervals are jackknives over prompts.

        Raises ValueError without features, or for one picture."""
        rows = chosen(before, after, lambda shot: shot.role in self.roles)
        if before.features is None or after.features is None:
            raise ValueError("a Fréchet distance needs an embedder's features of every picture; measure with one")
        first, second = before.features[rows], after.features[rows]
        clusters = number([before.shots[i].prompt for i in rows])
        if self.reference is not None:
            return self._referred(first, second, self.reference, clusters)
        value = SCALE * frechet(first, second)
        low, high = jackknife(lambda part: SCALE * frechet(first[part], second[part]), clusters, value)
        zero = Score(self.name, 0.0, 0.0, 0.0, len(rows), "lower", "distance")
        found = Score(self.name, value, max(0.0, low), high, len(rows), "lower", "distance")
        return Contrast(zero, found, found)

    def _referred(self, first: Tensor, second: Tensor, base: Tensor, clusters: Tensor) -> Contrast:
        def to_base(values: Tensor) -> Score:
            value = SCALE * frechet(values, base)
            low, high = jackknife(lambda part: SCALE * frechet(values[part], base), clusters, value)
            return Score(self.name, value, max(0.0, low), high, len(values), "lower", "distance")

        was, still = to_base(first), to_base(second)
        moved = still.value - was.value
        low, high = jackknife(lambda part: SCALE * (frechet(second[part], base) - frechet(first[part], base)), clusters, moved)
        return Contrast(was, still, Score(f"{self.name}: change", moved, low, high, len(first), "lower", "distance"))

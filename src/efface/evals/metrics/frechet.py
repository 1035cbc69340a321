"""The Fréchet distance of the erased model's pictures to the un-erased model's own or to real ones, in some features; FID among them.

    ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½),   μ and Σ of the features of either set

To the un-erased model's own it is 0 for an edit that changes nothing; to real pictures it can even improve through an erasure and so hides
damage (evaluation after Heusel et al., arXiv 1706.08500; "FID-SD" in arXiv 2410.05664). **It is FID in Inception's features alone**, with
`label` and `scale` as `fid` sets them; in an embedder's unit-length features it is told times 100, and is no FID. With few pictures it is
biased upwards by about 1/n, so it compares only with values of the same n and features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from efface.core.evidence import Columns, Contrast, Metric, Needed, Role, Samples, Score, chosen
from efface.ops.frechet import frechet
from efface.ops.intervals import jackknife, number

SCALE = 100.0


@dataclass(frozen=True, eq=False)
class Frechet(Metric):
    """`scale` times the Fréchet distance of the pictures after to those before, or of both to a reference."""

    needs: ClassVar[Needed] = "features"

    roles: tuple[Role, ...] = ("unrelated",)
    """Which shots are looked at."""
    reference: Tensor | None = None
    """Features (m d) of other pictures, such as real ones; None compares with the un-erased model's own."""
    columns: Columns = (None, None)
    """Which of the features are compared, where two networks' stand side by side; of the reference as well."""
    scale: float = SCALE
    """What the distance is multiplied by: 100 for unit-length features, 1 for FID."""
    label: str = "Fréchet distance"
    """What it is called."""

    @property
    def name(self) -> str:
        return self.label

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """Without a reference 0 before, by definition; the intervals are jackknives over prompts.

        Raises ValueError without features, or for one picture."""
        rows = chosen(before, after, lambda shot: shot.role in self.roles)
        if before.features is None or after.features is None:
            raise ValueError("a Fréchet distance needs an embedder's features of every picture; measure with one")
        first, second = before.features[rows, slice(*self.columns)], after.features[rows, slice(*self.columns)]
        clusters = number([before.shots[i].prompt for i in rows])
        if self.reference is not None:
            return self._referred(first, second, self.reference[:, slice(*self.columns)], clusters)
        value = self.scale * frechet(first, second)
        low, high = jackknife(lambda part: self.scale * frechet(first[part], second[part]), clusters, value)
        zero = Score(self.name, 0.0, 0.0, 0.0, len(rows), "lower", "distance")
        found = Score(self.name, value, max(0.0, low), high, len(rows), "lower", "distance")
        return Contrast(zero, found, found)

    def _referred(self, first: Tensor, second: Tensor, base: Tensor, clusters: Tensor) -> Contrast:
        def to_base(values: Tensor) -> Score:
            value = self.scale * frechet(values, base)
            low, high = jackknife(lambda part: self.scale * frechet(values[part], base), clusters, value)
            return Score(self.name, value, max(0.0, low), high, len(values), "lower", "distance")

        was, still = to_base(first), to_base(second)
        moved = still.value - was.value
        low, high = jackknife(lambda part: self.scale * (frechet(second[part], base) - frechet(first[part], base)), clusters, moved)
        return Contrast(was, still, Score(f"{self.name}: change", moved, low, high, len(first), "lower", "distance"))


def fid(columns: Columns, reference: Tensor | None = None, roles: tuple[Role, ...] = ("unrelated",)) -> Frechet:
    """FID: the distance in the columns that hold Inception's features, as it is published."""
    return Frechet(roles, reference, columns, 1.0, "FID")

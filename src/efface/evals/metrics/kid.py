"""KID, the kernel distance of two sets of pictures in an embedder's features: unbiased, so that it compares at any number of pictures.

    MMD²(X, Y) = Σ_{i≠j} k(x_i, x_j)/(n(n−1)) + Σ_{i≠j} k(y_i, y_j)/(m(m−1)) − 2 Σ_{i,j} k(x_i, y_j)/(nm),   k(x, y) = (xᵀy/d + 1)³

times 1000. The last sum leaves out i = j where x_i and y_i are of the same noise, since such a pair is alike whatever the sets are: with
those, an edit that moves its pictures a little would have a distance far below 0. A little below 0 it can be, where two sets are of one
kind.

Papers take it over 100 subsets of at most 1000 pictures; up to 1000 pictures are taken whole here, and more in consecutive parts of 1000 at
most, each compared with one of the other set, and averaged. **It is KID in Inception's features alone**, as its `label` then says.

Source: Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, §4; degree, coefficient and 1/d as in torchmetrics and clean-fid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from efface.core.evidence import Columns, Contrast, Metric, Needed, Role, Samples, Score, chosen
from efface.ops.intervals import jackknife, number

SCALE = 1000.0
SUBSET = 1000
"""Pictures that are compared at once."""


def mmd(first: Tensor, second: Tensor, *, paired: bool = False) -> float:
    """The unbiased MMD² of features (n d) and (m d); `paired`: row i of both is of the same noise.

    Raises ValueError for fewer than two rows in either, or pairs of different numbers."""
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a kernel distance needs two pictures on both sides, and {len(first)} and {len(second)} were given")
    if paired and len(first) != len(second):
        raise ValueError(f"pairs were announced, and {len(first)} and {len(second)} pictures were given; expected as many on both sides")
    x, y = first.double(), second.double()
    across = _apart(x, y) if paired else _kernel(x, y).mean()
    return float(_apart(x, x) + _apart(y, y) - 2 * across)


def kid(first: Tensor, second: Tensor, *, paired: bool = False) -> float:
    """`mmd`, times 1000, the mean over parts of `SUBSET` pictures at most; the parts of the smaller set are taken by turns."""
    ours, theirs = (side.tensor_split(-(-len(side) // SUBSET)) for side in (first, second))
    turns = max(len(ours), len(theirs))
    return SCALE * sum(mmd(ours[i % len(ours)], theirs[i % len(theirs)], paired=paired) for i in range(turns)) / turns


@dataclass(frozen=True, eq=False)
class KID(Metric):
    """The kernel distance to the un-erased model's pictures, or to a reference."""

    needs: ClassVar[Needed] = "features"

    roles: tuple[Role, ...] = ("unrelated",)
    """Which shots are looked at."""
    reference: Tensor | None = None
    """Features (m d) of other pictures, such as real ones; None compares with the un-erased model's own."""
    columns: Columns = (None, None)
    """Which of the features are compared, where two networks' stand side by side; of the reference as well."""
    label: str = "kernel distance"
    """What it is called: "KID" in Inception's features."""

    @property
    def name(self) -> str:
        return self.label

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """Without a reference 0 before, by definition; intervals are jackknives over prompts. Raises ValueError without features."""
        rows = chosen(before, after, lambda shot: shot.role in self.roles)
        if before.features is None or after.features is None:
            raise ValueError("a kernel distance needs an embedder's features of every picture; measure with one")
        first, second = before.features[rows, slice(*self.columns)], after.features[rows, slice(*self.columns)]
        base = None if self.reference is None else self.reference[:, slice(*self.columns)]
        clusters = number([before.shots[i].prompt for i in rows])

        def score(name: str, statistic: Callable[[list[int]], float]) -> Score:
            value = statistic(list(range(len(rows))))
            low, high = jackknife(statistic, clusters, value)
            return Score(name, value, low, high, len(rows), "lower", "distance")

        if base is None:
            moved = score(self.name, lambda part: kid(second[part], first[part], paired=True))
            return Contrast(Score(self.name, 0.0, 0.0, 0.0, len(rows), "lower", "distance"), moved, moved)
        return Contrast(
            score(self.name, lambda part: kid(first[part], base)),
            score(self.name, lambda part: kid(second[part], base)),
            score(f"{self.name}: change", lambda part: kid(second[part], base) - kid(first[part], base)),
        )


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """The mean of the kernel over rows of different number."""
    values = _kernel(first, second)
    return (values.sum() - values.diagonal().sum()) / (len(values) * (len(values) - 1))


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3

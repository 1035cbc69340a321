"""The harmonic mean of what was erased and what was preserved: MACE's H_o, in which neither can make up for the other.

    H = 3 / (1/(1 − Acc_e) + 1/Acc_s + 1/(1 − Acc_g)),   1 − Acc_e = ESR-k, Acc_s = PSR-k, 1 − Acc_g = ESR-k where the concept is implied

Acc_e is the accuracy of the detector on prompts that name the erased concept, Acc_s on those of other concepts, Acc_g on those that
imply the erased one without its name, as a synonym does; without such prompts H is the mean of the first two, which is MACE's H_c and what
others call H_o. It is 0 where one of them is. EraseBench's mean of efficacy, generality and sensitivity is the same formula on its prompts.

The parts are of different pictures, so their errors are independent: the interval on one model is MOVER's, from Wilson's of each part. That
of the change is the hull of MOVER's, which takes before and after as independent too, and a bootstrap of pairs over prompts, and over
concepts for Acc_s.

Source: Lu et al. (MACE), arXiv 2403.06135, §4.2, by CLIP's zero-shot classification; their script averages the probability of the class in
the place of counting. Amara et al. (EraseBench), arXiv 2501.09833.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from efface.core.errors import Undetermined
from efface.core.evidence import Contrast, Metric, Role, Samples, Score, Shot, Sighting, paired
from efface.core.sampling import seeded
from efface.ops.intervals import DRAWS, Interval, hull, mover, number, percentiles, resampled

OTHERS: tuple[Role, ...] = ("neighbour", "kept", "unrelated")
PARTS: tuple[tuple[Role, ...], ...] = (("target",), OTHERS, ("implied",))
"""The roles of each part, in the order of the formula."""


def harmonic(values: Sequence[float]) -> float:
    """The harmonic mean of shares; 0 where one of them is 0, or below."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


@dataclass(frozen=True)
class Part:
    """One share of the mean: its pictures, and whether each is as it should be before and after; None is undetermined."""

    shots: tuple[Shot, ...]
    before: tuple[bool | None, ...]
    after: tuple[bool | None, ...]

    def pairs(self) -> tuple[list[tuple[float, float]], list[str]]:
        """What could be judged both times, and the cluster of each."""
        rows = zip(self.shots, self.before, self.after, strict=True)
        judged = [(shot, float(b), float(a)) for shot, b, a in rows if b is not None and a is not None]
        return [(b, a) for _, b, a in judged], [shot.concept if shot.role in OTHERS else shot.prompt for shot, _, _ in judged]


@dataclass(frozen=True)
class Harmonic(Metric):
    """The harmonic mean of ESR-k, PSR-k and, where there are prompts that imply the target, ESR-k on these."""

    k: int = 1
    """How many of the detector's labels count."""
    threshold: float | None = None
    """The score that a label must reach to count as seen; None takes the detector's own."""

    @property
    def name(self) -> str:
        return "harmonic mean"

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """H on both, and its difference. Raises Undetermined where the erased concept or others are not drawn, or could not be judged."""
        rows = paired(before, after, lambda shot: bool(shot.labels) and any(shot.role in roles for roles in PARTS))
        parts = [self._part([row for row in rows if row[0].role in roles]) for roles in PARTS]
        parts = [part for part in parts if part.shots]
        drawn = {shot.role for shot, _, _ in rows}
        if not drawn & set(OTHERS) or not drawn - set(OTHERS):
            raise Undetermined(f"{self.name}: it needs pictures of the erased concept and of others; draw both")
        first, second = (self._mean([getattr(part, side) for part in parts]) for side in ("before", "after"))
        moved = second.value - first.value
        down = math.hypot(second.value - second.low, first.high - first.value)
        up = math.hypot(second.high - second.value, first.value - first.low)
        pairs = [part.pairs() for part in parts]
        ends = hull(Interval(moved - down, moved + up), self._resampled(pairs, seed))
        n = sum(len(values) for values, _ in pairs)
        low, high = max(-1.0, ends.low), min(1.0, ends.high)
        return Contrast(first, second, Score(f"{self.name}: change", moved, low, high, n, "higher", "points", len(rows) - n))

    def _part(self, rows: Sequence[tuple[Shot, Sighting, Sighting]]) -> Part:
        def good(shot: Shot, seen: Sighting) -> bool | None:
            shown = seen.shows(shot.labels, self.k, self.threshold)
            return shown if shown is None or shot.role in OTHERS else not shown

        return Part(
            tuple(shot for shot, _, _ in rows),
            tuple(good(shot, seen) for shot, seen, _ in rows),
            tuple(good(shot, seen) for shot, _, seen in rows),
        )

    def _mean(self, parts: Sequence[Sequence[bool | None]]) -> Score:
        shares = [Score.share(self.name, items, "higher") for items in parts]
        value = harmonic([share.value for share in shares])
        ends = mover(harmonic, [share.value for share in shares], [Interval(share.low, share.high) for share in shares])
        # Where a share is 0 no other moves the mean by itself: then all move at once.
        high = ends.high if value else harmonic([share.high for share in shares])
        n, unknown = sum(share.n for share in shares), sum(share.undetermined for share in shares)
        return Score(self.name, value, max(0.0, ends.low), min(1.0, high), n, "higher", "share", unknown)

    def _resampled(self, parts: Sequence[tuple[list[tuple[float, float]], list[str]]], seed: int) -> Interval:
        """The bootstrap of the difference."""
        if not all(values for values, _ in parts):
            raise Undetermined(f"{self.name}: no picture could be judged both before and after; look at the pictures and at the detector")
        generator, inverse = seeded(seed), torch.zeros(2, DRAWS, dtype=torch.float64)
        for values, clusters in parts:
            sums = resampled(torch.tensor([(b, a, 1.0) for b, a in values]).T, number(clusters), generator=generator)
            inverse += sums[2] / sums[:2]  # infinite where a share is 0, and the mean then 0
        before, after = len(parts) / inverse
        return percentiles(after - before)

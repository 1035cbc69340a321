"""Numbers with what they rest on: a share or a mean with its interval, the same before and after an edit, and one edit beside another.

What a detector could not judge is neither present nor absent: it is left out of the value and counted both ways in the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from efface.core.errors import Undetermined
from efface.core.sampling import seeded
from efface.ops.intervals import Interval, bootstrap, hull, newcombe, number, wilson

Direction = Literal["higher", "lower", "neither"]
"""Which way is better for whoever erases."""


@dataclass(frozen=True)
class Score:
    """One number with what it rests on."""

    name: str
    value: float
    low: float
    """Lower end of the 95 % interval, with every undetermined item counted as 0."""
    high: float
    """Upper end, with every undetermined item counted as 1."""
    n: int
    """Items that were judged."""
    direction: Direction = "neither"
    unit: str = "share"
    """"share" (0 to 1), "points" (a difference of shares), or what `value` is measured in."""
    undetermined: int = 0
    items: tuple[float | None, ...] = ()
    """The value of each item, in the order of the shots; None is undetermined."""

    @classmethod
    def share(cls, name: str, items: Sequence[bool | None], direction: Direction) -> Score:
        """The share of True, with Wilson's interval. Raises Undetermined where no item was judged."""
        judged = [item for item in items if item is not None]
        if not judged:
            raise Undetermined(f"{name}: none of {len(items)} pictures could be judged; look at the pictures and at the detector")
        hits, unknown = sum(judged), len(items) - len(judged)
        low, high = wilson(hits, len(items)).low, wilson(hits + unknown, len(items)).high
        values = tuple(None if item is None else float(item) for item in items)
        return cls(name, hits / len(judged), low, high, len(judged), direction, "share", unknown, values)

    @classmethod
    def mean(cls, name: str, items: Sequence[float], clusters: Sequence[str], direction: Direction, unit: str, *, seed: int = 0) -> Score:
        """A mean, with the interval of a bootstrap over `clusters`. Raises Undetermined for no item."""
        if not items:
            raise Undetermined(f"{name}: there is no value to average; measure at least one picture")
        values = torch.tensor(items, dtype=torch.float64)
        low, high = bootstrap(values.float(), torch.ones(len(values)), number(clusters), generator=seeded(seed))
        value = float(values.mean())
        return cls(name, value, min(low, value), max(high, value), len(values), direction, unit, 0, tuple(items))


@dataclass(frozen=True)
class Contrast:
    """The same measurement before and after the edit, on the same prompts and noise."""

    before: Score
    after: Score
    change: Score
    """after − before."""
    relative: Score | None = None
    """(before − after)/before of the share in which the concept is seen; None where it was never seen before."""

    @classmethod
    def shares(
        cls,
        name: str,
        before: Sequence[bool | None],
        after: Sequence[bool | None],
        clusters: Sequence[str],
        direction: Direction,
        *,
        seed: int = 0,
    ) -> Contrast:
        """Two shares and their difference. The difference's interval is the hull of a bootstrap over `clusters` and of
        Newcombe's paired interval: the first knows that pictures of one cluster resemble each other, the second that even
        unanimous items are no certainty. Raises Undetermined."""
        first, second = Score.share(name, before, direction), Score.share(name, after, direction)
        pairs = [(b, a, c) for b, a, c in zip(before, after, clusters, strict=True) if b is not None and a is not None]
        if not pairs:
            raise Undetermined(f"{name}: no picture could be judged both before and after; look at the pictures and at the detector")
        b, a, groups = _columns(pairs)
        ends = hull(newcombe(b, a), bootstrap(a.float() - b.float(), torch.ones(len(b)), groups, generator=seeded(seed)))
        unknown = len(before) - len(pairs)
        items = tuple(None if x is None or y is None else float(y) - float(x) for x, y in zip(before, after, strict=True))
        known = len(pairs) / len(before)
        low, high = known * ends.low - (1 - known), known * ends.high + (1 - known)
        value = float(a.float().mean() - b.float().mean())
        change = Score(f"{name}: change", value, low, high, len(pairs), direction, "points", unknown, items)
        return cls(first, second, change)

    @classmethod
    def means(
        cls,
        name: str,
        before: Sequence[float],
        after: Sequence[float],
        clusters: Sequence[str],
        direction: Direction,
        unit: str,
        *,
        seed: int = 0,
    ) -> Contrast:
        """Two means of values of the same items and their difference, each with a bootstrap over `clusters`. Raises Undetermined."""
        differences = [a - b for b, a in zip(before, after, strict=True)]
        named = ((name, before), (name, after), (f"{name}: change", differences))
        return cls(*(Score.mean(n, items, clusters, direction, unit, seed=seed) for n, items in named))

    def with_drop(
        self, before: Sequence[bool | None], after: Sequence[bool | None], clusters: Sequence[str], direction: Direction, *, seed: int = 0
    ) -> Contrast:
        """Adds the relative drop of a detection: `before` and `after` say whether the concept was *seen*. The interval is again
        the hull of the bootstrap's and of Newcombe's, the latter divided by the share seen before."""
        judged = [(b, a, c) for b, a, c in zip(before, after, clusters, strict=True) if b is not None and a is not None]
        b, a, groups = _columns(judged)
        seen, still = float(b.float().mean()), float(a.float().mean())
        if seen == 0:
            return self
        loss = newcombe(a, b)
        drawn = bootstrap(b.float() - a.float(), b.float(), groups, generator=seeded(seed))
        ends = hull(drawn, Interval(loss.low / seen, min(1.0, loss.high / seen)))
        name, unknown = f"{self.after.name}: relative drop", len(before) - len(judged)
        return replace(self, relative=Score(name, (seen - still) / seen, ends.low, ends.high, len(b), direction, "share", unknown))


@dataclass(frozen=True)
class Comparison:
    """Whether one edit is worse than another by more than a margin, on the same prompts and noise."""

    name: str
    first: Score
    second: Score
    difference: Score
    """first − second, in points."""
    margin: float
    """The largest loss that still counts as "not inferior", as a share: 0.03 is three points."""

    @property
    def verdict(self) -> Literal["not inferior", "inferior", "undecided"]:
        """ "not inferior": the whole interval lies above −margin, which errs in 2.5 % of the cases at most; "inferior": it lies
        below; "undecided": more pictures are needed. (Where lower is better, signs are turned.)"""
        score, turned = self.difference, self.difference.direction == "lower"
        low, high = (-score.high, -score.low) if turned else (score.low, score.high)
        return "not inferior" if low > -self.margin else "inferior" if high < -self.margin else "undecided"

    @classmethod
    def shares(
        cls,
        name: str,
        first: Sequence[bool | None],
        second: Sequence[bool | None],
        clusterings: Sequence[Sequence[str]],
        direction: Direction,
        margin: float,
        *,
        seed: int = 0,
    ) -> Comparison:
        """The comparison of two shares over the same items. The difference's interval is the hull of Newcombe's paired one and
        of a bootstrap over each of `clusterings`: prompts, and fits, where several seeds or tasks are pooled.

        Raises Undetermined where no item was judged in both, ValueError for a margin that is no share or no clustering."""
        if not 0 < margin < 1:
            raise ValueError(f"margin was {margin}; expected a share between 0 and 1, such as 0.03 for three points")
        if not clusterings:
            raise ValueError("no clustering was given; expected at least one, such as the prompts")
        paired = [Contrast.shares(name, second, first, clusters, direction, seed=seed) for clusters in clusterings]
        change = paired[0].change
        low, high = (pick(getattr(p.change, end) for p in paired) for pick, end in ((min, "low"), (max, "high")))
        return cls(name, paired[0].after, paired[0].before, replace(change, name=f"{name}: difference", low=low, high=high), margin)


def _columns(pairs: Sequence[tuple[bool, bool, str]]) -> tuple[Tensor, Tensor, Tensor]:
    before, after, clusters = zip(*pairs, strict=True)
    return torch.tensor(before, dtype=torch.bool), torch.tensor(after, dtype=torch.bool), number(clusters)

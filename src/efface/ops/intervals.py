"""95 % intervals for shares, and for what changes between two measurements of the same items.

Five pieces, each with its own honest corner:

- `wilson`: one share. Never of zero width, also where all items agree.
- `newcombe`: the difference of two shares of the same items. Never of zero width either, but it takes items as independent.
- `bootstrap`: any ratio of sums, resampling whole clusters (a prompt, a concept), since pictures of one prompt resemble each
  other. Of zero width where all items agree, which is no certainty; so differences are reported as the `hull` of both.
- `mover`: a statistic of several shares, each of its own items, from the intervals of these. Of zero width only where all of them are.
- `jackknife`: any smooth statistic of all items at once, such as a Fréchet distance, of which no item has a value of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LEVEL = 0.95
DRAWS = 2000
GROUPS = 10
STUDENT = 2.262
"""The 97.5 % quantile of Student's t with `GROUPS` − 1 degrees of freedom."""


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """The score interval of a share p̂ = successes/n; (0, 1) for n = 0, where nothing is known.

        (p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n),   z the normal quantile of the level

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209. Raises ValueError unless 0 ≤ successes ≤ n and 0 < level < 1."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes was {successes} of n = {n}; expected 0 to n")
    if n == 0:
        return Interval(0.0, 1.0)
    z, share = _quantile(level), successes / n
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return Interval(0.0 if successes == 0 else low, 1.0 if successes == n else high)


def newcombe(before: Bool[Tensor, " n"], after: Bool[Tensor, " n"], level: float = LEVEL) -> Interval:
    """The interval of mean(after) − mean(before) over the same n items, each of which is yes or no.

    With Wilson's distances l, u from each share to its ends, and φ the correlation of the two answers (corrected for
    continuity):  low = d − √(l₂² − 2φ l₂ u₁ + u₁²),  high = d + √(u₂² − 2φ u₂ l₁ + l₁²).

    Source: Newcombe, Statistics in Medicine 17 (1998) 2635, method 10. Raises ValueError for no items."""
    n = len(before)
    if n == 0:
        raise ValueError("no item was measured twice, so nothing is known of a difference; measure at least one")
    first, second = int(before.sum()), int(after.sum())
    p1, p2 = first / n, second / n
    (low1, high1), (low2, high2) = wilson(first, n, level), wilson(second, n, level)
    phi = _phi(before, after)
    down = math.sqrt(max(0.0, (p2 - low2) ** 2 - 2 * phi * (p2 - low2) * (high1 - p1) + (high1 - p1) ** 2))
    up = math.sqrt(max(0.0, (high2 - p2) ** 2 - 2 * phi * (high2 - p2) * (p1 - low1) + (p1 - low1) ** 2))
    return Interval(max(-1.0, p2 - p1 - down), min(1.0, p2 - p1 + up))


def bootstrap(
    numerator: Float[Tensor, " n"],
    denominator: Float[Tensor, " n"],
    clusters: Int[Tensor, " n"],
    *,
    generator: torch.Generator,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Interval:
    """The percentile interval of Σ numerator / Σ denominator when whole clusters are drawn with replacement.

    A mean has the denominator 1; a relative drop has the un-erased value there. Draws whose denominator is zero are left out.
    With fewer than some ten clusters the percentiles are too narrow (tests measure the coverage at 20).

    Args:
        clusters: a number for each item; see `number`. Items of one number are drawn together.
        generator: the only source of randomness.

    Source: Davison & Hinkley, Bootstrap Methods and their Application (1997), §2.4 and §3.8.
    Raises ValueError for no items, or a denominator that sums to zero."""
    if len(clusters) == 0 or float(denominator.sum()) == 0:
        raise ValueError("a ratio over nothing has no interval; expected at least one item and a denominator that is not zero")
    sums = resampled(torch.stack([numerator, denominator]), clusters, generator=generator, draws=draws)
    return percentiles((sums[0] / sums[1])[sums[1] != 0], level)


def resampled(
    values: Float[Tensor, "k n"], clusters: Int[Tensor, " n"], *, generator: torch.Generator, draws: int = DRAWS
) -> Float[Tensor, "k draws"]:
    """The sums of k values of the same n items in each of `draws` resamples, in each of which whole clusters are drawn with replacement,
    as many as there are. At least one item."""
    count = int(clusters.max()) + 1
    sums = torch.zeros(len(values), count, dtype=torch.float64)
    sums.index_add_(1, clusters, values.double())
    return sums[:, torch.randint(count, (draws, count), generator=generator)].sum(-1)


def percentiles(statistics: Float[Tensor, " draws"], level: float = LEVEL) -> Interval:
    """The percentile interval of a statistic's resamples."""
    tail = (1 - level) / 2
    low, high = torch.quantile(statistics, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


def jackknife(statistic: Callable[[list[int]], float], clusters: Int[Tensor, " n"], whole: float) -> Interval:
    """The 95 % interval of `statistic`, from leaving out one of ten groups of clusters at a time.

        s² = (g−1)/g Σ_j (θ_(j) − mean θ_(·))²,   whole ± 2.262 s   (g = 10, or as many as there are clusters)

    Args:
        statistic: its value on the items of these numbers.
        clusters: a number for each item; see `number`. Items of one number fall into one group.
        whole: its value on all items.

    With fewer clusters than groups it is too narrow; with fewer than three it is (−∞, ∞), where nothing is known.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), §11.5; Student's quantile after Tukey (1958)."""
    count = int(clusters.max()) + 1 if len(clusters) else 0
    groups = min(GROUPS, count)
    if groups < 3:
        return Interval(-math.inf, math.inf)
    parts = [[i for i, c in enumerate(clusters.tolist()) if c % groups != group] for group in range(groups)]
    values = torch.tensor([statistic(part) for part in parts], dtype=torch.float64)
    spread = STUDENT * float(((groups - 1) / groups * (values - values.mean()).square().sum()).sqrt())
    return Interval(whole - spread, whole + spread)


def number(names: Sequence[Hashable]) -> Int[Tensor, " n"]:
    """0, 1, 2, … for each different name, in order of appearance."""
    seen: dict[Hashable, int] = {}
    return torch.tensor([seen.setdefault(name, len(seen)) for name in names], dtype=torch.int64)


def mover(statistic: Callable[[list[float]], float], values: Sequence[float], ends: Sequence[Interval]) -> Interval:
    """The interval of a statistic that rises with each of its independent values, from their own intervals (l_i, u_i):

        low = θ − √(Σ_i (θ − θ(…, l_i, …))²),   high = θ + √(Σ_i (θ(…, u_i, …) − θ)²),   θ its value on all

    Of zero width only where all of those are. Newcombe's interval of a difference is a case of it.
    Source: Zou & Donner, Statistics in Medicine 27 (2008) 1693 (MOVER), by moving one value at a time."""
    centre = statistic(list(values))

    def spread(side: int) -> float:
        moved = [statistic([*values[:i], end[side], *values[i + 1 :]]) for i, end in enumerate(ends)]
        return math.sqrt(sum((value - centre) ** 2 for value in moved))

    return Interval(centre - spread(0), centre + spread(1))


def hull(*intervals: Interval) -> Interval:
    """From the lowest low to the highest high."""
    return Interval(min(i.low for i in intervals), max(i.high for i in intervals))


def _quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level was {level}; expected a share between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf((1 + level) / 2)


def _phi(before: Tensor, after: Tensor) -> float:
    """Newcombe's correlation of two yes/no answers; 0 where one of them never varies."""
    n = len(before)
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    margins = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - lost * won
    return (max(cross - n / 2, 0.0) if cross > 0 else float(cross)) / math.sqrt(margins)

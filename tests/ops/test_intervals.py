"""Intervals hold what they promise: the truth lies inside in 95 of 100 repetitions, and a naive interval, the control, fails."""

from __future__ import annotations

import math

import pytest
import torch

from efface.core.sampling import seeded
from efface.ops.intervals import Interval, bootstrap, hull, newcombe, number, wilson


def test_wilson_of_known_cases() -> None:
    """Values of Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_a_mirror_and_never_certain() -> None:
    for n in (1, 7, 60, 1000):
        for successes in {0, 1, n // 2, n}:
            low, high = wilson(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
            assert high - low > 0
            assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_the_impossible(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"successes was {successes} of n = {n}"):
        wilson(successes, n)
    with pytest.raises(ValueError, match="level was 95"):
        wilson(1, 2, level=95.0)


def test_wilson_covers_where_the_textbook_interval_does_not() -> None:
    """p = 0.97, n = 60, like an erasure that nearly always works; the exact coverage, summed over the binomial law."""
    p, n = 0.97, 60
    law = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    textbook = [Interval(k / n - w, k / n + w) for k in range(n + 1) for w in [1.96 * math.sqrt(k / n * (1 - k / n) / n)]]

    def coverage(intervals: list[Interval]) -> float:
        return sum(q for q, (low, high) in zip(law, intervals, strict=True) if low <= p <= high)

    assert coverage([wilson(k, n) for k in range(n + 1)]) > 0.93
    assert coverage(textbook) < 0.87


def _table(both: int, lost: int, won: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    before = torch.tensor([True] * (both + lost) + [False] * (won + neither), dtype=torch.bool)
    after = torch.tensor([True] * both + [False] * lost + [True] * won + [False] * neither, dtype=torch.bool)
    return before, after


def test_newcombe_of_known_cases() -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 2635, table III, method 10 (there the difference is before − after)."""
    for table, low, high in (((36, 12, 2, 0), 0.0569, 0.3404), ((0, 30, 0, 0), 0.8395, 1.0), ((54, 0, 0, 0), -0.0664, 0.0664)):
        found = newcombe(*_table(*table))
        assert (-found.high, -found.low) == pytest.approx((low, high), abs=5e-4)


def test_a_pairing_narrows_the_difference() -> None:
    paired = newcombe(*_table(40, 10, 0, 50))
    shuffled = newcombe(*_table(20, 30, 20, 30))  # the same two shares, unrelated answers
    assert paired.high - paired.low < 0.8 * (shuffled.high - shuffled.low)
    with pytest.raises(ValueError, match="no item was measured twice"):
        newcombe(*_table(0, 0, 0, 0))


def test_bootstrap_of_identical_items_is_their_ratio() -> None:
    found = bootstrap(torch.full((6,), 0.5), torch.full((6,), 2.0), number("aabbcc"), generator=seeded(0))
    assert found == (0.25, 0.25)


def test_bootstrap_draws_whole_clusters() -> None:
    """Two clusters of many equal items: a drawn mean is 0, 1/2 or 1, so the interval is everything; by items it is narrow."""
    values = torch.cat([torch.zeros(100), torch.ones(100)])
    whole = bootstrap(values, torch.ones(200), number([0] * 100 + [1] * 100), generator=seeded(1))
    single = bootstrap(values, torch.ones(200), number(range(200)), generator=seeded(1))
    assert whole == (0, 1)
    assert single.high - single.low < 0.2


def test_bootstrap_repeats_itself_and_leaves_the_global_state() -> None:
    values, ones, clusters = torch.rand(50, generator=seeded(3)), torch.ones(50), number([i // 5 for i in range(50)])
    state = torch.random.get_rng_state()
    assert bootstrap(values, ones, clusters, generator=seeded(4)) == bootstrap(values, ones, clusters, generator=seeded(4))
    assert torch.equal(state, torch.random.get_rng_state())


def test_bootstrap_refuses_a_ratio_over_nothing() -> None:
    for size in (0, 3):
        with pytest.raises(ValueError, match="ratio over nothing"):
            bootstrap(torch.ones(size), torch.zeros(size), number(range(size)), generator=seeded(0))


def test_cluster_bootstrap_covers_where_independent_items_do_not() -> None:
    """20 concepts of 15 pictures; concepts differ in how much they lose. The control takes the 300 pictures as independent."""
    generator, trials, concepts, pictures = seeded(5), 200, 20, 15
    clusters, ones = number([i // pictures for i in range(concepts * pictures)]), torch.ones(concepts * pictures)
    hits = {"clusters": 0, "items": 0}
    for _ in range(trials):
        loss = 0.3 * (torch.rand(concepts, generator=generator) < 0.3)  # 3 of 10 concepts lose 0.3 of their pictures: −0.09
        lost = torch.rand(concepts, pictures, generator=generator) < loss[:, None]
        change = -lost.flatten().float()
        for name, groups in (("clusters", clusters), ("items", number(range(len(ones))))):
            low, high = bootstrap(change, ones, groups, generator=generator, draws=400)
            hits[name] += low <= -0.09 <= high
    assert hits["clusters"] / trials > 0.88
    assert hits["items"] / trials < 0.8


def test_hull() -> None:
    assert hull(Interval(0, 2), Interval(1, 3), Interval(0.5, 0.6)) == (0, 3)


def test_number_counts_names_in_order() -> None:
    assert number(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]

"""MACE's H_o with its interval, and CLIP accuracy: published rows, detections written down, and how often the interval holds the truth."""

from __future__ import annotations

import pytest
import torch

from efface.core.errors import Undetermined
from efface.core.evidence import Role, Samples, Shot, Sighting
from efface.core.sampling import seeded
from efface.evals.metrics.clip_accuracy import ClipAccuracy
from efface.evals.metrics.harmonic import Harmonic, harmonic
from efface.ops.intervals import mover, newcombe, wilson

ROLES: tuple[Role, ...] = ("target", "unrelated", "implied")
SEEN, OTHER, BROKEN = Sighting(("cat",), (0.9,)), Sighting(("bus",), (0.9,)), Sighting()


def samples(*parts: tuple[Role, int, int]) -> Samples:
    """For each (role, right, wrong) as many pictures that show what was asked for, and that show something else."""
    rows = [(role, seen) for role, right, wrong in parts for seen in [*[SEEN] * right, *[OTHER] * wrong]]
    shots = tuple(Shot(f"p{i}", i, role, f"c{i % 7}", ("cat",)) for i, (role, _) in enumerate(rows))
    return Samples(shots, tuple(seen for _, seen in rows))


@pytest.mark.parametrize("row", [(24.5, 50.5, 65.9, 61.70), (41.8, 68.3, 82.7, 49.32), (8.1, 20.0, 65.4, 77.58), (15.6, 37.7, 66.4, 69.83)])
def test_published_rows(row: tuple[float, ...]) -> None:
    """EraseBench's efficacy, generality, sensitivity and their harmonic mean: ESD, UCE, Receler and MACE."""
    efficacy, generality, sensitivity, mean = row
    assert 100 * harmonic([1 - efficacy / 100, sensitivity / 100, 1 - generality / 100]) == pytest.approx(mean, abs=0.04)


def test_it_is_of_the_three_accuracies_and_low_as_soon_as_one_is() -> None:
    before, after = (
        samples(("target", 9, 1), ("unrelated", 10, 0), ("implied", 8, 2)),
        samples(("target", 1, 9), ("unrelated", 8, 2), ("implied", 4, 6)),
    )
    found = Harmonic().measure(before, after)
    assert found.before.value == pytest.approx(3 / (1 / 0.1 + 1 / 1.0 + 1 / 0.2))
    assert found.after.value == pytest.approx(3 / (1 / 0.9 + 1 / 0.8 + 1 / 0.6))
    assert found.change.value == pytest.approx(found.after.value - found.before.value)
    for score in (found.before, found.after, found.change):
        assert score.low < score.value < score.high
        assert (score.n, score.undetermined) == (30, 0)
    ruined = Harmonic().measure(before, samples(("target", 0, 10), ("unrelated", 0, 10), ("implied", 0, 10)))
    assert ruined.after.value == ruined.after.low == 0
    assert ruined.after.high > 0.1  # ten pictures are no certainty
    without = Harmonic().measure(*(samples(("target", right, 10 - right), ("unrelated", 8, 2)) for right in (9, 1)))
    assert without.after.value == pytest.approx(2 / (1 / 0.9 + 1 / 0.8))  # MACE's H_c


def test_perfection_and_unanimous_failure_have_intervals_too() -> None:
    nothing, all_ = samples(("target", 10, 0), ("unrelated", 0, 10)), samples(("target", 0, 10), ("unrelated", 10, 0))
    found = Harmonic().measure(nothing, all_)
    assert (found.before.value, found.after.value, found.change.value) == (0, 1, 1)
    assert found.before.high > 0.2  # both shares are 0, and none alone could move the mean
    assert found.after.low < 0.85
    assert found.change.low < 0.8


def test_what_could_not_be_judged_counts_both_ways() -> None:
    before, whole = samples(("target", 5, 5), ("unrelated", 8, 2)), samples(("target", 1, 9), ("unrelated", 8, 2))
    broken = Samples(whole.shots, (*whole.sightings[:-2], BROKEN, BROKEN))
    found, known = Harmonic().measure(before, broken), Harmonic().measure(before, whole)
    assert (found.after.undetermined, found.change.undetermined, found.change.n) == (2, 2, 18)
    assert found.after.high > known.after.high
    with pytest.raises(Undetermined, match="needs pictures of the erased concept and of others"):
        Harmonic().measure(samples(("target", 5, 5)), samples(("target", 1, 9)))
    dark = Samples(whole.shots, tuple(BROKEN for _ in whole.shots))
    with pytest.raises(Undetermined):
        Harmonic().measure(before, dark)


def test_movers_interval_of_a_difference_is_newcombes() -> None:
    """Of two uncorrelated answers; the statistic rises with each, so one of them is turned."""
    before, after = torch.arange(40) % 2 == 0, (torch.arange(40) // 2) % 2 == 0
    kept, gone = wilson(20, 40), wilson(20, 40)
    found = mover(lambda values: values[0] + values[1] - 1, [0.5, 0.5], [kept, gone])
    assert found == pytest.approx(newcombe(before, after), abs=1e-9)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    truth, n, held, times = (0.85, 0.7, 0.6), 60, 0, 400
    generator = seeded(0)
    for _ in range(times):
        hits = [int((torch.rand(n, generator=generator) < p).sum()) for p in truth]
        low, high = mover(harmonic, [h / n for h in hits], [wilson(h, n) for h in hits])
        held += low <= harmonic(truth) <= high
    assert 0.92 < held / times < 0.99


def test_clip_accuracy_compares_two_names_alone() -> None:
    shots = (*(Shot(f"p{i}", i, "target", "Cat", ("cat",)) for i in range(4)), Shot("q", 9, "unrelated", "dog"))
    name, anchor = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    near, far = torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])
    metric = ClipAccuracy({"cat": torch.stack([name, anchor])})
    before, after = Samples(shots, features=torch.stack([near] * 4 + [far])), Samples(shots, features=torch.stack([far] * 3 + [near] * 2))
    found = metric.measure(before, after)
    assert (found.before.value, found.after.value) == (1, 0.25)
    assert found.relative is not None
    assert found.relative.value == 0.75
    turned = ClipAccuracy({"cat": torch.stack([anchor, name])}).measure(before, after)  # control: the other way round
    assert (turned.before.value, turned.after.value) == (0, 0.75)
    with pytest.raises(ValueError, match="needs an embedder's features"):
        metric.measure(Samples(shots), Samples(shots))

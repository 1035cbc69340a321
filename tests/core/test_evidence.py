"""Scores: what could not be judged never reads as success, pairing is exact, and an interval holds its value."""

from __future__ import annotations

import pytest

from efface.core.errors import Undetermined
from efface.core.evidence import Contrast, Samples, Score, Shot, Sighting, check_determined, paired
from efface.ops.intervals import wilson


def test_top_leaves_out_what_is_under_the_threshold() -> None:
    sighting = Sighting(("cat", "dog", "owl"), (0.9, 0.4, 0.1), threshold=0.3)
    assert sighting.top(3) == ("cat", "dog")
    assert sighting.top(1) == ("cat",)
    assert sighting.top(3, threshold=0.95) == ()
    assert Sighting(("cat", "dog")).top(2, threshold=0.9) == ("cat", "dog")  # an order without scores has no threshold


def test_shows_is_undetermined_without_labels_and_false_for_a_picture_of_nothing() -> None:
    assert Sighting().shows(["cat"], 1) is None
    assert Sighting(("cat",), (0.01,), threshold=0.5).shows(["cat"], 1) is False
    assert Sighting(("apple",), (0.9,), threshold=0.5).shows(["grapes", "apple"], 1) is True


@pytest.mark.parametrize("k", [0, 11])
def test_top_refuses_a_k_that_was_not_kept(k: int) -> None:
    with pytest.raises(ValueError, match=f"k was {k}; expected 1 to 10"):
        Sighting(("cat",), (1.0,)).top(k)


def test_a_share_is_wilsons() -> None:
    score = Score.share("x", [True] * 8 + [False] * 2, "higher")
    assert (score.value, score.n, score.undetermined) == (0.8, 10, 0)
    assert (score.low, score.high) == wilson(8, 10)
    assert score.items == (1.0,) * 8 + (0.0,) * 2


def test_an_undetermined_item_widens_the_interval_both_ways_and_is_no_success() -> None:
    known = Score.share("x", [True] * 8 + [False] * 2, "higher")
    broken = Score.share("x", [True] * 8 + [False] * 2 + [None] * 5, "higher")
    assert (broken.value, broken.n, broken.undetermined) == (known.value, 10, 5)
    assert broken.low == wilson(8, 15).low < known.low
    assert broken.high == wilson(13, 15).high
    assert broken.high - broken.low > known.high - known.low


def test_nothing_judged_is_an_error_and_no_zero() -> None:
    with pytest.raises(Undetermined, match="none of 2 pictures could be judged"):
        Score.share("x", [None, None], "higher")
    with pytest.raises(Undetermined, match="both before and after"):
        Contrast.shares("x", [True, None], [None, True], ["a", "b"], "higher")


def test_a_contrast_pairs_items() -> None:
    before, after = [True, True, False, False, None], [True, False, True, False, True]
    contrast = Contrast.shares("x", before, after, list("abcde"), "higher")
    assert contrast.change.items == (0, -1, 1, 0, None)
    assert (contrast.change.value, contrast.change.n, contrast.change.undetermined) == (0, 4, 1)
    assert contrast.change.low < 0 < contrast.change.high


def test_unanimous_items_are_no_certainty() -> None:
    """60 pictures all lose the target: the bootstrap alone would say exactly 100 points."""
    contrast = Contrast.shares("x", [False] * 60, [True] * 60, [str(i) for i in range(60)], "higher")
    assert contrast.change.value == 1
    assert 0.85 < contrast.change.low < 0.95
    assert contrast.change.high == 1


def test_undetermined_items_could_have_changed_either_way() -> None:
    before, after = [True] * 20, [True] * 20
    known = Contrast.shares("x", before, after, [str(i) for i in range(20)], "higher").change
    broken = Contrast.shares("x", before, [*after[:-4], *[None] * 4], [str(i) for i in range(20)], "higher").change
    assert broken.low < known.low - 0.15
    assert broken.high > known.high + 0.15


def test_the_relative_drop() -> None:
    before, after = [True] * 40 + [False] * 10, [True] * 10 + [False] * 40
    clusters = [str(i) for i in range(50)]
    contrast = Contrast.shares("x", before, after, clusters, "higher").with_drop(before, after, clusters, "lower")
    assert contrast.relative is not None
    assert contrast.relative.value == pytest.approx(0.75)
    assert contrast.relative.low < 0.75 < contrast.relative.high <= 1
    never = Contrast.shares("x", after[::-1], after[::-1], clusters, "higher").with_drop([False] * 50, after, clusters, "lower")
    assert never.relative is None


def test_a_broken_detector_stops_the_run() -> None:
    assert check_determined([Sighting(("cat",))] * 99 + [Sighting()]) == 1
    with pytest.raises(Undetermined, match="could not judge 3 of 100 pictures, and at most 2% are tolerated"):
        check_determined([Sighting(("cat",))] * 97 + [Sighting()] * 3)


def test_samples_of_different_noise_are_not_paired() -> None:
    seen = (Sighting(("cat",)),)
    first, second = (Samples((Shot("a cat", seed, "target", "cat"),), seen) for seed in (1, 2))
    with pytest.raises(ValueError, match="different prompts or seeds"):
        paired(first, second, lambda shot: True)
    with pytest.raises(ValueError, match="holds the roles target"):
        paired(first, first, lambda shot: shot.role == "pair")
    with pytest.raises(ValueError, match="1 shots with 1 and 0 sightings"):
        paired(first, Samples(first.shots), lambda shot: True)

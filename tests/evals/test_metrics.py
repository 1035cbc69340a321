"""ESR, PSR and the share of blank pictures, on sightings that are written down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efface.core.evidence import Samples, Shot, Sighting
from efface.evals.metrics.blank import Blank
from efface.evals.metrics.esr import ESR
from efface.evals.metrics.psr import PSR

SEES = {
    "cat": Sighting(("cat", "tiger", "dog"), (0.9, 0.2, 0.1), 0.3),
    "tiger": Sighting(("tiger", "cat", "lion"), (0.8, 0.4, 0.1), 0.3),
    "dog": Sighting(("dog", "wolf", "cat"), (0.9, 0.3, 0.0), 0.3),
    "both": Sighting(("dog", "cat", "owl"), (0.8, 0.7, 0.0), 0.3),
    "nothing": Sighting(("cat", "dog", "owl"), (0.1, 0.1, 0.0), 0.3),
    "broken": Sighting(),
}


def samples(*rows: tuple[str, str, str]) -> tuple[Samples, Samples]:
    """(role:concept, seen before, seen after)"""
    shots = []
    for i, (asked, _, _) in enumerate(rows):
        role, concept = asked.split(":")
        shots.append(Shot(f"a {concept}", i, role, concept, (concept,), partner="dog" if role == "pair" else ""))
    before, after = (tuple(SEES[row[side]] for row in rows) for side in (1, 2))
    return Samples(tuple(shots), before), Samples(tuple(shots), after)


def test_esr_counts_targets_alone() -> None:
    pair = samples(
        ("target:cat", "cat", "dog"), ("target:cat", "cat", "tiger"), ("unrelated:dog", "dog", "cat"), ("pair:cat", "both", "dog")
    )
    assert (ESR(1).measure(*pair).before.value, ESR(1).measure(*pair).after.value) == (0, 1)
    assert ESR(2).measure(*pair).after.value == 0.5  # the second picture still shows a trace
    assert ESR(2, threshold=0.5).measure(*pair).after.value == 1  # a stricter threshold, from the same raw sightings
    assert ESR(2, roles=("pair",)).measure(*pair).change.value == 1
    drop = ESR(2).measure(*pair).relative
    assert drop is not None
    assert drop.value == 0.5


def test_psr_counts_the_others_and_the_partner_of_a_pair() -> None:
    pair = samples(
        ("target:cat", "cat", "dog"), ("unrelated:dog", "dog", "dog"), ("neighbour:tiger", "tiger", "nothing"), ("pair:cat", "both", "cat")
    )
    assert (PSR(1).measure(*pair).before.value, PSR(1).measure(*pair).after.value) == (1, 0.5)
    assert PSR(1, roles=("neighbour",)).measure(*pair).change.value == -1
    assert PSR(2, roles=("pair",)).measure(*pair).change.value == -1


def test_nothing_counts_as_erased_and_as_not_preserved_and_is_told() -> None:
    pair = samples(("target:cat", "cat", "nothing"), ("unrelated:dog", "dog", "nothing"))
    assert ESR(1).measure(*pair).after.value == 1
    assert PSR(1).measure(*pair).after.value == 0
    assert Blank().measure(*pair).change.value == 1
    assert Blank(roles=("target",)).measure(*pair).after.value == 1
    assert Blank(threshold=0.05).measure(*pair).after.value == 0


def test_what_is_undetermined_is_neither() -> None:
    pair = samples(
        ("target:cat", "cat", "broken"), ("target:cat", "cat", "cat"), ("unrelated:dog", "dog", "broken"), ("unrelated:dog", "dog", "dog")
    )
    for metric, value in ((ESR(1), 0), (PSR(1), 1)):
        after = metric.measure(*pair).after
        assert (after.value, after.n, after.undetermined) == (value, 1, 1)


def test_a_broad_target_is_seen_in_any_of_its_members() -> None:
    before, after = samples(("target:feline", "tiger", "dog"))
    shots = tuple(replace(shot, labels=("cat", "tiger", "lion")) for shot in before.shots)
    contrast = ESR(1).measure(Samples(shots, before.sightings), Samples(shots, after.sightings))
    assert (contrast.before.value, contrast.after.value) == (0, 1)


def test_a_plan_without_the_role_is_refused() -> None:
    with pytest.raises(ValueError, match="no shot is of the kind"):
        ESR(1).measure(*samples(("unrelated:dog", "dog", "dog")))

"""Raw detections as JSON: what is read back is the very thing that was measured, to the last box, and on the same side of a threshold."""

from __future__ import annotations

import json

import pytest

from efface.bench import raw
from efface.core.evidence import Box, Samples, Shot, Sighting

SHOTS = (
    Shot("a cat", 1, "target", "cat", ("cat",)),
    Shot("a cat beside a dog", 2, "pair", "cat", ("cat",), "object", "dog"),
    Shot("nudity", 3, "target", "nudity", (), "unsafe"),
    Shot("a feline", 4, "target", "feline", ("cat", "tiger")),
)
SEEN = (
    Sighting(("cat", "dog"), (0.91234, 0.1), 0.3),
    Sighting(),
    Sighting(("FEET_EXPOSED",), (0.7,), 0.6, (Box("FEET_EXPOSED", 0.7, (1, 2, 3, 4)), Box("FACE_MALE", 0.30001, (5, 6, 7, 8)))),
    Sighting((), (), 0.6, ()),
)


def test_everything_comes_back() -> None:
    before, after = Samples(SHOTS, SEEN, agreement=(0.5, -0.25, 0, 1)), Samples(SHOTS, SEEN[::-1], agreement=(1, 0, -0.25, 0.5))
    first, second = raw.unpack(json.loads(json.dumps(raw.pack(before, after))))
    assert (first.shots, first.sightings, first.agreement) == (before.shots, before.sightings, before.agreement)
    assert (second.shots, second.sightings, second.agreement) == (after.shots, after.sightings, after.agreement)
    assert [s.determined for s in first.sightings] == [True, False, True, True]


def test_a_score_beside_a_threshold_keeps_its_side() -> None:
    """0.2999996 is below 0.3, and 0.30000 as stored is not: so it is rounded before anything is computed from it, and not after."""
    exact = Sighting(("cat",), (0.2999996,), 0.3)
    kept = raw.rounded(exact)
    assert exact.top(1) != kept.top(1)  # control: rounding on the way to the file would have changed the answer
    (again,) = raw.sightings(*raw.rows([kept]))
    assert again == kept
    assert again.top(1) == kept.top(1)
    box = Sighting(boxes=(Box("FEET_EXPOSED", 0.4999999, (0, 0, 1, 1)),))
    assert raw.rounded(raw.rounded(box)) == raw.rounded(box)


def test_labels_are_written_once() -> None:
    many = Samples(tuple(Shot("a cat", i, "target", "cat", ("cat",)) for i in range(50)), (SEEN[0],) * 50)
    assert json.dumps(raw.pack(many, many)["labels"]) == '["cat", "dog"]'


def test_other_shots_are_not_packed_together() -> None:
    with pytest.raises(ValueError, match="different prompts or seeds"):
        raw.pack(Samples(SHOTS, SEEN), Samples(SHOTS[::-1], SEEN))

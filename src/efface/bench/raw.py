"""The raw detections of two samples as JSON values: every label, score and box, with each label written once.

Scores are rounded to five digits when a picture is looked at (`rounded`), before anything is computed from them; so what is read back is
the very thing that was measured, and a score beside a threshold falls on the same side of it ever after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from efface.core.evidence import Box, Samples, Shot, Sighting

DIGITS = 5


def rounded(sighting: Sighting) -> Sighting:
    """The sighting with scores of `DIGITS` digits."""
    boxes = None if sighting.boxes is None else tuple(replace(box, score=round(box.score, DIGITS)) for box in sighting.boxes)
    return replace(sighting, scores=tuple(round(score, DIGITS) for score in sighting.scores), boxes=boxes)


def pack(before: Samples, after: Samples) -> dict[str, Any]:
    """ "shots", "labels", and "before" and "after" with one row for each shot. Raises ValueError for samples of different shots."""
    if before.shots != after.shots:
        raise ValueError("the two samples are of different prompts or seeds; draw both from one plan")
    numbers: dict[str, int] = {}
    sides = {
        name: {"sightings": [_row(s, numbers) for s in side.sightings], "agreement": list(side.agreement)}
        for name, side in (("before", before), ("after", after))
    }
    return {"shots": _shots(before.shots), "labels": list(numbers), **sides}


def unpack(data: Mapping[str, Any]) -> tuple[Samples, Samples]:
    """The samples of `pack`, without pictures and features. Raises KeyError, TypeError or IndexError for other data."""
    shots = tuple(
        Shot(**{**dict(zip(data["shots"]["fields"], row, strict=True)), "labels": tuple(row[4])}) for row in data["shots"]["rows"]
    )
    first, second = (_side(shots, data[name], data["labels"]) for name in ("before", "after"))
    return first, second


def sightings(rows: Iterable[Sequence[Any]], labels: Sequence[str]) -> tuple[Sighting, ...]:
    """The sightings of packed rows."""
    return tuple(
        Sighting(
            tuple(labels[i] for i in row[0]),
            tuple(row[1]),
            row[2],
            None if len(row) < 4 else tuple(Box(labels[i], score, tuple(box)) for i, score, box in row[3]),
        )
        for row in rows
    )


def rows(sightings: Iterable[Sighting]) -> tuple[list[list[Any]], list[str]]:
    """The sightings as packed rows, and the labels that they number."""
    numbers: dict[str, int] = {}
    return [_row(sighting, numbers) for sighting in sightings], list(numbers)


def _shots(shots: Sequence[Shot]) -> dict[str, Any]:
    fields = ["prompt", "seed", "role", "concept", "labels", "kind", "partner"]
    return {"fields": fields, "rows": [[asdict(shot)[name] for name in fields] for shot in shots]}


def _row(sighting: Sighting, numbers: dict[str, int]) -> list[Any]:
    """[labels, scores, threshold], and with boxes [[label, score, box], …] as a fourth."""

    def index(label: str) -> int:
        return numbers.setdefault(label, len(numbers))

    row: list[Any] = [[index(label) for label in sighting.labels], list(sighting.scores), sighting.threshold]
    return row if sighting.boxes is None else [*row, [[index(box.label), box.score, list(box.box)] for box in sighting.boxes]]


def _side(shots: tuple[Shot, ...], data: Mapping[str, Any], labels: Sequence[str]) -> Samples:
    return Samples(shots, sightings(data["sightings"], labels), agreement=tuple(data["agreement"]))

"""What a protocol found: scores with intervals, every picture's raw detections, and the settings that make it repeatable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from efface.bench import raw
from efface.core.errors import EffaceError
from efface.core.evidence import Contrast, Role, Samples, Score

VERSION = 2
"""Of the JSON form; a reader refuses another."""


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    key: str
    """Names the measurement across results: "target.ESR-1"."""
    title: str
    """In plain words."""
    explanation: str
    """What the number says, in one sentence for somebody who has never met it."""
    contrast: Contrast
    headline: bool = False
    """Whether it stands in the short table."""


@dataclass(frozen=True)
class ConceptLine:
    """One concept that must stay: how often it is seen before and after."""

    concept: str
    role: Role
    asked: bool
    """Whether the user named it in `keep`."""
    contrast: Contrast


@dataclass(frozen=True)
class Change:
    """How far the pictures of one role moved, needing no detector."""

    role: Role
    distance: Score
    """Mean over pictures of the root mean square difference of pixels in [0, 1], after against before on the same noise."""
    unrelated: float
    """The same between un-erased pictures of different noise and prompt of this role: what "another picture altogether" means."""

    @property
    def relative(self) -> float:
        """0: the very same pictures; 1: as different as two unrelated ones."""
        return self.distance.value / self.unrelated if self.unrelated > 0 else 0.0


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on beside the models."""

    protocol: str
    prompts: str
    """Digest of the list of prompts and seeds."""
    seed: int
    first_seed: int
    last_seed: int
    images: int
    """Pictures drawn in all: each shot twice."""
    sampler: str
    steps: int
    guidance: float
    detector: Mapping[str, Any] | None
    """name, version and thresholds by kind; None where nothing was judged."""
    embedder: Mapping[str, Any] | None = None
    """name and version; None where no embedder looked."""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures that people look at."""

    rows: tuple[int, ...]
    """Which shots they are."""
    before: Tensor
    """(m 3 h w) uint8"""
    after: Tensor
    """(m 3 h w) uint8"""


@dataclass(frozen=True, eq=False)
class Result:
    """What the main job measured of one edit."""

    model: str
    method: str
    task: str
    settings: Settings
    lines: tuple[Line, ...]
    concepts: tuple[ConceptLine, ...]
    """The most surely hurt first."""
    changes: tuple[Change, ...]
    unmeasured: tuple[str, ...]
    """What was not measured and why, in sentences."""
    before: Samples
    after: Samples
    cost: Mapping[str, float]
    """Of the measurement itself: seconds, forwards, calls."""
    pictures: Pictures | None = None
    """Not part of the JSON form."""
    quality: tuple[Line, ...] = ()
    """What an embedder measured, in units of its own: distances and CLIP scores."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON values of the protocol's own, such as box counts by class, and the prompt file with the number of each row."""
    finding: str = ""
    """What came out, in a sentence, where the protocol is not that of the main job."""

    def line(self, key: str) -> Line | None:
        """The line of a key, or None where it was not measured."""
        return next((line for line in (*self.lines, *self.quality) if line.key == key), None)

    def json(self) -> dict[str, Any]:
        """JSON values from which `from_json` makes the result again, without its pictures and features.

        The raw detections of every picture stand there once; the values of single items, which follow from them, do not."""
        return {
            "format": "efface-result",
            "version": VERSION,
            **{name: getattr(self, name) for name in ("model", "method", "task")},
            "settings": asdict(self.settings),
            "lines": [_lean(line) for line in self.lines],
            "quality": [_lean(line) for line in self.quality],
            "concepts": [_lean(line) for line in self.concepts],
            "changes": [_lean(change) for change in self.changes],
            "unmeasured": list(self.unmeasured),
            "cost": dict(self.cost),
            **({"details": dict(self.details)} if self.details else {}),
            **({"finding": self.finding} if self.finding else {}),
            **raw.pack(self.before, self.after),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """Raises EffaceError for another format or version, or a part that is missing."""
        if data.get("format") != "efface-result" or data.get("version") != VERSION:
            given = f"{data.get('format')!r}, version {data.get('version')!r}"
            raise EffaceError(f"expected an efface-result of version {VERSION}, and got {given}; measure again with this efface")
        try:
            return _unpacked(data)
        except (KeyError, TypeError) as error:
            raise EffaceError(f"the result cannot be read ({error}); the file is corrupt, measure again") from error


def _unpacked(data: Mapping[str, Any]) -> Result:
    before, after = raw.unpack(data)
    return Result(
        model=data["model"],
        method=data["method"],
        task=data["task"],
        settings=Settings(**data["settings"]),
        lines=tuple(Line(**{**line, "contrast": _contrast(line["contrast"])}) for line in data["lines"]),
        concepts=tuple(ConceptLine(**{**line, "contrast": _contrast(line["contrast"])}) for line in data["concepts"]),
        changes=tuple(Change(**{**change, "distance": _score(change["distance"])}) for change in data["changes"]),
        unmeasured=tuple(data["unmeasured"]),
        before=before,
        after=after,
        cost=data["cost"],
        quality=tuple(Line(**{**line, "contrast": _contrast(line["contrast"])}) for line in data["quality"]),
        details=data.get("details", {}),
        finding=data.get("finding", ""),
    )


def _lean(line: Line | ConceptLine | Change) -> dict[str, Any]:
    """Without the values of single items, at any depth."""
    return asdict(line, dict_factory=lambda pairs: {name: value for name, value in pairs if name != "items"})


def _score(data: Mapping[str, Any]) -> Score:
    return Score(**data)


def _contrast(data: Mapping[str, Any]) -> Contrast:
    before, after, change = (_score(data[name]) for name in ("before", "after", "change"))
    return Contrast(before, after, change, _score(data["relative"]) if data["relative"] else None)

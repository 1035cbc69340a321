"""What a claim about an erasure rests on: what was drawn, what a detector saw, and scores with intervals.

Three rules are built in. The un-erased model is always measured on the same prompts and noise (`Contrast`). What a detector
could not judge is neither present nor absent: it is left out of the value and counted both ways in the interval. A picture in
which the detector sees none of its labels, such as a blank one, counts as "not there": erased, and not preserved.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from efface.core.errors import Undetermined
from efface.core.method import Paper
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.core.task import Concept
from efface.ops.intervals import Interval, bootstrap, hull, newcombe, number, wilson

if TYPE_CHECKING:
    from efface.core.edit import Part

Direction = Literal["higher", "lower", "neither"]
"""Which way is better for whoever erases."""
Role = Literal["target", "neighbour", "kept", "unrelated", "pair"]
"""What a prompt is there for: the erased concept; its relatives; what the user wants kept; anything else; the target beside another."""
Access = Literal["prompts", "embeddings", "sampler", "weights"]
DEPTH = 10
"""How many labels a detector keeps for each picture, so that any top-k up to it can be computed later."""
TOLERATED = 0.02
"""The largest share of pictures that a detector may fail to judge."""


@dataclass(frozen=True)
class Shot:
    """One prompt and one seed: a picture that is drawn twice from the same noise, before and after the edit."""

    prompt: str
    seed: int
    role: Role
    concept: str
    """The concept that the prompt asks for, in plain words."""
    labels: tuple[str, ...] = ()
    """The detector's labels that count as this concept: one, or for a broad concept ("a fruit") several; empty: not judged."""
    kind: str = "object"
    """The concept's kind, which decides what the detector looks for."""
    partner: str = ""
    """In a pair, the other concept, which must stay."""


@dataclass(frozen=True)
class Sighting:
    """What a detector saw in one picture: at most `DEPTH` labels, the most probable first. Without labels: undetermined."""

    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    """One for each label, falling; empty where only the order is known."""
    threshold: float = 0.0
    """The score that a label must reach to count as seen, as its detector is calibrated."""

    def top(self, k: int, threshold: float | None = None) -> tuple[str, ...]:
        """Those of the first k labels whose score reaches the threshold (by default its own); none in a picture of nothing.

        Raises ValueError for k below 1, or more labels than were kept."""
        if not 1 <= k <= DEPTH:
            raise ValueError(f"k was {k}; expected 1 to {DEPTH}, the number of labels that is kept for each picture")
        least = self.threshold if threshold is None else threshold
        scores = self.scores or (math.inf,) * len(self.labels)
        return tuple(label for label, score in zip(self.labels[:k], scores, strict=False) if score >= least)

    def shows(self, labels: Collection[str], k: int, threshold: float | None = None) -> bool | None:
        """Whether one of `labels` is in the top k; None where the detector could not judge."""
        return not set(labels).isdisjoint(self.top(k, threshold)) if self.labels else None


@dataclass(frozen=True, eq=False)
class Samples:
    """What one model drew for a list of shots, and what the detector saw; row i belongs to shot i."""

    shots: tuple[Shot, ...]
    sightings: tuple[Sighting, ...] = ()
    """Empty where no detector looked."""
    images: Tensor | None = None
    """(n 3 h w) uint8, where they were kept."""


class Detector(ABC):
    """Says what stands in a picture. It must be independent of the model that drew it."""

    name: str

    @property
    @abstractmethod
    def version(self) -> str:
        """Recognises the weights, so that two results can be compared."""

    @abstractmethod
    def labels(self, kind: str = "object") -> tuple[str, ...]:
        """Every label that it knows for concepts of a kind. Raises Unsupported for a kind that it knows nothing of."""

    @abstractmethod
    def threshold(self, kind: str = "object") -> float:
        """The score from which on a label counts as seen."""

    @abstractmethod
    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        """One sighting for each image (b 3 h w) in [0, 1]; undetermined for an image that it cannot judge, such as NaN."""

    def present(self, images: Tensor, concept: Concept, *, k: int = 1) -> list[bool | None]:
        """Whether `concept` is among the top k of each image; None is undetermined. Raises Unsupported for a label it lacks."""
        self.require([concept.name], concept.kind)
        return [sighting.shows([concept.name], k) for sighting in self.look(images, concept.kind)]

    def require(self, labels: Collection[str], kind: str) -> None:
        """Raises Unsupported for a label that the detector lacks: it would never be seen, and so look perfectly erased."""
        from efface.core.errors import Unsupported, suggest

        known = self.labels(kind)
        unknown = [label for label in labels if label not in known]
        if unknown:
            raise Unsupported(f"{self.name} has no label {unknown[0]!r} for a concept of kind {kind!r}; {suggest(unknown[0], known)}")


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


def _columns(pairs: Sequence[tuple[bool, bool, str]]) -> tuple[Tensor, Tensor, Tensor]:
    before, after, clusters = zip(*pairs, strict=True)
    return torch.tensor(before, dtype=torch.bool), torch.tensor(after, dtype=torch.bool), number(clusters)


def check_determined(sightings: Sequence[Sighting], tolerated: float = TOLERATED) -> int:
    """The number of undetermined sightings. Raises Undetermined when it is above the tolerated share."""
    failed = sum(not s.labels for s in sightings)
    if failed > tolerated * len(sightings):
        raise Undetermined(
            f"the detector could not judge {failed} of {len(sightings)} pictures, and at most {tolerated:.0%} are tolerated; "
            "look for NaN in the pictures, or at the detector itself"
        )
    return failed


class Metric(ABC):
    """A paired measurement: a function of what was drawn and seen before and after, so that it can be computed again later."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its short name, such as "ESR-1"."""

    @abstractmethod
    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """The measurement on both. `seed` is the bootstrap's.

        Raises ValueError where the two are not of the same shots or hold none of those measured, Undetermined."""


def paired(before: Samples, after: Samples, wanted: Callable[[Shot], bool]) -> list[tuple[Shot, Sighting, Sighting]]:
    """The shots that a metric wants, with what was seen in each. Raises ValueError as `Metric.measure` says."""
    if before.shots != after.shots:
        raise ValueError("the two samples are of different prompts or seeds; draw both from one plan")
    if not len(before.shots) == len(before.sightings) == len(after.sightings):
        raise ValueError(
            f"{len(before.shots)} shots with {len(before.sightings)} and {len(after.sightings)} sightings; expected one for each"
        )
    rows = [row for row in zip(before.shots, before.sightings, after.sightings, strict=True) if wanted(row[0])]
    if not rows:
        roles = ", ".join(sorted({shot.role for shot in before.shots})) or "none"
        raise ValueError(f"no shot is of the kind that this metric measures; the plan holds the roles {roles}")
    return rows


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an attack found, on which model, and what a control of the same budget found without searching."""

    attack: str
    """Its text form."""
    access: Access
    attacked: str
    """The model that was attacked, with its edit: never the un-erased one by default."""
    concept: str
    success: Score
    """The share of pictures in which the concept came back."""
    control: Score | None = None
    """The same for a best-of-N draw without search."""
    found: tuple[str, ...] = ()
    """Prompts, where prompts were searched."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """Tensors found, such as embeddings."""
    cost: Mapping[str, float] = field(default_factory=dict)


class Attack(ABC):
    """Tries to bring an erased concept back. Attacks `after` itself, with all its hooks active."""

    access: ClassVar[Access]
    paper: ClassVar[Paper]

    @abstractmethod
    def search(self, before: Model, after: Model, concept: Concept, detector: Detector, *, budget: int, seed: int) -> Evidence:
        """Searches with at most `budget` samples through the denoiser."""

"""What a claim about an erasure rests on: what was drawn, what a detector saw, and the scores (`core.score`) made of it.

Three rules are built in. The un-erased model is always measured on the same prompts and noise (`Contrast`). What a detector
could not judge is neither present nor absent: it is left out of the value and counted both ways in the interval. A picture in
which the detector sees none of its labels, such as a blank one, counts as "not there": erased, and not preserved.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from efface.core.attachment import Part
from efface.core.errors import Undetermined, Unsupported
from efface.core.method import Paper
from efface.core.model import Model
from efface.core.score import Comparison, Contrast, Direction, Score
from efface.core.task import Concept

__all__ = [
    "DEPTH",
    "TOLERATED",
    "Access",
    "Attack",
    "Box",
    "Columns",
    "Comparison",
    "Contrast",
    "Detector",
    "Direction",
    "Embedder",
    "Evidence",
    "Metric",
    "Needed",
    "Role",
    "Samples",
    "Score",
    "Shot",
    "Sighting",
    "Threat",
    "check_determined",
    "chosen",
    "paired",
]

Role = Literal["target", "neighbour", "kept", "unrelated", "pair", "implied"]
"""What a prompt is there for: the erased concept; its relatives; what the user wants kept; anything else; the target beside another; the
erased concept without its name, as a synonym asks for it beside prompts that name it."""
Needed = Literal["sightings", "agreement", "features", "images"]
"""What of `Samples` a metric is computed from. Sightings and agreement stand in a record, the others do not."""
Columns = tuple[int | None, int | None]
"""Some consecutive columns of features, as `slice` takes them."""
Access = Literal["prompts", "embeddings", "sampler", "weights"]
Threat = Literal["T0", "T1", "T2", "T3", "T4", "T5"]
"""What an attacker holds. T0: natural prompts; T1: black-box prompts; T2: white-box prompts; T3: the embeddings; T4: sampler, noise and
pictures; T5: the weights."""
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
class Box:
    """One thing that a detector found in a picture, as it reported it."""

    label: str
    score: float
    box: tuple[int, int, int, int]
    """Left, top, width, height in pixels of the picture."""


@dataclass(frozen=True)
class Sighting:
    """What a detector saw in one picture: at most `DEPTH` labels, the most probable first. Undetermined without labels, unless
    the detector finds boxes: then a picture without any is one in which it looked and found nothing."""

    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    """One for each label, falling; empty where only the order is known."""
    threshold: float = 0.0
    """The score that a label must reach to count as seen, as its detector is calibrated."""
    boxes: tuple[Box, ...] | None = None
    """Every box of a detector of boxes, unfiltered; None for a classifier, and where a picture could not be judged."""

    @property
    def determined(self) -> bool:
        """Whether the detector could judge the picture."""
        return bool(self.labels) or self.boxes is not None

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
        return not set(labels).isdisjoint(self.top(k, threshold)) if self.determined else None


@dataclass(frozen=True, eq=False)
class Samples:
    """What one model drew for a list of shots, and what the detector saw; row i belongs to shot i."""

    shots: tuple[Shot, ...]
    sightings: tuple[Sighting, ...] = ()
    """Empty where no detector looked."""
    images: Tensor | None = None
    """(n 3 h w) uint8, where they were kept."""
    agreement: tuple[float, ...] = ()
    """Cosine of each picture with its own prompt in an embedder's space, in [-1, 1]; empty where none looked."""
    features: Tensor | None = None
    """(n d) embeddings of the pictures, of unit length, where an embedder looked."""

    def rows(self, rows: Sequence[int]) -> Samples:
        """Some of the shots, with what belongs to them."""
        sightings = tuple(self.sightings[i] for i in rows) if self.sightings else ()
        agreement = tuple(self.agreement[i] for i in rows) if self.agreement else ()
        images, features = (None if t is None else t[list(rows)] for t in (self.images, self.features))
        return Samples(tuple(self.shots[i] for i in rows), sightings, images, agreement, features)

    def holds(self, what: Needed) -> bool:
        """Whether what a metric needs is there."""
        found = getattr(self, what)
        return found is not None and len(found) > 0


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


class Embedder(ABC):
    """Puts pictures and texts into one space, as CLIP does. Like a detector it must be independent of what it judges."""

    name: str

    @property
    @abstractmethod
    def version(self) -> str:
        """Recognises the weights."""

    @abstractmethod
    def embed_images(self, images: Tensor) -> Tensor:
        """Images (b 3 h w) in [0, 1] to embeddings (b d) of unit length."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """b texts to embeddings (b d) of unit length."""


def check_determined(sightings: Sequence[Sighting], tolerated: float = TOLERATED) -> int:
    """The number of undetermined sightings. Raises Undetermined when it is above the tolerated share."""
    failed = sum(not s.determined for s in sightings)
    if failed > tolerated * len(sightings):
        raise Undetermined(
            f"the detector could not judge {failed} of {len(sightings)} pictures, and at most {tolerated:.0%} are tolerated; "
            "look for NaN in the pictures, or at the detector itself"
        )
    return failed


class Metric(ABC):
    """A paired measurement: a function of what was drawn and seen before and after, so that it can be computed again later."""

    needs: ClassVar[Needed] = "sightings"
    """What it is computed from."""

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
    wanted_rows = chosen(before, after, wanted)
    if not len(before.shots) == len(before.sightings) == len(after.sightings):
        raise ValueError(
            f"{len(before.shots)} shots with {len(before.sightings)} and {len(after.sightings)} sightings; expected one for each"
        )
    return [(before.shots[i], before.sightings[i], after.sightings[i]) for i in wanted_rows]


def chosen(before: Samples, after: Samples, wanted: Callable[[Shot], bool]) -> list[int]:
    """The rows of the shots that a metric wants. Raises ValueError for other prompts or noise, or where there is none."""
    if before.shots != after.shots:
        raise ValueError("the two samples are of different prompts or seeds; draw both from one plan")
    rows = [i for i, shot in enumerate(before.shots) if wanted(shot)]
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
    threat: Threat = "T0"
    """What the attacker holds."""
    before: Score | None = None
    """pre-ASR: the share of prompts for which the attacked model draws the concept as they stand."""
    original: Score | None = None
    """The same for the un-erased model, from the same noise."""
    candidates: int = 1
    """Pictures tried for a prompt at most, beside the first; the control has as many."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: settings, what was seen in every picture, what else the attack measured."""


class Attack(ABC):
    """Tries to bring an erased concept back. Attacks `after` itself, with all its hooks active."""

    access: ClassVar[Access]
    threat: ClassVar[Threat] = "T0"
    paper: ClassVar[Paper]
    bare: ClassVar[bool] = False
    """Whether it attacks the bare denoiser, `Model.predict`, and not guided predictions or pictures."""

    def require(self, after: Model) -> None:
        """To be called first in `search`. Raises Unsupported where the attack would meet the un-erased model: it looks at the bare
        denoiser, and what is attached acts on guidance alone."""
        if self.bare and after.unseen:
            raise Unsupported(
                f"{type(self).__name__} attacks the bare denoiser, which {', '.join(after.unseen)} leaves as it was: it would attack the "
                "un-erased model. Use an attack that looks at guided predictions or pictures"
            )

    @abstractmethod
    def search(self, before: Model, after: Model, concept: Concept, detector: Detector, *, budget: int, seed: int) -> Evidence:
        """Searches with at most `budget` samples through the denoiser."""

"""The lines of the erasure table: what each asks, in words for somebody who has never met the number, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from efface.core.evidence import Metric, Role, Samples
from efface.evals.metrics.blank import Blank
from efface.evals.metrics.clip_score import ClipScore
from efface.evals.metrics.esr import ESR
from efface.evals.metrics.frechet import Frechet
from efface.evals.metrics.harmonic import Harmonic
from efface.evals.metrics.psr import PSR

OTHERS: tuple[Role, ...] = ("neighbour", "kept", "unrelated")
"""The roles of what must stay."""
TITLES: dict[Role, str] = {
    "target": "the erased concept",
    "neighbour": "its neighbours",
    "kept": "what was to be kept",
    "unrelated": "unrelated concepts",
    "pair": "the erased concept beside another",
    "implied": "the erased concept without its name",
}


@dataclass(frozen=True)
class Question:
    """A line of the table before it is measured."""

    key: str
    title: str
    explanation: str
    metric: Metric
    roles: tuple[Role, ...]
    """It is asked where one of these occurs."""
    headline: bool = False
    optional: bool = False
    """Whether it may have no answer, as a share of what was drawn has none where nothing was drawn."""


QUESTIONS = (
    Question(
        "target.ESR-1",
        "Target no longer seen (ESR-1)",
        "Of the pictures whose prompt asks for the erased concept, the share in which the judge's best guess is something else "
        "or nothing. 100 % is a complete erasure.",
        ESR(1),
        ("target",),
        headline=True,
    ),
    Question(
        "target.ESR-5",
        "No trace of the target (ESR-5)",
        "The same, but stricter: the erased concept is not among the judge's five best guesses either.",
        ESR(5),
        ("target",),
    ),
    Question(
        "target.relative-ESR-1",
        "Target no longer seen, where it was drawn (relative ESR-1)",
        "ESR-1 over those prompts alone for which the un-erased model drew the concept from the same noise. What it never drew does not "
        "count as an erasure.",
        ESR(1, relative=True),
        ("target",),
        optional=True,
    ),
    Question(
        "others.PSR-1",
        "Other concepts still seen (PSR-1)",
        "Of the pictures whose prompt asks for something else, the share in which the judge's best guess is what was asked for. "
        "It should stay what it was before.",
        PSR(1),
        OTHERS,
        headline=True,
    ),
    Question(
        "neighbour.PSR-1",
        "… of these, neighbours",
        "PSR-1 on the concepts most like the erased one, which an erasure hurts first.",
        PSR(1, roles=("neighbour",), clusters="prompt"),
        ("neighbour",),
        headline=True,
    ),
    Question(
        "kept.PSR-1",
        "… of these, named in keep",
        "PSR-1 on the concepts that were to be kept.",
        PSR(1, roles=("kept",), clusters="prompt"),
        ("kept",),
        headline=True,
    ),
    Question(
        "unrelated.PSR-1",
        "… of these, unrelated",
        "PSR-1 on concepts that have nothing to do with the erased one.",
        PSR(1, roles=("unrelated",)),
        ("unrelated",),
        headline=True,
    ),
    Question(
        "others.PSR-5",
        "Other concepts, a trace seen (PSR-5)",
        "The same as PSR-1, among the judge's five best guesses.",
        PSR(5),
        OTHERS,
    ),
    Question(
        "neighbour.PSR-5",
        "… of these, neighbours (PSR-5)",
        "PSR-5 on the concepts most like the erased one.",
        PSR(5, roles=("neighbour",), clusters="prompt"),
        ("neighbour",),
    ),
    Question(
        "unrelated.PSR-5",
        "… of these, unrelated (PSR-5)",
        "PSR-5 on concepts that have nothing to do with the erased one.",
        PSR(5, roles=("unrelated",)),
        ("unrelated",),
    ),
    Question(
        "pair.ESR-2",
        "In pairs: target gone",
        "Of the pictures that ask for the erased concept beside another (“a cat beside a dog”), the share in which the erased one "
        "is not among the judge's two best guesses.",
        ESR(2, roles=("pair",)),
        ("pair",),
        headline=True,
    ),
    Question(
        "pair.PSR-2",
        "In pairs: partner still there",
        "In the same pictures, the share in which the other one is among the judge's two best guesses.",
        PSR(2, roles=("pair",), clusters="prompt"),
        ("pair",),
        headline=True,
    ),
    Question(
        "target.blank",
        "Nothing recognised, target prompts",
        "The share of pictures in which the judge recognises nothing at all. Such a picture counts as erased: many of them mean a "
        "hole rather than a replacement.",
        Blank(roles=("target",)),
        ("target",),
    ),
    Question(
        "others.blank",
        "Nothing recognised, other prompts",
        "The same for everything else. Such a picture counts as not preserved: many of them mean a ruined model.",
        Blank(),
        OTHERS,
    ),
)

HARMONIC = Question(
    "overall.harmonic",
    "Erased and preserved at once (harmonic mean, H_o)",
    "The harmonic mean of ESR-1, of PSR-1 and, where prompts imply the erased concept without its name, of ESR-1 on these: it is low as "
    "soon as one of them is. MACE's H_o, where CLIP is the judge.",
    Harmonic(),
    ("target", "implied"),
    headline=True,
    optional=True,
)
"""Asked in the place of published tables that tell it: `objects`, and wherever CLIP judges both."""

QUALITY = (
    Question(
        "unrelated.frechet",
        "Fréchet distance to the un-erased model (×100), unrelated prompts",
        "How far the pictures of unrelated concepts moved as a whole, in the embedder's features: 0 is not at all. It is no FID, and "
        "compares only with values of as many pictures.",
        Frechet(("unrelated",)),
        ("unrelated",),
    ),
    Question(
        "unrelated.clip",
        "CLIP score, unrelated prompts",
        "100 times the cosine of picture and prompt in the embedder's space, for unrelated concepts. It should stay what it was before.",
        ClipScore(("unrelated",)),
        ("unrelated",),
    ),
    Question(
        "target.clip",
        "CLIP score, target prompts",
        "The same for prompts that ask for the erased concept. It falls where the picture leaves the prompt.",
        ClipScore(("target",)),
        ("target",),
    ),
)
"""Asked where an embedder looked."""


def _nothing(before: Samples, after: Samples) -> dict[str, Any]:
    return {}


def _silence(before: Samples, after: Samples) -> str:
    return ""


@dataclass(frozen=True)
class Asks:
    """What a protocol asks of what was drawn."""

    questions: tuple[Question, ...]
    """Asked where a detector looked."""
    quality: tuple[Question, ...] = ()
    """In units of their own."""
    by: Literal["detector", "embedder"] = "detector"
    """Which judge the questions need."""
    expects: tuple[Role, ...] = ()
    """Roles whose absence is told."""
    details: Callable[[Samples, Samples], Mapping[str, Any]] = _nothing
    """JSON values that fit no line, computed from the raw detections."""
    finding: Callable[[Samples, Samples], str] = _silence
    """What came out, in a sentence, where the erasure protocol's verdict does not fit."""
    pictures: bool = True
    """Whether pictures may be kept for people to look at; where they may show what nobody asked to see, only what was detected is kept."""


ERASURE = Asks(QUESTIONS, QUALITY, expects=("neighbour", "pair"))
"""What the protocol of the main job asks."""

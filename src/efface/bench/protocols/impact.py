"""Impact: what erasing one concept does to each other one, over groups of neighbours (the analysis behind AGE, arXiv 2501.18950).

    plan        prompts and seeds for every concept of some neighbour groups of the bundled world
    listed      the same from a file with a column of classes, for any other model; and who judges
    measure     draws them with the un-erased model and with each edit, from the same noise; a detector says in how many the concept is
    baselines   the fixed targets that the paper compares: synonym, neighbour, general word, unrelated concept, nothing

With G(j) the share of pictures of concept j in which the detector has j among its k best guesses (DS-k, the paper's k is 5),

    Δ(e, j) = G_0(j) − G_e(j)

is what the erasure of e takes from j: the erasure itself on the diagonal, damage elsewhere. The paper finds damage within a group and
little outside, Δ(e, j) ≠ Δ(j, e), and concepts that are weak before any erasure to be hurt by all. Its groups are five of five ImageNet
classes (`IMAGENET`, the authors' netfive_500.csv); the bundled world has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efface.bench import zeroshot
from efface.bench.draw import Drawing, Judges, draw
from efface.bench.emoji import Prompts, find
from efface.bench.listed import Rows
from efface.bench.options import Options
from efface.bench.plan import Plan, numbered
from efface.bench.prompts import Prompt
from efface.bench.questions import Asks
from efface.concepts.vocabulary import Vocabulary
from efface.core.edit import Edit
from efface.core.errors import EffaceError, InvalidTask
from efface.core.evidence import Contrast, Detector, Samples, Score, Shot
from efface.core.method import Method, Resources
from efface.core.model import Model
from efface.core.task import Concept, Swap, Task
from efface.evals.detectors.clip_zeroshot import ClipZeroShot, candidates

NETFIVE = ("feline", "road vehicle", "instrument", "building", "fruit")
"""The bundled groups nearest to the paper's: animals, vehicles, instruments, buildings, and a group of things."""
IMAGENET: Mapping[str, tuple[str, ...]] = {
    "spaniel": ("english springer", "clumber spaniel", "english setter", "blenheim spaniel", "border collie"),
    "truck": ("garbage truck", "moving van", "fire engine", "ambulance", "school bus"),
    "wind instrument": ("french horn", "bassoon", "trombone", "oboe", "saxophone"),
    "building": ("church", "monastery", "bell cote", "dome", "library"),
    "device": ("cassette player", "polaroid camera", "loudspeaker", "typewriter keyboard", "projector"),
}
"""The paper's five groups, each with the class that is erased first."""
RESNET = {"clumber spaniel": "clumber", "saxophone": "sax"}
"""Classes that torchvision's list has under another name."""
SLIPS = {"basson": "bassoon"}
"""Of the authors' files."""
NAME = "impact"
TOP = 5
"""k of the paper's figures."""
STEPS = 20
"""Of the sampler."""
Log = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """What one erasure took from one concept."""

    erased: str
    concept: str
    contrast: Contrast
    """The share seen before and after, and its change, which is −Δ."""

    @property
    def impact(self) -> float:
        """Δ, in shares: 0 nothing, 1 everything; below 0 where the concept is seen more often."""
        return -self.contrast.change.value


@dataclass(frozen=True)
class Impact:
    """The impact matrix."""

    groups: Mapping[str, tuple[str, ...]]
    """The concepts of each group, in order."""
    cells: tuple[Cell, ...]
    """Every erased concept against every concept."""
    k: int
    method: str

    @property
    def concepts(self) -> tuple[str, ...]:
        """All columns, group after group."""
        return tuple(name for names in self.groups.values() for name in names)

    @property
    def erased(self) -> tuple[str, ...]:
        """All rows."""
        return tuple(dict.fromkeys(cell.erased for cell in self.cells))

    def cell(self, erased: str, concept: str) -> Cell:
        """Raises KeyError where it was not measured."""
        found = next((c for c in self.cells if (c.erased, c.concept) == (erased, concept)), None)
        if found is None:
            raise KeyError(f"the impact of erasing {erased!r} on {concept!r} was not measured")
        return found

    def before(self, concept: str) -> Score:
        """G_0 of a concept. Raises KeyError where it was not measured."""
        found = next((cell.contrast.before for cell in self.cells if cell.concept == concept), None)
        if found is None:
            raise KeyError(f"{concept!r} was not measured")
        return found

    @property
    def erasure(self) -> float:
        """The mean of Δ(e, e); NaN where there is none, as for the others."""
        return _mean([c.impact for c in self.cells if c.erased == c.concept])

    @property
    def within(self) -> float:
        """The mean of Δ(e, j) over other concepts j of the group of e."""
        return _mean([c.impact for c in self.cells if c.erased != c.concept and self._together(c)])

    @property
    def across(self) -> float:
        """The mean of Δ(e, j) over concepts of other groups."""
        return _mean([c.impact for c in self.cells if not self._together(c)])

    @property
    def asymmetry(self) -> float:
        """The mean of |Δ(e, j) − Δ(j, e)| over pairs of which both were erased."""
        found = {(c.erased, c.concept): c.impact for c in self.cells}
        return _mean([abs(found[pair] - found[pair[::-1]]) for pair in found if pair[0] < pair[1] and pair[::-1] in found])

    def _together(self, cell: Cell) -> bool:
        return any(cell.erased in names and cell.concept in names for names in self.groups.values())

    def json(self) -> dict[str, Any]:
        """JSON values: the matrix with intervals, and what it comes to; None for a mean of nothing."""
        rows = [
            {"erased": c.erased, "concept": c.concept, "impact": c.impact}
            | {side: _ends(getattr(c.contrast, side)) for side in ("before", "after", "change")}
            for c in self.cells
        ]
        values = {name: getattr(self, name) for name in ("erasure", "within", "across", "asymmetry")}
        means = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {"method": self.method, "k": self.k, "groups": {n: list(v) for n, v in self.groups.items()}, "means": means, "cells": rows}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _ends(score: Score) -> dict[str, float]:
    return {"value": score.value, "low": score.low, "high": score.high, "n": score.n, "undetermined": score.undetermined}


def plan(world: Vocabulary, groups: Sequence[str] = NETFIVE, *, each: int = 20, seed: int = 0) -> Plan:
    """`each` pictures of every object of some neighbour groups. Raises InvalidTask for an unknown group, ValueError for a bad number."""
    if each < 1:
        raise ValueError(f"each was {each}; expected at least one picture a concept")
    prompts = Prompts(world, seed)
    shots = [shot for name in objects(world, groups) for shot in prompts.of_objects([name], each, "unrelated")]
    return Plan(f"impact/{world.name}", numbered(shots, seed), seed, STEPS)


def listed(options: Options) -> tuple[Plan, Detector, dict[str, tuple[str, ...]]]:
    """What a file of prompts with a column of classes draws with any model; ResNet-50 or CLIP; and the classes by groups of `IMAGENET`.

    A class that is in none of the groups is a group by itself. Raises EffaceError for a file that is missing, broken or without classes."""
    rows = Rows.of(NAME, "full", options, wanted=lambda row: bool(row.concept), why="name no class, in a column such as 'label_str'")
    names = dict.fromkeys(_spelled(row.concept) for row in rows.chosen)
    groups = {group: tuple(name for name in members if name in names) for group, members in IMAGENET.items()}
    alone = {name: (name,) for name in names if not any(name in members for members in groups.values())}
    other = {} if options.detector else RESNET  # CLIP's candidates are the classes themselves

    def shots(row: Prompt) -> list[Shot]:
        name = _spelled(row.concept)
        return [Shot(row.text, 0, "unrelated", name, (other.get(name, name),))]

    plan = rows.plan(NAME, "full", options, Asks(()), shots)
    return plan, _judge(options, names), {group: members for group, members in (groups | alone).items() if members}


def _spelled(name: str) -> str:
    """As `IMAGENET` has it."""
    return SLIPS.get(name.lower(), name.lower())


def _judge(options: Options, names: Iterable[str]) -> Detector:
    if options.detector:
        clip = zeroshot.own(options, bundled=False)
        return ClipZeroShot(clip, clip.scale, candidates((name, "object") for name in names))
    from efface.evals.detectors.imagenet import ImageNet

    return ImageNet.load(options.resnet)


def objects(world: Vocabulary, groups: Sequence[str]) -> list[str]:
    """The objects of some groups, in order. Raises InvalidTask for an unknown group."""
    for group in groups:
        if find(world, Concept(group))[0] != "group":
            raise InvalidTask(f"{group!r} is no neighbour group; the groups are {', '.join(g.name for g in world.groups)}")
    return [name for group in groups for g in world.groups if g.name == group for name in g.objects]


def members(world: Vocabulary, groups: Sequence[str] = NETFIVE) -> dict[str, tuple[str, ...]]:
    """The objects of each group. Raises InvalidTask for an unknown one."""
    return {group: tuple(objects(world, [group])) for group in groups}


def measure(
    model: Model,
    edits: Iterable[tuple[str, Edit]],
    groups: Mapping[str, Sequence[str]],
    *,
    plan: Plan,
    detector: Detector,
    k: int = TOP,
    before: Drawing | None = None,
    log: Log = lambda line: None,
) -> Impact:
    """The impact of each edit, given as (what it erases, edit), on every concept of the plan.

    groups: which concepts are neighbours: `members` of the bundled world, or what `listed` returns.
    edits: may be made one after the other, such as by `fitted`; none is kept. before: what the un-erased model drew for this very plan
    with this detector; drawn here where it is not given. Raises Undetermined, Unsupported, what `attach` raises,
    and EffaceError for no edit."""
    judges = Judges(detector)
    judges.require(plan)
    first, cells, methods = before or draw(model, plan, judges), list[Cell](), list[str]()
    for name, edit in edits:
        log(f"drawing without {name}")
        with edit.attach(model):
            cells += _row(name, first, draw(model, plan, judges), k, plan.seed)
        methods.append(edit.card.method)
    if not methods:
        raise EffaceError("no edit was given, whose impact could be measured; give at least one")
    return Impact({group: tuple(names) for group, names in groups.items()}, tuple(cells), k, "; ".join(dict.fromkeys(methods)))


def fitted(
    model: Model, method: Method, tasks: Iterable[Task], *, seed: int = 0, resources: Resources = Resources(), log: Log = lambda line: None
) -> Iterator[tuple[str, Edit]]:
    """Fits the method for one task after the other; yields the target's name and the edit."""
    for task in tasks:
        log(f"fitting {task}")
        yield task.targets[0].name, method.fit(model, task, seed=seed, resources=resources)


def _row(erased: str, before: Drawing, after: Drawing, k: int, seed: int) -> list[Cell]:
    shots, cells = before.samples.shots, []
    for concept in dict.fromkeys(shot.concept for shot in shots):
        rows = [i for i, shot in enumerate(shots) if shot.concept == concept]
        old, new = (_seen(side.samples.rows(rows), k) for side in (before, after))
        prompts = [shots[i].prompt for i in rows]
        cells.append(Cell(erased, concept, Contrast.shares(f"DS-{k}", old, new, prompts, "neither", seed=seed)))
    return cells


def _seen(samples: Samples, k: int) -> list[bool | None]:
    return [sighting.shows(shot.labels, k) for shot, sighting in zip(samples.shots, samples.sightings, strict=True)]


def baselines(world: Vocabulary, name: str, *, synonym: str = "") -> dict[str, Task]:
    """The same erasure with each of the paper's fixed targets as its anchor: for methods that map a concept to its anchor.

    "neighbour" is the next object of its group, "general" the group's word, "unrelated" the first object of the next group, "empty"
    nothing; "synonym" only where one is given, since the bundled world has none. Raises InvalidTask for an unknown object."""
    sort, known = find(world, Concept(name))
    if sort != "object":
        raise InvalidTask(f"{name!r} is no object of the bundled world; give one, such as {world.objects[0]!r}")
    group = world.group_of(known)
    following = world.groups[(world.groups.index(group) + 1) % len(world.groups)]
    near = group.objects[(group.objects.index(known) + 1) % len(group.objects)]
    targets = {"synonym": synonym, "neighbour": near, "general": group.name, "unrelated": following.objects[0], "empty": ""}
    concept = Concept(known, group.kind)  # type: ignore[arg-type]
    anchors = {kind: Concept(word) if word else Concept.nothing() for kind, word in targets.items() if word or kind == "empty"}
    return {kind: Task((Swap(concept, anchor),)) for kind, anchor in anchors.items()}

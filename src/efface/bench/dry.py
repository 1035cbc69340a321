"""A dry run: every method of a grid once, on the bundled model, through the same code, in seconds and with nothing to compare.

What changes: the model; concepts that its world does not know (each stands for one of the same kind); every field that counts steps,
batches or pictures (`conformance.case.COUNTS`); the pictures drawn, and their steps. What stays: the methods, the protocol, its reader, its
detectors, its questions, and the way of the records. A file of prompts that is not at hand is replaced by a small one, in the same form.
Of attacks, each method meets one and each attack meets a method.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from efface.bench import general
from efface.bench.conformance.case import COUNTS, FEW, PRESET
from efface.bench.draw import Judges
from efface.bench.emoji import find
from efface.bench.options import Options
from efface.bench.plan import Plan
from efface.bench.protocols import erasure, registry
from efface.bench.trial import Sweep, Trial
from efface.concepts.vocabulary import Vocabulary, read
from efface.core import catalog, search
from efface.core.errors import EffaceError, InvalidTask
from efface.core.method import Method, Resources
from efface.core.model import Model
from efface.core.task import Concept, Swap, Task

EACH = 2
"""Pictures of each role."""
PROMPTS = 4
"""Of a file."""
STEPS = 2
"""Of the sampler."""
ATTACKED = 8
"""The same where pictures are attacked: the un-erased model must draw something to learn from."""
MOVES = {"steps": 2, "batch": 2, "images": 4, "iterations": 2, "times": 2, "seeds": 1, "candidates": 1, "generations": 2, "population": 4}
"""To what the fields of an attack are lowered."""
LENIENT = {"max_unexplained": 1.0}
"""What a method demands of a trained part, which here is trained for a second."""


def sweep(asked: Sweep, folder: Path) -> Sweep:
    """The first task of every method, and of every attack. `folder` takes the stand-in for a file of prompts.

    Raises EffaceError where the world has too few concepts."""
    stand_ins = Cast(read(erasure.BUNDLED), [Task.parse(trial.task) for trial in asked.trials])
    first = {(trial.label, trial.options.attack): trial for trial in reversed(asked.trials)}
    labels, attacks = (list(dict.fromkeys(names)) for names in zip(*((t.label, t.options.attack) for t in asked.trials), strict=True))
    pairs = [(labels[i % len(labels)], attacks[i % len(attacks)]) for i in range(max(len(labels), len(attacks)))]
    return replace(asked, trials=tuple(_trial(first[pair], stand_ins, folder) for pair in pairs))


def given(trials: Sequence[Trial], model: Model) -> Resources:
    """Small trained parts for the methods that need some, made on the spot as `efface check` makes them."""
    assets: dict[str, Any] = {}
    for trial in trials:
        method = type(catalog.method(trial.method))
        if method.needs.assets:
            assets |= method.make_assets(model, Task.parse(trial.task))
    return Resources(assets=assets)


def setup(trial: Trial, task: Task) -> tuple[Plan, Judges]:
    """The protocol's plan, cut to the first shots of each role."""
    plan, judges = registry.find(trial.protocol).setup(trial.model, task, trial.images, trial.options)
    return plan if trial.options.attack else plan.only(plan.first(EACH)), judges


def small(method: Method) -> Method:
    """The method with whatever it counts lowered to a few; what its preset "check" lowers is lowered, too, and `LENIENT` allowed."""
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    check = {name: value for name, value in method.presets.get(PRESET, {}).items() if type(value) is int}
    most = {name: FEW for name in values if name.rpartition("_")[2] in COUNTS} | check
    lowered = {name: min(values[name], least) for name, least in most.items() if type(values[name]) is int}
    lenient = {name: value for name, value in LENIENT.items() if name in values}
    return replace(method, **lowered, **lenient)  # type: ignore[type-var]


def small_attack(text: str) -> str:
    """The text form of an attack with fewer and shorter moves; "" for none."""
    if not text:
        return ""
    attack = search.attack(text)
    values = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}  # type: ignore[arg-type]
    fewer = {name: min(values[name], most) for name, most in MOVES.items() if type(values.get(name)) is int}
    shorter = {
        name: tuple(min(part, FEW) if type(part) is int else part for part in value[:FEW])
        for name, value in values.items()
        if isinstance(value, tuple)
    }
    return str(replace(attack, **fewer, **shorter))  # type: ignore[type-var]


def _trial(trial: Trial, cast: Cast, folder: Path) -> Trial:
    protocol = registry.find(trial.protocol)
    task = cast.task(Task.parse(trial.task)) if protocol.own else Task.parse(trial.task)
    # Not `Trial.of`: it would work the preset of the target's kind into a text that is complete without.
    method = str(small(catalog.method(trial.method)))
    return replace(trial, model=erasure.BUNDLED, method=method, task=str(task), images="quick", options=_options(trial, protocol, folder))


def _options(trial: Trial, protocol: registry.Protocol, folder: Path) -> Options:
    given = trial.options
    guidance = None if protocol.own and given.guidance == "row" else given.guidance
    if given.attack:
        return Options(steps=ATTACKED, guidance=guidance, limit=EACH, detector=given.detector, attack=small_attack(given.attack))
    few = Options(steps=STEPS, guidance=guidance, detector=given.detector)
    if protocol.own or not given.prompts:
        return few
    path = Path(given.prompts)
    found = str(path) if path.is_file() else str(_written(folder / f"{path.name.split('.')[0]}.csv", Task.parse(trial.task)))
    return replace(few, prompts=found, limit=PROMPTS)


def _written(path: Path, task: Task) -> Path:
    """A file of prompts in ESD's form, about the task's targets."""
    shots = general.shots(task, general.Size(PROMPTS, 0, PROMPTS, 0))
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(("case_number", "prompt", "evaluation_seed", "evaluation_guidance", "class"))
        out.writerows((number, shot.prompt, number, 7.5, shot.concept) for number, shot in enumerate(shots))
    return path


class Cast:
    """Who of the bundled world stands for which concept of some tasks: always the same for one name, never the same for two."""

    def __init__(self, world: Vocabulary, tasks: Sequence[Task]) -> None:
        self.world = world
        self.parts: dict[tuple[str, str], str] = {}
        concepts = [concept for task in tasks for concept in (*task.targets, *task.keep)]
        self.themselves = {name for concept in concepts if (name := self._known(concept))}

    def task(self, task: Task) -> Task:
        """The task with concepts of the world; anchors, which may be any text, stay unless they would be the target itself."""
        swaps = [Swap(self.concept(s.target), s.anchor) for s in task.erase]
        swaps = [s if s.anchor.key != s.target.key else Swap(s.target) for s in swaps]
        return Task(tuple(swaps), tuple(self.concept(c) for c in task.keep))

    def concept(self, concept: Concept) -> Concept:
        """Itself where the world knows it, else one of its kind. Raises EffaceError where none is left."""
        known, key = self._known(concept), (concept.kind, concept.key)
        if known:
            return Concept(known, concept.kind)
        if key not in self.parts:
            taken = {*self.parts.values(), *self.themselves}
            self.parts[key] = next((name for name in self._names(concept.kind) if name not in taken), "")
            if not self.parts[key]:
                raise EffaceError(
                    f"a dry run has no stand-in left for {concept.name!r}: the bundled world has too few of kind {concept.kind!r}"
                )
        return Concept(self.parts[key], concept.kind)

    def _known(self, concept: Concept) -> str:
        try:
            return find(self.world, concept)[1]
        except InvalidTask:
            return ""

    def _names(self, kind: str) -> Iterator[str]:
        if kind == "style":
            yield from (style.name for style in self.world.styles)
            return
        groups: Sequence[Sequence[str]] = [g.objects for g in self.world.groups if g.kind == (kind if kind != "other" else "object")]
        for place in range(max(map(len, groups))):
            yield from (group[place] for group in groups if place < len(group))

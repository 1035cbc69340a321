"""The protocol of the main job: is the target gone, are its relatives and everything else still there, and what moved.

    plan      prompts and seeds: the target in many forms, its neighbours, unrelated concepts, the target beside another
    measure   draws them un-erased and erased from the same noise, has a detector look at both, and computes all scores

Every picture's raw detections are kept, so that any other k or threshold can be computed without drawing again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efface.bench import emoji, general
from efface.bench.plan import Plan, numbered
from efface.bench.questions import OTHERS, QUESTIONS, TITLES
from efface.bench.result import Change, ConceptLine, Line, Pictures, Result, Settings
from efface.concepts.vocabulary import Vocabulary
from efface.core.card import versions
from efface.core.edit import Edit
from efface.core.evidence import Detector, Samples, Score, Shot, Sighting, check_determined
from efface.core.method import Report, silent
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.metrics.psr import PSR
from efface.ops.intervals import bootstrap, number

BATCH = 64
"""Pictures drawn at once: two cores reach their full speed from 64 samples in a batch on."""
STEPS = 20
"""Of the sampler, for the bundled model."""


def plan(task: Task, *, size: str = "quick", world: Vocabulary | None = None, seed: int = 0) -> Plan:
    """The pictures to draw for a task.

    Args:
        task: what was erased, and what was to be kept.
        size: "quick" (some 220 prompts of the bundled world, for a demonstration) or "full" (some 540, for claims).
        world: the words that the model knows, for the bundled model; None for any other model.
        seed: of the choice of prompts and of every picture's noise.

    Raises ValueError for an unknown size or a negative seed, InvalidTask for a target that the world does not know."""
    if size not in emoji.SIZES:
        raise ValueError(f"size was {size!r}; expected one of {', '.join(emoji.SIZES)}")
    if world is None:
        return Plan(f"erasure/general/{size}", numbered(general.shots(task, general.SIZES[size]), seed), seed)
    shots, left_out = emoji.shots(task, world, emoji.SIZES[size], seed)
    return Plan(f"erasure/{world.name}/{size}", numbered(shots, seed), seed, STEPS, None, tuple(left_out))


def measure(
    model: Model, edit: Edit, task: Task, *, plan: Plan, detector: Detector | None = None, report: Report = silent, check: bool = True
) -> Result:
    """Draws the plan's pictures with and without the edit, from the same noise, and measures what changed.

    Args:
        detector: says what stands in a picture; None leaves pictures and their change only, and says so.
        report: called with the pictures drawn so far and in all.
        check: as in `Edit.attach`; False is for controls that change nothing.

    Raises Undetermined when the detector fails on too many pictures, Unsupported when it lacks a label, and what `attach` raises."""
    if detector is not None:
        for kind in sorted({shot.kind for shot in plan.shots}):
            detector.require(sorted(_asked(plan, kind)), kind)
    spent, started = model.meter.read(), time.perf_counter()
    total = 2 * len(plan.shots)
    before = draw(model, plan, detector, lambda done: report(done, total, {}))
    with edit.attach(model, check=check):
        after = draw(model, plan, detector, lambda done: report(total // 2 + done, total, {}))
    now = model.meter.read()
    cost = {name: now[name] - spent[name] for name in ("forwards", "calls")} | {"seconds": round(time.perf_counter() - started, 3)}
    return Result(
        model=model.id,
        method=edit.card.method,
        task=str(task),
        settings=_settings(model, plan, detector),
        lines=tuple(scores(before, after, seed=plan.seed)) if detector else (),
        concepts=tuple(by_concept(before, after, task, seed=plan.seed)) if detector else (),
        changes=tuple(changes(before, after, seed=plan.seed)),
        unmeasured=(*_unmeasured(plan, detector), *plan.unmeasured),
        before=Samples(before.shots, before.sightings),
        after=Samples(after.shots, after.sightings),
        cost=cost,
        pictures=_pictures(before, after, plan.shown()),
    )


def draw(model: Model, plan: Plan, detector: Detector | None = None, done: Callable[[int], None] = lambda done: None) -> Samples:
    """Draws and judges the plan's pictures with the model as it stands. Raises Undetermined."""
    images, sightings = [], []
    for start in range(0, len(plan.shots), BATCH):
        shots = plan.shots[start : start + BATCH]
        seeds = [shot.seed for shot in shots]
        drawn = model.sample([s.prompt for s in shots], seeds=seeds, steps=plan.steps, guidance=plan.guidance, batch=BATCH)
        sightings += look(detector, drawn, shots) if detector else []
        images.append((drawn.nan_to_num() * 255).round().to(torch.uint8))
        done(start + len(shots))
    check_determined(sightings)
    return Samples(plan.shots, tuple(sightings), torch.cat(images))


def look(detector: Detector, images: Tensor, shots: tuple[Shot, ...]) -> list[Sighting]:
    """One sighting for each image, each looked at for the kind of concept that its prompt asks for."""
    found: dict[int, Sighting] = {}
    for kind in {shot.kind for shot in shots}:
        rows = [i for i, shot in enumerate(shots) if shot.kind == kind]
        found |= dict(zip(rows, detector.look(images[rows], kind), strict=True))
    return [found[i] for i in range(len(shots))]


def scores(before: Samples, after: Samples, *, seed: int = 0) -> list[Line]:
    """Every question whose roles occur, answered."""
    roles = {shot.role for shot in before.shots}
    asked = [q for q in QUESTIONS if roles & set(q.roles)]
    return [Line(q.key, q.title, q.explanation, q.metric.measure(before, after, seed=seed), q.headline) for q in asked]


def by_concept(before: Samples, after: Samples, task: Task, *, seed: int = 0) -> list[ConceptLine]:
    """PSR-1 of each concept that must stay, the most surely hurt first: by the upper end of its change, then by its change."""
    kept = {concept.key for concept in task.keep}
    lines = []
    for concept, role in dict.fromkeys((s.concept, s.role) for s in before.shots if s.role in OTHERS):
        rows = [i for i, s in enumerate(before.shots) if (s.concept, s.role) == (concept, role)]
        contrast = PSR(1, roles=OTHERS, clusters="prompt").measure(_rows(before, rows), _rows(after, rows), seed=seed)
        lines.append(ConceptLine(concept, role, concept.casefold() in kept, contrast))
    return sorted(lines, key=lambda line: (line.contrast.change.high, line.contrast.change.value))


def changes(before: Samples, after: Samples, *, seed: int = 0) -> list[Change]:
    """How far the pictures of each role moved. Needs the images of both."""
    if before.images is None or after.images is None:
        raise ValueError("the change of pictures needs the pictures; pass samples that still hold their images")
    found = []
    for role in dict.fromkeys(shot.role for shot in before.shots):
        rows = [i for i, shot in enumerate(before.shots) if shot.role == role]
        old, new = before.images[rows].float() / 255, after.images[rows].float() / 255
        prompts = number([before.shots[i].prompt for i in rows])
        found.append(Change(role, _distance(TITLES[role], old, new, prompts, seed), float(_rms(old, old.roll(1, 0)).mean())))
    return found


def _distance(name: str, old: Tensor, new: Tensor, clusters: Tensor, seed: int) -> Score:
    values = _rms(old, new)
    low, high = bootstrap(values, torch.ones(len(values)), clusters, generator=seeded(seed))
    return Score(name, float(values.mean()), low, high, len(values), "neither", "rms", items=tuple(round(v, 5) for v in values.tolist()))


def _rms(a: Tensor, b: Tensor) -> Tensor:
    """(b,): root mean square over channels and pixels."""
    return (a - b).square().mean(dim=(1, 2, 3)).sqrt()


def _rows(samples: Samples, rows: list[int]) -> Samples:
    return Samples(tuple(samples.shots[i] for i in rows), tuple(samples.sightings[i] for i in rows))


def _asked(plan: Plan, kind: str) -> set[str]:
    shots = [shot for shot in plan.shots if shot.kind == kind]
    return {label for shot in shots for label in (*shot.labels, *([shot.partner] if shot.partner else []))}


def _settings(model: Model, plan: Plan, detector: Detector | None) -> Settings:
    seeds = [shot.seed for shot in plan.shots]
    return Settings(
        protocol=plan.name,
        prompts=plan.digest,
        seed=plan.seed,
        first_seed=min(seeds),
        last_seed=max(seeds),
        images=2 * len(seeds),
        sampler=model.sampler,
        steps=model.default_steps if plan.steps is None else plan.steps,
        guidance=model.default_guidance if plan.guidance is None else plan.guidance,
        detector=None if detector is None else _described(detector, plan),
        versions=versions(),
    )


def _described(detector: Detector, plan: Plan) -> dict[str, Any]:
    thresholds = {kind: detector.threshold(kind) for kind in sorted({shot.kind for shot in plan.shots})}
    return {"name": detector.name, "version": detector.version, "thresholds": thresholds}


def _unmeasured(plan: Plan, detector: Detector | None) -> list[str]:
    missing = [f"No prompt shows {TITLES[role]}." for role in ("neighbour", "pair") if role not in plan.roles]
    if detector is None:
        missing.insert(0, "Whether the concept is gone and the others are still there: no detector looked, so judge the pictures by eye.")
    return [*missing, "Whether an attack brings the concept back."]


def _pictures(before: Samples, after: Samples, rows: tuple[int, ...]) -> Pictures | None:
    if before.images is None or after.images is None:
        return None
    return Pictures(rows, before.images[list(rows)], after.images[list(rows)])

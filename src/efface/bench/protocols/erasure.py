"""The protocol of the main job: is the target gone, are its relatives and everything else still there, and what moved.

    plan             prompts and seeds: the target in many forms, its neighbours, 30 unrelated concepts, the target beside another
    measure          draws them un-erased and erased from the same noise, has a detector look at both, and computes all scores
    measure_models   the same for two models, of which one was changed by whatever means
    recompute        computes the scores again from what was seen, without drawing

Every picture's raw detections are kept, so that any other k or threshold can be computed without drawing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from efface.bench import emoji, general, zeroshot
from efface.bench.draw import UNJUDGED, Drawing, Judges, draw
from efface.bench.options import DEFAULT, Options
from efface.bench.plan import Plan, numbered
from efface.bench.questions import ERASURE, OTHERS, TITLES, Asks, Question
from efface.bench.result import Change, ConceptLine, Line, Pictures, Result, Settings
from efface.bench.store import Store
from efface.concepts.vocabulary import Vocabulary, read
from efface.core.card import Match, versions
from efface.core.edit import Edit
from efface.core.errors import Undetermined
from efface.core.evidence import Detector, Embedder, Samples, Score
from efface.core.method import Report, silent
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.metrics.esr import ESR
from efface.evals.metrics.psr import PSR
from efface.ops.intervals import bootstrap, number

STEPS = 20
"""Of the sampler, for the bundled model."""
UNHELD = "How far the pictures moved by pixels: they were judged one after another and not held."
BUNDLED = "emoji"
"""The model whose words and judge are known."""


def plan(task: Task, *, size: str = "quick", world: Vocabulary | None = None, seed: int = 0, unrelated: Sequence[str] = ()) -> Plan:
    """The pictures to draw for a task.

    Args:
        task: what was erased, and what was to be kept.
        size: "quick" (some 200 prompts of the bundled world, for a demonstration) or "full" (some 540, for claims).
        world: the words that the model knows, for the bundled model; None for any other model.
        seed: of the choice of prompts and of every picture's noise.
        unrelated: the unrelated concepts; empty for the protocol's own choice, which depends on the task.

    Raises ValueError for an unknown size or a negative seed, InvalidTask for a target that the world does not know, or an unrelated
    concept that it does not know or that is related."""
    if size not in emoji.SIZES:
        raise ValueError(f"size was {size!r}; expected one of {', '.join(emoji.SIZES)}")
    if world is None:
        return Plan(f"erasure/general/{size}", numbered(general.shots(task, general.SIZES[size], unrelated), seed), seed)
    shots, left_out = emoji.shots(task, world, emoji.SIZES[size], seed, unrelated)
    return Plan(f"erasure/{world.name}/{size}", numbered(shots, seed), seed, STEPS, None, tuple(left_out))


def setup(
    model: str, task: Task, *, size: str = "quick", seed: int = 0, unrelated: Sequence[str] = (), options: Options = DEFAULT
) -> tuple[Plan, Judges]:
    """What to draw with the model of an id, and who looks: the bundled model has its world's words, judge and CLIP, others none.

    `options` may ask for CLIP as the judge: on any other model between what is drawn and the anchors, so that Concept Ablation's figures
    and MACE's are measured; the un-erased model tells how far it can be trusted.

    Raises as `plan`; FileNotFoundError without the bundled weights; InvalidModel for a CLIP, EffaceError for too few candidates."""
    if options.detector:
        world = read(BUNDLED) if model == BUNDLED else None
        planned = plan(task, size=size, world=world, seed=seed, unrelated=unrelated)
        return zeroshot.judged(planned, task, zeroshot.among(planned, task, world), zeroshot.own(options, world is not None))
    if model != BUNDLED:
        return plan(task, size=size, seed=seed, unrelated=unrelated), Judges()
    from efface.evals.detectors.emoji import EmojiJudge
    from efface.evals.detectors.emoji_clip import EmojiClip

    planned = plan(task, size=size, world=read(BUNDLED), seed=seed, unrelated=unrelated)
    return planned, Judges(EmojiJudge.load(), EmojiClip.load())


def measure(
    model: Model,
    edit: Edit,
    task: Task,
    *,
    plan: Plan,
    detector: Detector | None = None,
    embedder: Embedder | None = None,
    report: Report = silent,
    check: bool = True,
    match: Match = "exact",
    store: Store | None = None,
    before: Drawing | None = None,
) -> Result:
    """Draws the plan's pictures with and without the edit, from the same noise, and measures what changed.

    Args:
        detector: says what stands in a picture; None leaves pictures and their change only, and says so.
        embedder: puts pictures and prompts into one space, for CLIP score and Fréchet distance.
        report: called with the pictures drawn so far and in all.
        check, match: as in `Edit.attach`; check=False is for controls that change nothing.
        store: keeps every batch, and gives those that an interrupted run of the same measurement kept.
        before: what the un-erased model drew for this very plan with these judges; drawn here where it is not given.

    Raises Undetermined when the detector fails on too many pictures, Unsupported when it lacks a label, and what `attach` raises."""
    judges, half = Judges(detector, embedder), len(plan.shots)
    judges.require(plan)
    first = before or draw(model, plan, judges, _told(report, 0, 2 * half), store=store)
    settings = _settings(model, plan, judges)
    with edit.attach(model, match=match, check=check):
        second = draw(model, plan, judges, _told(report, half, 2 * half), store=store, side="after")
    return _result(model.id, edit.card.method, task, settings, plan, judges, first, second)


def measure_models(
    original: Model,
    changed: Model,
    task: Task,
    *,
    plan: Plan,
    judges: Judges = UNJUDGED,
    report: Report = silent,
    store: Store | None = None,
) -> Result:
    """The same for two models: an original, and one that was changed by whatever means, such as somebody else's erased weights.

    Raises as `measure`."""
    judges.require(plan)
    half = len(plan.shots)
    first = draw(original, plan, judges, _told(report, 0, 2 * half), store=store)
    second = draw(changed, plan, judges, _told(report, half, 2 * half), store=store, side="after")
    settings = _settings(original, plan, judges)
    return _result(original.id, f"the weights of {changed.id}", task, settings, plan, judges, first, second)


def recompute(result: Result, *, threshold: float | None = None, asks: Asks = ERASURE) -> Result:
    """The scores of a result, computed again from the raw detections that it holds; nothing is drawn.

    Without arguments they are those of the result itself. What needs the pictures (their change, LPIPS) or their features (distances) is
    taken over as it is, and so is the finding of an embedder.

    Args:
        threshold: the score from which on a label counts as seen, in place of the detector's own; 0 to 1.
        asks: what the result's protocol asks.

    Raises ValueError for a result without detections and agreements, for a threshold out of range, or one where no detector looked."""
    looked = result.before.holds("sightings")
    if not looked and not result.before.holds("agreement"):
        raise ValueError("the result holds no detections, since no detector and no embedder looked; measure again with one")
    if threshold is not None and not looked:
        raise ValueError(f"threshold was {threshold}, and no detector looked that could have one; leave it out")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold was {threshold}; expected a score from 0 to 1")
    before, after = (_cut(side, threshold) for side in (result.before, result.after))
    seed = result.settings.seed
    return replace(
        result,
        lines=_again(result.lines, asks.questions, before, after, seed),
        concepts=tuple(by_concept(before, after, Task.parse(result.task), seed=seed)) if looked else result.concepts,
        quality=_again(result.quality, asks.quality, before, after, seed),
        before=before,
        after=after,
        details={**result.details, **asks.details(before, after)},
        finding=asks.finding(before, after) if asks.by == "detector" else result.finding,
    )


def _again(lines: Sequence[Line], questions: Sequence[Question], before: Samples, after: Samples, seed: int) -> tuple[Line, ...]:
    """The lines, with those answered again that the samples can answer; what had no answer before may have one now, and the reverse."""
    asked = [q for q in questions if before.holds(q.metric.needs)]
    found = {line.key: line for line in answers(asked, before, after, seed)}
    open_ = {q.key for q in asked} - found.keys()
    return tuple(({line.key: line for line in lines if line.key not in open_} | found).values())


def _cut(samples: Samples, threshold: float | None) -> Samples:
    if threshold is None:
        return samples
    return replace(samples, sightings=tuple(replace(s, threshold=threshold) for s in samples.sightings))


def _told(report: Report, start: int, total: int) -> Callable[[int], None]:
    return lambda done: report(start + done, total, {})


def _result(model: str, method: str, task: Task, settings: Settings, plan: Plan, judges: Judges, first: Drawing, second: Drawing) -> Result:
    before, after, asks = first.samples, second.samples, plan.asks
    held = before.images is not None and after.images is not None
    looked = (judges.detector if asks.by == "detector" else judges.embedder) is not None
    lines = answers(asks.questions, before, after, plan.seed) if looked else []
    source = {"prompts": {**plan.source, "cases": list(plan.cases)}} if plan.source else {}
    return Result(
        model=model,
        method=method,
        task=str(task),
        settings=settings,
        lines=tuple(lines),
        concepts=tuple(by_concept(before, after, task, seed=plan.seed)) if judges.detector else (),
        changes=tuple(changes(before, after, seed=plan.seed)) if held else (),
        unmeasured=(*_unmeasured(plan, judges, lines), *plan.unmeasured, *([] if held else [UNHELD])),
        before=_seen(before),
        after=_seen(after),
        cost={name: round(first.cost[name] + second.cost[name], 3) for name in first.cost},
        pictures=_pictures(first, second, plan.shown()) if asks.pictures else None,
        quality=tuple(answers(asks.quality, before, after, plan.seed)) if judges.embedder else (),
        details={**source, **(asks.details(before, after) if looked else {})},
        finding=asks.finding(before, after) if looked else "",
    )


def _seen(samples: Samples) -> Samples:
    """Without pictures and features, which are too large to keep."""
    return replace(samples, images=None, features=None)


def scores(before: Samples, after: Samples, *, seed: int = 0) -> list[Line]:
    """Every question of the main job whose roles occur, answered."""
    return answers(ERASURE.questions, before, after, seed)


def answers(questions: Iterable[Question], before: Samples, after: Samples, seed: int = 0) -> list[Line]:
    """Those of the questions whose roles occur, answered. Raises Undetermined but for an optional one, which is left out."""
    roles, lines = {shot.role for shot in before.shots}, []
    for q in questions:
        if not roles & set(q.roles):
            continue
        try:
            lines.append(Line(q.key, q.title, q.explanation, q.metric.measure(before, after, seed=seed), q.headline))
        except Undetermined:
            if not q.optional:
                raise
    return lines


def by_concept(before: Samples, after: Samples, task: Task, *, seed: int = 0) -> list[ConceptLine]:
    """PSR-1 of each concept that must stay, the most surely hurt first: by the upper end of its change, then by its change."""
    kept = {concept.key for concept in task.keep}
    lines = []
    for concept, role in dict.fromkeys((s.concept, s.role) for s in before.shots if s.role in OTHERS and s.labels):
        rows = [i for i, s in enumerate(before.shots) if (s.concept, s.role) == (concept, role)]
        contrast = PSR(1, roles=OTHERS, clusters="prompt").measure(before.rows(rows), after.rows(rows), seed=seed)
        lines.append(ConceptLine(concept, role, concept.casefold() in kept, contrast))
    return sorted(lines, key=lambda line: (line.contrast.change.high, line.contrast.change.value))


def changes(before: Samples, after: Samples, *, seed: int = 0) -> list[Change]:
    """How far the pictures of each role moved. Needs the images of both."""
    if before.images is None or after.images is None:
        raise ValueError("the change of pictures needs the pictures; pass samples that still hold their images")
    found = []
    for role in dict.fromkeys(shot.role for shot in before.shots):
        rows = [i for i, shot in enumerate(before.shots) if shot.role == role]
        old, new = before.images[rows], after.images[rows]
        prompts = number([before.shots[i].prompt for i in rows])
        found.append(Change(role, _distance(TITLES[role], old, new, prompts, seed), float(_rms(old, old.roll(1, 0)).mean())))
    return found


def _distance(name: str, old: Tensor, new: Tensor, clusters: Tensor, seed: int) -> Score:
    values = _rms(old, new)
    low, high = bootstrap(values, torch.ones(len(values)), clusters, generator=seeded(seed))
    return Score(name, float(values.mean()), low, high, len(values), "neither", "rms", items=tuple(round(v, 5) for v in values.tolist()))


def _rms(a: Tensor, b: Tensor) -> Tensor:
    """(b,): root mean square over channels and pixels of pictures in [0, 1], from uint8; one at a time, since large ones fill memory."""
    return torch.tensor([float((x.double() - y).square().mean().sqrt()) / 255 for x, y in zip(a, b, strict=True)])


def _settings(model: Model, plan: Plan, judges: Judges) -> Settings:
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
        detector=None if judges.detector is None else _described(judges.detector, plan),
        embedder=None if judges.embedder is None else {"name": judges.embedder.name, "version": judges.embedder.version},
        versions=versions(),
    )


def _described(detector: Detector, plan: Plan) -> dict[str, Any]:
    thresholds = {kind: detector.threshold(kind) for kind in sorted({shot.kind for shot in plan.shots})}
    return {"name": detector.name, "version": detector.version, "thresholds": thresholds}


def _unmeasured(plan: Plan, judges: Judges, lines: list[Line]) -> list[str]:
    missing = [f"No prompt shows {TITLES[role]}." for role in plan.asks.expects if role not in plan.roles]
    relative = {q.key for q in plan.asks.questions if isinstance(q.metric, ESR) and q.metric.relative and set(q.roles) & set(plan.roles)}
    if judges.detector is None and plan.asks.by == "detector":
        missing.insert(0, "Whether the concept is gone and the others are still there: no detector looked, so judge the pictures by eye.")
    elif relative and not any(line.key in relative for line in lines):
        missing.append("Relative ESR: the un-erased model itself drew the concept in no picture.")
    if judges.embedder is None and (plan.asks.quality or plan.asks.by == "embedder"):
        missing.append("CLIP score and Fréchet distance: no embedder looked.")
    return [*missing, "Whether an attack brings the concept back."]


def _pictures(first: Drawing, second: Drawing, rows: tuple[int, ...]) -> Pictures | None:
    if first.shown is None or second.shown is None:
        return None
    return Pictures(rows, first.shown, second.shown)

"""Draws the pictures of a plan with a model as it stands, and has a detector and an embedder look at them, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from efface.bench import raw
from efface.bench.plan import Plan
from efface.bench.store import Batch, Store
from efface.core.evidence import Detector, Embedder, Samples, Shot, Sighting, check_determined
from efface.core.model import Model

BATCH = 64
"""Pictures kept and judged at once, and drawn at once at most: two cores reach their full speed from 64 samples in a batch on."""
HELD = 2**32
"""Bytes of pictures that are held in memory at most: 5461 of 512×512. Of more, such as COCO's 30 000, those alone that people look at."""


@dataclass(frozen=True)
class Judges:
    """Who looks at the pictures; both may be missing."""

    detector: Detector | None = None
    embedder: Embedder | None = None

    def require(self, plan: Plan) -> None:
        """Raises Unsupported for a label of the plan that the detector lacks: it would never be seen, and so look erased."""
        if self.detector is not None:
            for kind in sorted({shot.kind for shot in plan.shots}):
                self.detector.require(sorted(_asked(plan, kind)), kind)


UNJUDGED = Judges()
"""Nobody looks."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """What one model drew, and what that took."""

    samples: Samples
    cost: dict[str, float] = field(default_factory=dict)
    """forwards, calls, seconds."""
    shown: Tensor | None = None
    """(m 3 h w) uint8: the pictures of `Plan.shown`."""


def draw(
    model: Model,
    plan: Plan,
    judges: Judges = UNJUDGED,
    done: Callable[[int], None] = lambda done: None,
    *,
    store: Store | None = None,
    side: str = "before",
) -> Drawing:
    """Draws and judges the plan's pictures. With a store each batch is kept, and taken from there where it was kept before.

    A batch holds the same shots whatever was kept, so a measurement that goes on gives the pictures of one that was never stopped.
    Raises Undetermined."""
    batches, shown = [], dict.fromkeys(plan.shown() if plan.asks.pictures else ())
    for start in range(0, len(plan.shots), BATCH):
        rows = range(start, min(start + BATCH, len(plan.shots)))
        batch = store.get(side, start) if store else None
        if batch is None:
            batch = _batch(model, plan.only(rows), judges)
            batch = batch if plan.asks.pictures else replace(batch, images=batch.images[:0])
            if store:
                store.put(side, start, batch)
        shown |= {row: batch.images[row - start].clone() for row in rows if row in shown}
        held = batch.images[:1].numel() * len(plan.shots) <= HELD
        batches.append(batch if held else replace(batch, images=batch.images[:0]))
        done(rows.stop)
    samples = _joined(plan, batches)
    check_determined(samples.sightings)
    cost = {name: sum(batch.cost[name] for batch in batches) for name in ("forwards", "calls", "seconds")}
    return Drawing(samples, cost, torch.stack([image for image in shown.values() if image is not None]) if shown else None)


def look(detector: Detector, images: Tensor, shots: tuple[Shot, ...]) -> list[Sighting]:
    """One sighting for each image, each looked at for the kind of concept that its prompt asks for; scores rounded for good."""
    found: dict[int, Sighting] = {}
    for kind in {shot.kind for shot in shots}:
        rows = [i for i, shot in enumerate(shots) if shot.kind == kind]
        found |= dict(zip(rows, detector.look(images[rows], kind), strict=True))
    return [raw.rounded(found[i]) for i in range(len(shots))]


def _batch(model: Model, plan: Plan, judges: Judges) -> Batch:
    before, started = model.meter.read(), time.perf_counter()
    images = _pictures(model, plan)
    after = model.meter.read()
    seen = tuple(look(judges.detector, images, plan.shots)) if judges.detector else ()
    prompts = [shot.prompt for shot in plan.shots]
    agreement, features = _embedded(judges.embedder, images, prompts) if judges.embedder else ((), None)
    cost = {name: after[name] - before[name] for name in ("forwards", "calls")}
    cost["seconds"] = round(time.perf_counter() - started, 3)
    return Batch((images.nan_to_num() * 255).round().to(torch.uint8), seen, agreement, features, cost)


def _pictures(model: Model, plan: Plan) -> Tensor:
    """One picture for each shot (b 3 h w). Shots of one prompt, seed and guidance, which differ in what is looked for, share theirs."""
    scales = plan.guidances or (plan.guidance,) * len(plan.shots)
    asked = [(shot.prompt, shot.seed, scale) for shot, scale in zip(plan.shots, scales, strict=True)]
    size = model.batch(BATCH)
    drawn: dict[tuple[str, int, float | None], Tensor] = {}
    for scale in dict.fromkeys(scales):
        wanted = list(dict.fromkeys(one for one in asked if one[2] == scale))
        prompts, seeds = [one[0] for one in wanted], [one[1] for one in wanted]
        drawn |= dict(zip(wanted, model.sample(prompts, seeds=seeds, steps=plan.steps, guidance=scale, batch=size), strict=True))
    return torch.stack([drawn[one] for one in asked])


def _embedded(embedder: Embedder, images: Tensor, prompts: list[str]) -> tuple[tuple[float, ...], Tensor]:
    features = embedder.embed_images(images.nan_to_num()).float().cpu()
    cosines = (features * embedder.embed_texts(prompts).float().cpu()).sum(-1)
    return tuple(round(value, raw.DIGITS) for value in cosines.tolist()), features


def _joined(plan: Plan, batches: list[Batch]) -> Samples:
    features = [batch.features for batch in batches if batch.features is not None]
    images = torch.cat([batch.images for batch in batches])
    return Samples(
        plan.shots,
        tuple(sighting for batch in batches for sighting in batch.sightings),
        images if len(images) == len(plan.shots) else None,
        tuple(value for batch in batches for value in batch.agreement),
        torch.cat(features) if features else None,
    )


def _asked(plan: Plan, kind: str) -> set[str]:
    shots = [shot for shot in plan.shots if shot.kind == kind]
    return {label for shot in shots for label in (*shot.labels, *([shot.partner] if shot.partner else []))}

"""Draws the pictures of a plan with a model as it stands, and has a detector and an embedder look at them, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from efface.bench import raw
from efface.bench.plan import Plan
from efface.bench.store import Batch, Store
from efface.core.evidence import Detector, Embedder, Samples, Shot, Sighting, check_determined
from efface.core.model import Model

BATCH = 64
"""Pictures drawn at once: two cores reach their full speed from 64 samples in a batch on."""


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
    batches = []
    for start in range(0, len(plan.shots), BATCH):
        shots = plan.shots[start : start + BATCH]
        batch = store.get(side, start) if store else None
        if batch is None:
            batch = _batch(model, plan, shots, judges)
            if store:
                store.put(side, start, batch)
        batches.append(batch)
        done(start + len(shots))
    samples = _joined(plan, batches)
    check_determined(samples.sightings)
    return Drawing(samples, {name: sum(batch.cost[name] for batch in batches) for name in ("forwards", "calls", "seconds")})


def look(detector: Detector, images: Tensor, shots: tuple[Shot, ...]) -> list[Sighting]:
    """One sighting for each image, each looked at for the kind of concept that its prompt asks for; scores rounded for good."""
    found: dict[int, Sighting] = {}
    for kind in {shot.kind for shot in shots}:
        rows = [i for i, shot in enumerate(shots) if shot.kind == kind]
        found |= dict(zip(rows, detector.look(images[rows], kind), strict=True))
    return [raw.rounded(found[i]) for i in range(len(shots))]


def _batch(model: Model, plan: Plan, shots: tuple[Shot, ...], judges: Judges) -> Batch:
    before, started = model.meter.read(), time.perf_counter()
    prompts, seeds = [shot.prompt for shot in shots], [shot.seed for shot in shots]
    images = model.sample(prompts, seeds=seeds, steps=plan.steps, guidance=plan.guidance, batch=BATCH)
    after = model.meter.read()
    seen = tuple(look(judges.detector, images, shots)) if judges.detector else ()
    agreement, features = _embedded(judges.embedder, images, prompts) if judges.embedder else ((), None)
    cost = {name: after[name] - before[name] for name in ("forwards", "calls")}
    cost["seconds"] = round(time.perf_counter() - started, 3)
    return Batch((images.nan_to_num() * 255).round().to(torch.uint8), seen, agreement, features, cost)


def _embedded(embedder: Embedder, images: Tensor, prompts: list[str]) -> tuple[tuple[float, ...], Tensor]:
    features = embedder.embed_images(images.nan_to_num()).float().cpu()
    cosines = (features * embedder.embed_texts(prompts).float().cpu()).sum(-1)
    return tuple(round(value, raw.DIGITS) for value in cosines.tolist()), features


def _joined(plan: Plan, batches: list[Batch]) -> Samples:
    features = [batch.features for batch in batches if batch.features is not None]
    return Samples(
        plan.shots,
        tuple(sighting for batch in batches for sighting in batch.sightings),
        torch.cat([batch.images for batch in batches]),
        tuple(value for batch in batches for value in batch.agreement),
        torch.cat(features) if features else None,
    )


def _asked(plan: Plan, kind: str) -> set[str]:
    shots = [shot for shot in plan.shots if shot.kind == kind]
    return {label for shot in shots for label in (*shot.labels, *([shot.partner] if shot.partner else []))}

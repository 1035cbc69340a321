"""What the tests of sweeps share: a real tiny model, a small plan, and real judges of little taste. Also run as a script, to be killed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

from efface.bench.draw import Judges
from efface.bench.plan import Plan
from efface.bench.protocols import erasure
from efface.bench.run import News, run
from efface.bench.trial import Trial
from efface.concepts.vocabulary import read
from efface.core.evidence import Detector, Embedder, Sighting
from efface.core.model import Model
from efface.core.task import Task
from efface.models.sd import StableDiffusion

WORLD = read()
TRIALS = tuple(Trial.of("tiny", "uce", task, seed) for seed in (0, 1) for task in ("cat", "dog"))


@dataclass(frozen=True)
class Brightness(Detector):
    """The order of the labels turns with the mean colour of the picture."""

    name = "brightness"
    digest: str = "1"

    @property
    def version(self) -> str:
        return self.digest

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return WORLD.objects

    def threshold(self, kind: str = "object") -> float:
        return 0.25

    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        starts = (images.mean(dim=(1, 2, 3)) * 1e4).long().tolist()
        rows = [tuple(WORLD.objects[(s + i) % 8] for i in range(5)) for s in starts]
        return [Sighting(row, (0.9, 0.5, 0.3, 0.2, 0.1), 0.25) for row in rows]


@dataclass(frozen=True)
class Colours(Embedder):
    """Mean colours of a picture's quarters, and letters of a text."""

    name = "colours"
    version = "1"

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(images, 2).flatten(1), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.tensor([[float(t.count(c)) for c in "aeioulnrstdg"] for t in texts]), dim=-1)


def load(name: str) -> Model:
    return StableDiffusion(tiny.pipeline(), id=name)


def setup(model: str, task: Task, images: str, *, digest: str = "1") -> tuple[Plan, Judges]:
    """The first three shots of each role, in two steps."""
    plan = erasure.plan(task, world=WORLD)
    small = replace(plan, shots=tuple(plan.shots[i] for i in plan.shown(3)), steps=2, guidance=2.0)
    return small, Judges(Brightness(digest), Colours())


def prepare(trial: Trial, task: Task, *, digest: str = "1") -> tuple[Plan, Judges]:
    """The same, as a sweep asks for it."""
    return setup(trial.model, task, trial.images, digest=digest)


def hang(news: News) -> None:
    """In the third trial, once its pictures are half drawn, says so and waits to be killed."""
    if news.number == 3 and news.stage == "draw":
        sys.stdout.write("in flight\n")
        sys.stdout.flush()
        time.sleep(600)


if __name__ == "__main__":
    run(TRIALS, Path(sys.argv[1]), load=load, setup=prepare, watch=hang)

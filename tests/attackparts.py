"""Eyes for the tests of attacks: real detectors of little taste, and two tiny models of the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import tiny
from torch import Tensor

from efface.core.evidence import Detector, Sighting
from efface.core.model import Model
from efface.core.task import Concept
from efface.models.sd import StableDiffusion

CAT = Concept("cat", prompts=("a cat", "a picture of a cat on a red car", "the animal"))
"""The last prompt lacks the name."""
QUICK = {
    "completion": "completion(shares=(0.0, 0.5))",
    "concept_inversion": "concept_inversion(steps=3, batch=2, images=4)",
    "inpainting": "inpainting",
    "latent_inversion": "latent_inversion(iterations=2)",
    "noise_probe": "noise_probe(etas=(1.0, 1.5), variances=(1.0,))",
    "p4d": "p4d(mode='K', iterations=4, candidates=2)",
    "random_tokens": "random_tokens(candidates=2)",
    "relearning": "relearning(checkpoints=(0, 1, 3), images=4, batch=2)",
    "ring_a_bell": "ring_a_bell(generations=4, population=6, candidates=2)",
    "seed_search": "seed_search(seeds=2)",
    "unlearndiffatk": "unlearndiffatk(times=2, iterations=2)",
}
"""Every attack, with settings for a second or two."""


@dataclass(frozen=True)
class Bright(Detector):
    """Sees a cat in a picture brighter than `limit`, else a dog."""

    limit: float
    name = "bright"
    version = "1"

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return ("cat", "dog")

    def threshold(self, kind: str = "object") -> float:
        return 0.5

    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        return [Sighting(("cat",) if value > self.limit else ("dog",), (0.9,), 0.5) for value in images.mean(dim=(1, 2, 3)).tolist()]


@dataclass
class Script(Detector):
    """Answers in the order of a list, whatever it is shown, and then no."""

    answers: list[bool | None]
    name = "script"
    version = "1"

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return ("cat", "dog")

    def threshold(self, kind: str = "object") -> float:
        return 0.5

    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        return [self.next() for _ in images]

    def next(self) -> Sighting:
        answer = self.answers.pop(0) if self.answers else False
        return Sighting() if answer is None else Sighting(("cat",) if answer else ("dog",), (0.9,), 0.5)


@dataclass(frozen=True)
class OnlyOriginals(Detector):
    """Sees the cat in the pictures that `model` itself draws of these prompts, and nowhere else: no attack can ever succeed."""

    pictures: Tensor
    name = "only-originals"
    version = "1"

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return ("cat", "dog")

    def threshold(self, kind: str = "object") -> float:
        return 0.5

    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        same = [bool(((image - self.pictures).abs().flatten(1).amax(1) < 1e-5).any()) for image in images]
        return [Sighting(("cat",) if hit else ("dog",), (0.9,), 0.5) for hit in same]


def tiny_model(**changes: object) -> Model:
    model = StableDiffusion(tiny.pipeline(), id="tiny")
    model.default_steps, model.default_guidance = 2, 2.0
    return model


def state(model: Model) -> dict[str, Tensor]:
    return {f"{name}.{key}": value.clone() for name, part in model.components.items() for key, value in part.state_dict().items()}

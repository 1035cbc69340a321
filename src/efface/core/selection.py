"""Choosing among several stages of a fit by looking at pictures: what a method is handed in `Resources.assets["validator"]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, final

import torch
from torch import nn

from efface.core.evidence import Detector
from efface.core.model import Model
from efface.core.task import Concept
from efface.core.textmaps import expanded
from efface.ops.overlay import swapped
from efface.ops.ridge import RightFactor

Factors = Mapping[tuple[str, ...], RightFactor]
"""W ↦ W (I + D) by the names of the maps that share D."""


@dataclass(frozen=True)
class Verdict:
    """What was seen of a model. Raises ValueError for a share outside 0 to 1."""

    target: float
    """The share of pictures in which an erased concept is seen, 0 to 1; lower is better."""
    kept: float | None = None
    """The share of pictures of other concepts in which these are seen, 0 to 1; None where nobody looked."""

    def __post_init__(self) -> None:
        for name in ("target", "kept"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"a verdict's share of {name!r} was {value}; expected a number from 0 to 1")


class Validator(Protocol):
    """Judges a model as it stands, with the candidate edit in place."""

    def __call__(self, model: Model) -> Verdict: ...


@final
@dataclass(frozen=True)
class PictureValidator:
    """A validator that draws prompts and asks a detector. What it draws is counted by the model's meter."""

    detector: Detector
    prompts: Sequence[tuple[str, Concept]]
    """(prompt, the erased concept that must not be seen in it)."""
    kept: Sequence[tuple[str, Concept]] = field(default=())
    """(prompt, the other concept that must be seen in it)."""
    seed: int = 0
    """Of the first picture; the others count up, the same for every model that is judged."""
    steps: int | None = None
    guidance: float | None = None

    def __call__(self, model: Model) -> Verdict:
        return Verdict(self._share(model, self.prompts), self._share(model, self.kept) if self.kept else None)

    @torch.no_grad()
    def _share(self, model: Model, prompts: Sequence[tuple[str, Concept]]) -> float:
        """Undetermined pictures count as seen where the target is sought, and as not seen elsewhere."""
        images = model.sample([prompt for prompt, _ in prompts], seed=self.seed, steps=self.steps, guidance=self.guidance)
        unknown = prompts is self.prompts
        seen = [self.detector.present(image[None], concept)[0] for image, (_, concept) in zip(images, prompts, strict=True)]
        return sum(unknown if s is None else s for s in seen) / len(seen)


class Contest:
    """The best stage of a closed-form edit so far, by a validator's verdicts; without one, the last.

    A stage is taken if the target is seen less than in the best so far, and the kept concepts at most `tolerated_drop` less than in the
    original model."""

    def __init__(self, model: Model, validator: Validator | None, tolerated_drop: float) -> None:
        self.model, self.validator, self.tolerated_drop = model, validator, tolerated_drop
        self.verdicts: list[dict[str, float | None]] = []
        """Of the original model, of the start, of each round."""
        self.best: Factors = {}
        self.chosen = -1
        """How many rounds the best stage has seen; 0 is the start."""
        self._stage = -1

    @property
    def won(self) -> bool:
        """Whether the target is seen no more."""
        return self.validator is not None and self.verdicts[self.chosen + 1]["target"] == 0

    def judge(self, factors: Factors) -> None:
        """Looks at the next stage: first the original model, then the start, then the rounds."""
        if self.validator is not None:
            verdict = self._look(self.validator, factors)
            self.verdicts.append({"target": verdict.target, "kept": verdict.kept})
        if self._stage <= 0 or self.validator is None or self._better():
            self.best, self.chosen = dict(factors), self._stage
        self._stage += 1

    def _look(self, validator: Validator, factors: Factors) -> Verdict:
        deltas = expanded(self.model, factors)
        slots = self.model.slots(deltas)
        weights = {n: (s.tensor.float() + deltas[n].to(s.tensor.device)).to(s.tensor.dtype) for n, s in slots.items()}
        with swapped(slots, {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}):
            return validator(self.model)

    def _better(self) -> bool:
        first, best, last = self.verdicts[0], self.verdicts[self.chosen + 1], self.verdicts[-1]
        tolerable = first["kept"] is None or last["kept"] is None or last["kept"] >= first["kept"] - self.tolerated_drop
        return tolerable and (last["target"] or 0) < (best["target"] or 0)

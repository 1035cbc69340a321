"""Controls: no methods, but what a benchmark must tell apart from one: nothing at all, and random weights.

In a grid they are rows like any other:

    methods = ["ap", "efface.bench.controls:Noop", "efface.bench.controls:Vandal"]

`Noop` changes nothing: it must erase nothing and lose nothing. `Vandal` puts random weights in the place of the cross-attention's: the
target is gone, and so is everything else. Both must fail `efface check`.

Nothing is trained, and no sample goes through the denoiser.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from efface.core.card import Card
from efface.core.edit import WeightEdit
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.core.task import Task


class Control(Method):
    """A change of the cross-attention's weights that does not depend on the task. Whoever attaches it must not ask for an effect."""

    needs: ClassVar[Needs] = Needs(groups=("xattn",))
    paper: ClassVar[Paper] = Paper("none: a control", "the efface authors", "bench/controls.py")

    @abstractmethod
    def deltas(self, model: Model, seed: int) -> dict[str, Tensor]:
        """Δ by name, float32 on the CPU."""

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        self.require(model, task)
        model.meter.reset()
        resources.report(1, 1, {})
        return WeightEdit(self.deltas(model, seed), Card.of(model, method=self, task=task, seed=seed, cost=model.meter.read()))


@final
@dataclass(frozen=True)
class Noop(Control):
    """Changes nothing."""

    def deltas(self, model: Model, seed: int) -> dict[str, Tensor]:
        return {name: torch.zeros(slot.tensor.shape) for name, slot in model.select("xattn").items()}


@final
@dataclass(frozen=True)
class Vandal(Control):
    """Random weights, as large as those they replace, in the place of the cross-attention's matrices."""

    def deltas(self, model: Model, seed: int) -> dict[str, Tensor]:
        generator = seeded(seed)
        weights = {name: slot.tensor.detach().float().cpu() for name, slot in model.select("xattn").items() if slot.tensor.ndim > 1}
        return {name: w.std() * torch.randn(w.shape, generator=generator) - w for name, w in weights.items()}

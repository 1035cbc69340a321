"""Methods that are checked in the place of real ones: some that keep every promise, and for each check one that breaks exactly that.

All of them change the text-only maps of the cross-attention by a little seeded noise, after some calls of the denoiser."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from efface.bench.controls import Noop, Vandal
from efface.core.card import Card
from efface.core.edit import Attachment, LowRankEdit, WeightEdit
from efface.core.errors import Unsupported
from efface.core.method import Expectation, Method, Needs, Paper, Resources
from efface.core.model import Model
from efface.core.rules import NegativePrompt
from efface.core.sampling import noise_for, seeded
from efface.core.task import Task

PAPER = Paper("A control", "The tests", "never published")


def noise(model: Model, group: str, seed: int, size: float) -> dict[str, Tensor]:
    """Gaussian changes of a group, `size` times as large as its weights."""
    g, slots = seeded(seed), model.select(group)
    return {n: size * s.tensor.detach().std() * torch.randn(s.tensor.shape, generator=g) for n, s in slots.items()}


class Base(Method):
    """A method that keeps every promise; each control below overrides one part of it."""

    needs: ClassVar[Needs] = Needs(groups=("text_kv",))
    paper: ClassVar[Paper] = PAPER
    kind: ClassVar[type[WeightEdit]] = WeightEdit
    calls: int = 2

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        self.require(model, task)
        model.meter.reset()
        self.spend(model, task, seed)
        resources.report(self.calls, self.calls, {})
        card = Card.of(model, method=self, task=task, seed=seed, cost=self.read(model))
        made = self.kind(self.deltas(model, seed), card)
        self.leave(model)
        return made

    def deltas(self, model: Model, seed: int) -> dict[str, Tensor]:
        return noise(model, "text_kv", seed, 0.01)

    @torch.no_grad()
    def spend(self, model: Model, task: Task, seed: int) -> None:
        for _ in range(self.calls):
            model.predict(noise_for(0, 1, model.latent_shape), 500, model.encode([task.targets[0].texts[0]]))

    def read(self, model: Model) -> dict[str, float]:
        return model.meter.read()

    def leave(self, model: Model) -> None:
        """What the fit leaves behind: nothing."""

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        return {"steps": self.calls, "forwards": self.calls}


# -- sound ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound(Base):
    """Keeps every promise."""

    presets = {"authors": {"steps": 5}}
    steps: int = 300
    """Calls of the denoiser: too many for a check, which lowers them."""
    strength: float = 0.01
    """Size of the change."""

    @property
    def calls(self) -> int:
        return self.steps

    def deltas(self, model: Model, seed: int) -> dict[str, Tensor]:
        return noise(model, "text_kv", seed, self.strength)


@dataclass(frozen=True)
class Drawn(Base):
    """Draws how many calls it makes, and says so."""

    def spend(self, model: Model, task: Task, seed: int) -> None:
        for _ in range(int(torch.randint(1, 6, (1,), generator=seeded(seed)))):
            super().spend(model, task, seed)

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        return {"forwards": Expectation(6.0, 2, 10)}


@dataclass(frozen=True)
class Hungry(Base):
    """Needs images, an asset and an anchor, and erases one concept at a time."""

    needs = Needs(groups=("text_kv",), images=True, assets=("scale",), many=False)

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        self.require(model, task)
        if any(not swap.anchor.name for swap in task.erase):
            from efface.core.errors import InvalidTask

            raise InvalidTask("give an anchor")
        if task.targets[0].name not in resources.images:
            raise Unsupported("needs example images of the target")
        if "scale" not in resources.assets:
            raise Unsupported("needs the asset 'scale'")
        return super().fit(model, task, seed=seed, resources=resources)

    @classmethod
    def make_assets(cls, model: Model, task: Task, *, seed: int = 0) -> Mapping[str, Any]:
        return {"scale": 0.01}


@dataclass(frozen=True)
class Preset(Base):
    """Refuses the settings that the rule of the suite would give it, and offers its own."""

    presets = {"check": {"steps": 4}}
    steps: int = 300
    """At least 3."""

    def __post_init__(self) -> None:
        if self.steps < 3:
            raise ValueError("steps must be at least 3")


# -- faulty --------------------------------------------------------------------------------------------------------------


@dataclass
class Thawed(Base):
    """Not frozen."""


@dataclass(frozen=True)
class Undocumented(Base):
    steps: int = 2


@dataclass(frozen=True)
class WrongPreset(Base):
    presets = {"authors": {"stepps": 2}}


@dataclass(frozen=True)
class Forgetful(Base):
    """Its text form leaves a field out."""

    strength: float = 0.01
    """Unused."""

    def __str__(self) -> str:
        return self.name()


@dataclass(frozen=True)
class Misdeclared(Base):
    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> LowRankEdit:
        return super().fit(model, task, seed=seed, resources=resources)  # type: ignore[return-value]


@dataclass(frozen=True)
class Random(Base):
    """Takes its seed from the system."""

    def deltas(self, model: Model, seed: int) -> dict[str, Tensor]:
        return noise(model, "text_kv", int.from_bytes(os.urandom(4), "little"), 0.01)


class Drifting(WeightEdit):
    """Subtracts what it added."""

    def _enter(self, model: Model) -> Attachment:
        attachment = super()._enter(model)

        def undo() -> None:
            for (slot, weight), delta in zip(attachment.originals, self.deltas.values(), strict=True):
                slot.put(nn.Parameter(slot.tensor.detach() - delta, requires_grad=weight.requires_grad))

        return Attachment(attachment.names, attachment.originals, undo)


@dataclass(frozen=True)
class Drifts(Base):
    kind = Drifting


class Rounding(WeightEdit):
    """Is saved in half precision."""

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {name: delta.bfloat16() for name, delta in self.deltas.items()}, {}


@dataclass(frozen=True)
class Rounds(Base):
    kind = Rounding


@dataclass(frozen=True)
class Trespasser(Base):
    """Also changes a parameter outside its group."""

    def deltas(self, model: Model, seed: int) -> dict[str, Tensor]:
        return {**super().deltas(model, seed), "unet.conv_in.bias": torch.full((16,), 0.01)}


@dataclass(frozen=True)
class Fallback(Base):
    """Takes what there is where its group is missing."""

    def require(self, model: Model, task: Task) -> None:
        Task(task.erase, task.keep)

    def deltas(self, model: Model, seed: int) -> dict[str, Tensor]:
        return noise(model, "text_kv" if "text_kv" in model.groups else "full", seed, 0.01)


@dataclass(frozen=True)
class Vague(Base):
    """Refuses, and does not say why."""

    def require(self, model: Model, task: Task) -> None:
        try:
            super().require(model, task)
        except Unsupported:
            raise Unsupported("this model is not supported") from None


@dataclass(frozen=True)
class Gullible(Base):
    """Takes any task."""

    def require(self, model: Model, task: Task) -> None:
        if "text_kv" not in model.groups:
            raise Unsupported("needs the parameter group 'text_kv'")

    def spend(self, model: Model, task: Task, seed: int) -> None:
        super().spend(model, task if task.erase else Task.of("cat"), seed)


@dataclass(frozen=True)
class Miscounted(Base):
    """Claims half of what it spends."""

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        return {"forwards": self.calls / 2}


@dataclass(frozen=True)
class Liar(Base):
    """Spends twice what its formula and its card say."""

    def spend(self, model: Model, task: Task, seed: int) -> None:
        super().spend(model, task, seed)
        super().spend(model, task, seed)

    def read(self, model: Model) -> dict[str, float]:
        return {**model.meter.read(), "forwards": self.calls}


@dataclass(frozen=True)
class Skewed(Drawn):
    """An expectation with the right ends and the wrong mean."""

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        return {"forwards": Expectation(9.9, 2, 10)}


@dataclass(frozen=True)
class Stray(Drawn):
    """Draws outside what it says."""

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        return {"forwards": Expectation(2.0, 2, 2)}


FAULTS: dict[str, tuple[type[Method], ...]] = {
    "defaults": (Thawed,),
    "documented": (Undocumented,),
    "presets": (WrongPreset,),
    "text": (Forgetful,),
    "fits": (Misdeclared,),
    "repeatable": (Random,),
    "restores": (Drifts,),
    "survives": (Rounds,),
    "declared": (Trespasser,),
    "effective": (Noop,),
    "keeps": (Vandal,),
    "needs": (Fallback, Vague),
    "tasks": (Gullible,),
    "cost": (Miscounted, Liar, Skewed, Stray),
}
"""The methods that fail exactly this check; those of "unchanged" are made of `TRACES`."""


# -- what a fit may leave behind -----------------------------------------------------------------------------------------


def _first(model: Model, role: str = "cross_attn") -> nn.Module:
    return next(iter(model.hook_points(role).values()))


def _weight(model: Model) -> nn.Parameter:
    """A tensor so large that the fingerprint of a card does not look at each entry."""
    return next(p for p in model.denoiser.parameters() if p.numel() > 8192)


def _nudge(model: Model) -> None:
    with torch.no_grad():
        _weight(model).view(-1)[1] += 1e-3


def _replace(model: Model) -> None:
    slot = next(iter(model.select("full").values()))
    slot.put(nn.Parameter(slot.tensor.detach().clone(), requires_grad=slot.tensor.requires_grad))


def _gradient(model: Model) -> None:
    _weight(model).grad = torch.zeros_like(_weight(model))


def _processor(model: Model) -> None:
    layer = _first(model)
    layer.processor = copy.copy(layer.processor)


def _schedule(model: Model) -> None:
    model.pipeline.scheduler.alphas_cumprod.mul_(0.9)  # type: ignore[attr-defined]


TRACES: dict[str, Callable[[Model], Any]] = {
    "a weight that no fingerprint sees": _nudge,
    "an equal tensor in the place of another": _replace,
    "gradient flags": lambda model: model.denoiser.requires_grad_(False),
    "a gradient": _gradient,
    "the mode": lambda model: model.denoiser.eval(),
    "a hook": lambda model: _first(model).register_forward_hook(lambda *seen: None),
    "an attribute": lambda model: setattr(_first(model), "mark", 1),
    "an attention processor": _processor,
    "a rule": lambda model: model.rules.append(NegativePrompt("dog")),
    "a module": lambda model: model.denoiser.add_module("more", nn.Identity()),
    "the scheduler": _schedule,
    "torch's random state": lambda model: torch.rand(1),
    "numpy's random state": lambda model: np.random.rand(),
    "Python's random state": lambda model: random.random(),
    "the gradient mode": lambda model: torch.set_grad_enabled(False),
}


def tracing(trace: str) -> type[Method]:
    """A method that leaves one trace."""

    @dataclass(frozen=True)
    class Tracing(Base):
        """Leaves a trace."""

        def leave(self, model: Model) -> None:
            TRACES[trace](model)

    return Tracing

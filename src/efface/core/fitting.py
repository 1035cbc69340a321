"""One loop for every method that takes steps: it says what the fit will cost, watches its figures, and goes on after a kill.

    with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
        student = Overlay(model.select(self.group))
        optimiser = torch.optim.Adam(student.parameters, lr=fit.rate)
        for _ in fit.steps(self.steps, {"student": student, "optimiser": optimiser}):
            ...                                    # draws from fit.generator
            fit.log({"erase": loss.item()})        # once a step
        return fit.edit(student.deltas())

What a step reads and changes goes into the mapping: anything with `state_dict` and `load_state_dict` (overlays, optimisers, modules,
`ops.latents.Pools`, `ops.trace.WordTrace`) or a `torch.Generator`. `fit.generator`, the figures and the meter are in it already.
With `resources.checkpoint` they are written every `checkpoint_every` steps, in one safetensors file and never as a pickle; the next
fit of the same method, task, seed and weights goes on there, and its edit is that of an uninterrupted fit to the bit.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from efface.core import file
from efface.core.card import Card, Fingerprint, versions
from efface.core.edit import Part, WeightEdit
from efface.core.errors import Diverged, EffaceError, InvalidEdit, Mismatch
from efface.core.method import Forecast, Resources
from efface.core.model import Model
from efface.core.sampling import noise_for, seeded
from efface.core.task import Task

FORMAT, VERSION = "efface-checkpoint", 1


class Stateful(Protocol):
    """What a checkpoint can hold: optimisers, modules, `Overlay`, `Pools`, …"""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, texts and None in dicts, lists and tuples."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


State = Mapping[str, Stateful | torch.Generator]


class Work(Protocol):
    """What is asked of whatever is fitted: every `Method` answers, and so does the training of an asset."""

    @classmethod
    def name(cls) -> str: ...

    def trained(self, model: Model) -> tuple[str, ...]: ...

    def require(self, model: Model, task: Task) -> None: ...

    def cost(self, model: Model, task: Task) -> dict[str, float]: ...

    def memory(self, model: Model, task: Task) -> int: ...


@contextmanager
def fitting(method: Work, model: Model, task: Task, seed: int, resources: Resources, *, lr: float = 0.0) -> Iterator[Fit]:
    """A fit from its checks to its end: the model is frozen, the meter starts at zero, the expected cost is announced.

    The checkpoint is removed at the end, and also where the fit diverged, since it would only do so again. Any other error leaves it.

    Raises InvalidTask and Unsupported (`Method.require`), Mismatch (a checkpoint of another fit), EffaceError (one that is none)."""
    method.require(model, task)
    if resources.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every was {resources.checkpoint_every}; expected at least 1")
    fit = Fit(method, model, task, seed, resources, model.learning_rate(lr, *method.trained(model)), seeded(seed))
    with model.frozen():
        fit.begin()
        try:
            yield fit
        except Diverged:
            fit.forget()
            raise
    fit.forget()


@dataclass(eq=False)
class Fit:
    """One fit under way; made by `fitting`."""

    method: Work
    model: Model
    task: Task
    seed: int
    resources: Resources
    rate: float
    """The learning rate of the network: `Model.learning_rate` of `lr`, which is in units of Stable Diffusion 1.x."""
    generator: torch.Generator
    """Made from `seed`; every random draw comes from it."""
    figures: list[dict[str, float]] = field(default_factory=list)
    """What was logged, one entry a step."""
    total: int = 0
    """Steps in all."""
    _saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def begin(self) -> None:
        """Reads the checkpoint where there is one, announces the expected cost, and starts the meter."""
        self._saved = self._found()
        cost = self.method.cost(self.model, self.task)
        done = len(self._saved[1]["figures"]) if self._saved else 0
        values = {name: cost.get(name, 0.0) for name in ("steps", "forwards", "backwards")}
        self.resources.announce(Forecast(**values, memory=self.method.memory(self.model, self.task), done=done))
        self.model.meter.reset()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)

    def steps(self, total: int, state: State) -> Iterator[int]:
        """The numbers of the steps that are left, of 0 … total − 1; before the first, `state` is set to that of the checkpoint."""
        self.total, parts = total, {**state, "generator": self.generator}
        every, path = self.resources.checkpoint_every, self.resources.checkpoint
        for step in range(self._restore(parts), total):
            yield step
            if path is not None and (step + 1) % every == 0 and step + 1 < total:
                self._save(path, parts)

    def log(self, figures: Mapping[str, float]) -> None:
        """Keeps and reports the figures of a step. To be called once in each. Raises Diverged for one that is not finite."""
        self.finite(figures, len(self.figures) + 1)
        self.figures.append(dict(figures))
        self.resources.report(len(self.figures), self.total, figures)

    def finite(self, figures: Mapping[str, float], step: int) -> None:
        """Raises Diverged for a figure that is not finite."""
        for name, value in figures.items():
            if not math.isfinite(value):
                rate = f", with lr {self.rate:g}" if self.rate else ""
                where = f"{self.method.name()}'s {name} was {value} at step {step} of {self.total}{rate}"
                raise Diverged(f"{where}; the model is as it was, try a lower lr")

    def losses(self) -> dict[str, Tensor]:
        """Each figure as (steps,), NaN at the steps that had none."""
        names = dict.fromkeys(name for figures in self.figures for name in figures)
        return {name: torch.tensor([figures.get(name, math.nan) for figures in self.figures]) for name in names}

    def card(self) -> Card:
        """The card of what was fitted, with the metered cost; on CUDA with the most memory that tensors took, weights included."""
        device, cost = self.model.device, self.model.meter.read()
        if device.type == "cuda":
            cost["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        return Card.of(self.model, method=self.method, task=self.task, seed=self.seed, cost=cost)

    def edit(
        self, deltas: Mapping[str, Tensor], *, trace: Mapping[str, Tensor] | None = None, info: Mapping[str, Any] | None = None
    ) -> WeightEdit:
        """W + Δ with its card and a part "trace": the losses, and `trace` and `info`. Raises Diverged for a change that is not finite."""
        self.finite({f"change of {name}": float(delta.abs().max()) for name, delta in deltas.items()}, self.total)
        return WeightEdit(deltas, self.card(), {"trace": Part({**self.losses(), **(trace or {})}, dict(info or {}))})

    # -- checkpoint ------------------------------------------------------------------------------------------------------
    def forget(self) -> None:
        """Removes the checkpoint."""
        if self.resources.checkpoint is not None:
            self.resources.checkpoint.unlink(missing_ok=True)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Everything that must be equal for a checkpoint to be gone on with. Assets are told apart by their names only."""
        weights, given, installed = Fingerprint.of(self.model), self.resources, versions()
        words = [*given.vocabulary, "\n", *given.exclude, "\n", *given.assets]
        return {
            "method": str(self.method),
            "task": str(self.task),
            "prompts": _digest([repr(self.task)]),
            "seed": str(self.seed),
            "model": f"{weights.digest} in {weights.dtype} with rate {self.rate:g}",
            "device": self.model.device.type,
            "words": _digest(words),
            "images": _digest([*given.images, *given.images.values()]),
            "efface": installed.get("efface", ""),
            "torch": installed.get("torch", ""),
        }

    def _save(self, path: Path, parts: State) -> None:
        tensors: dict[str, Tensor] = {}
        states = {n: part.get_state() if isinstance(part, torch.Generator) else part.state_dict() for n, part in parts.items()}
        header = {"identity": self.identity, "figures": self.figures, "meter": self.model.meter.read(), "state": _pack(states, tensors)}
        file.write(path, tensors, {"format": FORMAT, "version": VERSION, **header})

    def _found(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self.resources.checkpoint
        if path is None or not path.exists():
            return None
        try:
            tensors, header = file.read(path)
        except InvalidEdit as error:
            raise EffaceError(f"the checkpoint {path} cannot be read; remove it to start anew ({error})") from error
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise EffaceError(f"{path} is no checkpoint that this version of efface wrote; give another path, or remove it to start anew")
        old, new = header["identity"], self.identity
        differ = [f"its {name} was {old.get(name)!r} and is now {new[name]!r}" for name in new if old.get(name) != new[name]]
        if differ:
            raise Mismatch(f"the checkpoint {path} is of another fit: {'; '.join(differ)}. Give what it had, or remove it to start anew")
        return tensors, header

    def _restore(self, parts: State) -> int:
        """Sets everything to the checkpoint's state; the number of steps done."""
        if self._saved is None:
            return 0
        (tensors, header), self._saved, meter = self._saved, None, self.model.meter
        for name, state in _unpack(header["state"], tensors, self.model.device).items():
            part = parts[name]
            if isinstance(part, torch.Generator):
                part.set_state(state)
            else:
                part.load_state_dict(state)
        spent = header["meter"]
        meter.forwards, meter.calls, meter.backwards = spent["forwards"], spent["calls"], spent["backwards"]
        meter.started = time.perf_counter() - spent["seconds"]
        self.figures = header["figures"]
        return len(self.figures)


def _digest(parts: Iterable[str | Tensor]) -> str:
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        hasher.update(f"{part}\n".encode() if isinstance(part, str) else part.detach().cpu().float().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON that `_unpack` reads back; tensors go into `tensors` and leave their number."""
    if isinstance(value, Tensor):
        number = str(len(tensors))
        tensors[number] = value.detach().clone()  # views of one storage cannot stand in one file
        return {"tensor": number, "cpu": value.device.type == "cpu"}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors, numbers, texts and None, and a {type(value).__name__} was given")


def _unpack(packed: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        tensor = tensors[packed["tensor"]]
        return tensor if packed["cpu"] else tensor.to(device)
    if "dict" in packed:
        return {key: _unpack(item, tensors, device) for key, item in packed["dict"]}
    kind = "tuple" if "tuple" in packed else "list"
    items = [_unpack(item, tensors, device) for item in packed[kind]]
    return tuple(items) if kind == "tuple" else items


SLOW = 0.5
"""Seconds of a forward beyond which one sample tells enough."""


@torch.no_grad()
def seconds_per_forward(model: Model, rows: int = 8) -> float:
    """Seconds that the denoiser takes for one sample, measured on a call of `rows` samples, or of one where that is slow; not metered."""
    meter, cond, t = model.meter, model.encode([""]), model.schedule.train_steps // 2
    spent = meter.forwards, meter.calls
    for count in (1, 1, rows):  # the first warms up
        x = noise_for(0, count, model.latent_shape).to(model.device, model.dtype)
        started = time.perf_counter()
        float(model.predict(x, t, cond).sum())  # the number is waited for, also on an accelerator
        elapsed = (time.perf_counter() - started) / count
        if elapsed > SLOW:
            break
    meter.forwards, meter.calls = spent
    return elapsed

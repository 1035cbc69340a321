"""A method on a tiny model: its settings made small, what it needs made up, and the one fit that all checks share."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efface.bench.conformance.state import State, digest, unsettle
from efface.core import file
from efface.core.edit import Edit
from efface.core.errors import InvalidTask
from efface.core.method import Method, Report, Resources, silent
from efface.core.model import Model
from efface.core.sampling import noise_for
from efface.core.task import Task
from efface.models import tiny

PRESET = "check"
"""The preset that a method offers where the rule of `small` does not fit it."""
COUNTS = ("steps", "iterations", "epochs", "rounds", "trajectories", "batch", "samples", "images")
"""What a field counts by the last word of its name, so that it may be lowered."""
FEW = 2
"""What these fields are lowered to."""
TASKS = ("cat | keep dog, tiger", "cat -> animal | keep dog, tiger")
"""What is erased; the second where a method refuses the first, as those do that must have an anchor."""
PICTURES = 4
"""Example images of each concept, for the methods that need some."""
SCALE = 3.0
"""Guidance of the predictions that are compared."""


def small(cls: type[Method], given: Mapping[str, Any] | None = None, preset: str | None = None) -> Method:
    """The settings to check a method with: seconds long, and nothing but shorter.

    The preset "check" where there is one; otherwise the defaults, or `preset`, with every integer field whose name ends in one of
    `COUNTS` (`steps`, `latent_steps`, `batch`, …) lowered to `FEW`. Fields in `given` win. Raises InvalidMethod."""
    given = dict(given or {})
    if preset is None and PRESET in cls.presets:
        return cls.build(preset=PRESET, **given)
    start = cls.build(preset=preset)
    values = {f.name: getattr(start, f.name) for f in dataclasses.fields(cls) if f.name.rpartition("_")[2] in COUNTS}  # type: ignore[arg-type]
    lowered = {name: min(value, FEW) for name, value in values.items() if type(value) is int}
    return cls.build(preset=preset, **{**lowered, **given})


@dataclass(frozen=True, eq=False)
class Fit:
    """What one fit returned, spent and left behind."""

    edit: Edit
    task: Task
    before: State
    after: State
    forwards: int
    """Samples that went through the denoiser, counted at the network itself."""
    steps: int
    """The last step that was reported."""
    note: str = ""


@dataclass
class Case:
    """A method on one family; what is made is made once."""

    cls: type[Method]
    family: str
    given: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None

    @cached_property
    def method(self) -> Method:
        return small(self.cls, self.given, self.preset)

    @cached_property
    def model(self) -> Model:
        """With flags and modes in disorder, which a fit must leave as they are."""
        model = tiny.model(self.family)
        unsettle(model)
        return model

    def renew(self) -> None:
        """A fresh model, so that what one check finds wrong does not reach the next."""
        self.__dict__.pop("model", None)

    @cached_property
    def bare(self) -> Model:
        """A model without attention."""
        return tiny.model(tiny.BARE)

    @cached_property
    def fitted(self) -> Fit:
        """The fit that all checks share, for the first of `TASKS` that the method takes."""
        try:
            return self.fit(Task.parse(TASKS[0]))
        except InvalidTask as error:
            refusal = f"{TASKS[0]!r} was refused ({error}); fitted {TASKS[1]!r}"
            return dataclasses.replace(self.fit(Task.parse(TASKS[1])), note=refusal)

    @property
    def edit(self) -> Edit:
        return self.fitted.edit

    def fit(self, task: Task, *, seed: int = 0) -> Fit:
        """Another fit, watched."""
        steps = [0]
        resources = self.resources(task, lambda step, total, figures: steps.append(step))
        before = State.of(self.model, process=True)
        with counted(self.model.denoiser) as seen:
            edit = self.method.fit(self.model, task, seed=seed, resources=resources)
        return Fit(edit, task, before, State.of(self.model, process=True), sum(seen), steps[-1])

    def resources(self, task: Task, report: Report = silent, *, model: Model | None = None) -> Resources:
        """Images and assets where the method needs them, drawn and made with the tiny model itself."""
        source, needs = model or self.model, self.method.needs
        concepts = [c for swap in task.erase for c in (swap.target, swap.anchor)] + list(task.keep)
        images: dict[str, Tensor] = {}
        if needs.images:
            images = {c.name: source.sample([c.texts[0]] * PICTURES, steps=FEW) for c in concepts}
        assets = self.cls.make_assets(source, task) if needs.assets else {}
        return Resources(images=images, assets=assets, report=report)

    @torch.no_grad()
    def predictions(self, texts: list[str]) -> Tensor:
        """Guided predictions (texts, noises × times, c h w) of the model as it stands, on fixed noise."""
        model = self.model
        times = [int(model.schedule.train_steps * share) for share in (0.9, 0.5, 0.1)]
        noises = noise_for(0, 2, model.latent_shape).to(model.device, model.dtype)
        cond, null, x = model.encode(texts), model.encode([""] * len(texts)), [noise.expand(len(texts), -1, -1, -1) for noise in noises]
        return torch.stack([model.guided(z, t, cond, null, SCALE) for z in x for t in times], 1)


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """Collects the batch of each call of a network; the hook is gone afterwards."""
    seen: list[int] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(len(output if isinstance(output, Tensor) else output[0]))

    handle = network.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


Files = Mapping[str, tuple[dict[str, Tensor], dict[str, Any]]]
"""Tensors and header by file name."""


@contextmanager
def saved(edit: Edit) -> Iterator[Path]:
    """The edit's file in a temporary folder, with its extras beside it."""
    with tempfile.TemporaryDirectory() as folder:
        yield edit.save(Path(folder) / "edit.safetensors")


def contents(edit: Edit) -> Files:
    """Everything in the files that an edit is saved as, but for the seconds that the fit took."""
    with saved(edit) as path:
        found = {each.name: file.read(each) for each in sorted(path.parent.iterdir())}
    return {name: (tensors, _timeless(header)) for name, (tensors, header) in found.items()}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key != "seconds"}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def unlike(first: Files, second: Files) -> list[str]:
    """What differs between the files of two edits, to the bit."""
    found = [f"the file {name}" for name in sorted(first.keys() ^ second.keys())]
    for name in sorted(first.keys() & second.keys()):
        (mine, header), (theirs, other) = first[name], second[name]
        found += [f"{name}: {key}" for key in sorted(mine.keys() ^ theirs.keys())]
        found += [f"{name}: {key}" for key in sorted(mine.keys() & theirs.keys()) if not same(mine[key], theirs[key])]
        if header != other:
            found.append(f"{name}: its header")
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and digest(a) == digest(b)

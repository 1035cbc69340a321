"""A way of erasing: hyperparameters as frozen fields, and `fit`, which returns an `Edit` and leaves the model as it was."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from torch import Tensor

from efface.core.edit import Edit
from efface.core.errors import InvalidMethod, Unsupported
from efface.core.model import Model
from efface.core.task import Task
from efface.core.typed import typed

Keep = Literal["preserved", "candidates", "measured only"]


@dataclass(frozen=True)
class Needs:
    """What a method needs of a model and of its user; the catalogue derives from it which families it supports."""

    groups: tuple[str, ...] = ()
    """Parameter groups that it may train: "xattn", …"""
    gradients: bool = False
    """Whether it differentiates through the denoiser."""
    images: bool = False
    """Whether it needs example images of the target."""
    assets: tuple[str, ...] = ()
    """Trained parts that must be handed in, such as a sparse autoencoder."""
    many: bool = True
    """Whether one fit erases several targets."""
    keep: Keep = "measured only"
    """What `keep` does: preserved by the method, added to its candidates, or only measured."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    authors: str
    venue: str
    arxiv: str = ""
    code: str = ""


class Expectation(float):
    """A figure of `Method.cost` that hangs on what is drawn, such as random times: its mean, and what it can be at least and at most."""

    low: float
    high: float

    def __new__(cls, mean: float, low: float, high: float) -> Expectation:
        """Raises ValueError unless low ≤ mean ≤ high."""
        if not low <= mean <= high:
            raise ValueError(f"an expectation of {mean} between {low} and {high}; expected low ≤ mean ≤ high")
        number = super().__new__(cls, mean)
        number.low, number.high = low, high
        return number


Report = Callable[[int, int, Mapping[str, float]], None]
"""Called after every step with (steps done, steps in all, figures such as losses)."""


def silent(step: int, total: int, figures: Mapping[str, float]) -> None:
    """The report of nobody."""


@dataclass(frozen=True)
class Forecast:
    """What a fit is expected to cost, said before it starts."""

    steps: float = 0
    forwards: float = 0
    """Samples through the denoiser."""
    backwards: float = 0
    """Samples of backward."""
    memory: int = 0
    """Bytes beyond the loaded model, without activations (`Method.memory`); 0 where unknown."""
    done: int = 0
    """Steps that a checkpoint saves."""


def unannounced(forecast: Forecast) -> None:
    """The announcement to nobody."""


@dataclass(frozen=True)
class Resources:
    """What a fit is given beside the model and the task."""

    vocabulary: Sequence[str] = ()
    """Candidate words for the methods that search over them; empty means the tokenizer's whole words."""
    exclude: Sequence[str] = ()
    """Words that must not become candidates."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """Example images (n 3 H W) in [0, 1] by concept name."""
    assets: Mapping[str, Any] = field(default_factory=dict)
    """Trained parts by name, such as a sparse autoencoder."""
    report: Report = silent
    announce: Callable[[Forecast], None] = unannounced
    """Called once, before the first step of a method that takes steps."""
    checkpoint: Path | None = None
    """A file that keeps the state of a fit, so that it can go on after a kill: see `core.fitting`. None keeps nothing."""
    checkpoint_every: int = 50
    """Steps from one writing of the checkpoint to the next."""


class Method(ABC):
    """The base of every method: a frozen dataclass with a string under each field, one file a method, no state."""

    needs: ClassVar[Needs]
    paper: ClassVar[Paper]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings; "authors" is the paper's run, and a concept kind's name holds what that kind wants."""

    @abstractmethod
    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> Edit:
        """Erases `task.erase` and returns the edit; `model` is left bit-identical: names, tensors, flags, hooks, RNG.

        Raises InvalidTask, Unsupported (a need that the model lacks), Diverged (a loss that is not finite)."""

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """What a fit will cost: "steps", and "forwards" and "backwards" in samples. Exact, or an `Expectation` where it hangs on
        what is drawn. A figure that is left out is 0. `efface check` compares it with what was metered."""
        return {}

    def memory(self, model: Model, task: Task) -> int:
        """Bytes that a fit holds beyond the loaded model: trained copies, their gradients, optimiser, kept latents; without activations.
        An estimate; 0 where nothing is known."""
        return 0

    def trained(self, model: Model | None = None) -> tuple[str, ...]:
        """The parameter groups that it trains: that of its field `group`, where this names one (of the model's, if one is given), and
        otherwise all of `needs.groups`."""
        group = getattr(self, "group", None)
        named = isinstance(group, str) and (model is None or group in model.groups)
        return (str(group),) if named else self.needs.groups

    @classmethod
    def make_assets(cls, model: Model, task: Task, *, seed: int = 0) -> Mapping[str, Any]:
        """Small assets for `efface check`, made on the spot: one for each name of `needs.assets`. None where none is needed."""
        return {}

    @classmethod
    def name(cls) -> str:
        """The file's name: the class in `methods/ap.py` is "ap"; a third party's is its dotted path."""
        module = cls.__module__
        return module.removeprefix("efface.methods.") if module.startswith("efface.methods.") else f"{module}:{cls.__qualname__}"

    @classmethod
    def build(cls, *, preset: str | None = None, **fields: Any) -> Method:
        """Makes the method from a preset and fields, which win. Raises InvalidMethod for an unknown preset, field or type."""
        from efface.core.errors import suggest

        if preset is not None and preset not in cls.presets:
            raise InvalidMethod(
                f"{cls.name()} has no preset {preset!r}; {suggest(str(preset), cls.presets) if cls.presets else 'it has none'}"
            )
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        try:
            hints = get_type_hints(cls)
        except NameError as error:
            raise InvalidMethod(
                f"the types of {cls.name()}'s fields cannot be read ({error}); import them outside TYPE_CHECKING"
            ) from error
        for key, value in fields.items():
            if key not in known:
                raise InvalidMethod(f"{cls.name()} has no field {key!r}; {suggest(key, known)}")
            try:
                fields[key] = typed(value, hints[key])
            except TypeError as error:
                raise InvalidMethod(f"{cls.name()}'s {key} was {value!r}; expected {inspect.formatannotation(hints[key])}") from error
        return cls(**{**(cls.presets[preset] if preset else {}), **fields})

    def __str__(self) -> str:
        """The text form, which `catalog.method` reads back: name(field=value) with the fields that are not the default."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name()}({', '.join(changed)})" if changed else self.name()

    def check_fields(
        self,
        *,
        at_least: Mapping[str, int] | None = None,
        above_zero: Sequence[str] = (),
        from_zero: Sequence[str] = (),
        one_of: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """For `__post_init__`: integers of at least a value, finite numbers above or from 0, choices. Raises InvalidMethod."""
        for name, low in (at_least or {}).items():
            self.check_field(name, type(getattr(self, name)) is int and getattr(self, name) >= low, f"an integer of at least {low}")
        for name in above_zero:
            self.check_field(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in from_zero:
            self.check_field(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        for name, valid in (one_of or {}).items():
            self.check_field(name, getattr(self, name) in valid, f"one of {', '.join(valid)}")

    def check_field(self, name: str, good: bool, expected: str) -> None:
        """Raises InvalidMethod with what the field was and what was expected, unless it is `good`."""
        if not good:
            raise InvalidMethod(f"{self.name()}'s {name} was {getattr(self, name)!r}; expected {expected}")

    def require(self, model: Model, task: Task) -> None:
        """Checks `needs` against a model and a task. Raises Unsupported with the missing need, and InvalidTask for a task that has not
        met its own checks, since it was unpickled or patched."""
        Task(task.erase, task.keep)
        missing = [group for group in self.needs.groups if group not in model.groups]
        if missing:
            raise Unsupported(
                f"{self.name()} needs the parameter group {missing[0]!r}, and the family {model.family!r} has {', '.join(model.groups)}"
            )
        if not self.needs.many and len(task.erase) > 1:
            raise Unsupported(f"{self.name()} erases one concept at a time, and {len(task.erase)} were given; fit one edit each")

    @classmethod
    @cache
    def field_docs(cls) -> Mapping[str, str]:
        """The string under each field of the dataclass: meaning, unit, the paper's symbol."""
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        docs: dict[str, str] = {}
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for statement, following in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.target.id in names:
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                    docs[statement.target.id] = inspect.cleandoc(following.value.value)
        return docs

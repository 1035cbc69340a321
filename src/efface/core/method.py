"""A way of erasing: hyperparameters as frozen fields, and `fit`, which returns an `Edit` and leaves the model as it was."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

from torch import Tensor

from efface.core.edit import Edit
from efface.core.errors import InvalidMethod, Unsupported
from efface.core.model import Model
from efface.core.task import Task

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


Report = Callable[[int, int, Mapping[str, float]], None]
"""Called after every step with (steps done, steps in all, figures such as losses)."""


def silent(step: int, total: int, figures: Mapping[str, float]) -> None:
    """The report of nobody."""


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
        """Expected "steps", "forwards", "backwards" in samples before anything is run; empty where nothing is known."""
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
        for key in fields:
            if key not in known:
                raise InvalidMethod(f"{cls.name()} has no field {key!r}; {suggest(key, known)}")
        return cls(**{**(cls.presets[preset] if preset else {}), **fields})

    def __str__(self) -> str:
        """The text form, which `catalog.method` reads back: name(field=value) with the fields that are not the default."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name()}({', '.join(changed)})" if changed else self.name()

    def require(self, model: Model, task: Task) -> None:
        """Checks `needs` against a model and a task. Raises Unsupported with the missing need."""
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
        for statement, following in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                    docs[statement.target.id] = inspect.cleandoc(following.value.value)
        return docs

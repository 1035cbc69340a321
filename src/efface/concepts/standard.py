"""The standard erasures: one concept of each kind, with its neighbours, on which every method is compared."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from efface.core.task import Concept

KINDS = ("object", "style", "identity", "unsafe")
"""One standard erasure each, in this order."""


@dataclass(frozen=True)
class Standard:
    """One standard erasure."""

    concept: Concept
    neighbours: tuple[str, ...]
    """The concepts most like it, which must stay; `keep` names none of them, so that no method is told."""

    @property
    def task(self) -> str:
        """The task's text form: "cat", "style:modern"."""
        return str(self.concept)


@cache
def standard() -> tuple[Standard, ...]:
    """The standard erasures of the bundled model, read from `standard.toml`, in the order of `KINDS`."""
    data = tomllib.loads((resources.files("efface") / "concepts" / "standard.toml").read_text(encoding="utf-8"))
    return tuple(Standard(Concept(data[kind]["concept"], kind), tuple(data[kind]["neighbours"])) for kind in KINDS)  # type: ignore[arg-type]

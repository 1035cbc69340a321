"""What a protocol may be told beside model, task and size: a file of prompts, how much of it, and how to sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from efface.core.errors import EffaceError, suggest

ROW = "row"
"""The guidance that means: each prompt's own, as its file gives it."""


@dataclass(frozen=True)
class Options:
    """All empty by default: the protocol's own prompts, the model's own sampling. Raises EffaceError for a value out of range."""

    prompts: str = ""
    """A file of prompts (`bench.prompts`), as it is named from the working directory."""
    limit: int | None = None
    """Prompts of the file at most, evenly spaced."""
    each: int = 1
    """Pictures of each prompt."""
    steps: int | None = None
    """Of the sampler."""
    guidance: float | str | None = None
    """A scale, or "row"."""
    real: str = ""
    """A folder of real pictures, for the distance to them."""

    def __post_init__(self) -> None:
        for name in ("limit", "each", "steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise EffaceError(f"{name} was {value!r}; expected an integer of at least 1")
        scale = self.guidance
        if scale not in (None, ROW) and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale < 0):
            raise EffaceError(f"guidance was {scale!r}; expected a number of at least 0, or {ROW!r} for each prompt's own")
        for name in ("prompts", "real"):
            if not isinstance(getattr(self, name), str):
                raise EffaceError(f"{name} was {getattr(self, name)!r}; expected a path as text")

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str = "options") -> Options:
        """Raises EffaceError for an unknown key or a value out of range."""
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise EffaceError(f"{where} has the unknown key {name!r}; {suggest(name, known)}")
        return cls(**data)

    def given(self) -> dict[str, Any]:
        """The values that are not the default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(DEFAULT, name)}


DEFAULT = Options()

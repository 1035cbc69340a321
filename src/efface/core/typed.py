"""Literals of a text form as values of the types of the fields: one value has one form, and a wrong one is told at once."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, get_args, get_origin


def typed(value: Any, kind: Any) -> Any:
    """The literal as a value of the type: 2 as 2.0 where a float is expected, a list as a tuple. What a `Literal` takes is not asked here.

    Raises TypeError where it is none."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:  # of one type and None
        return None if value is None else typed(value, parts[0])
    if origin is tuple and isinstance(value, (tuple, list)):
        kinds = [parts[0]] * len(value) if parts[-1] is ... else list(parts)
        if len(kinds) == len(value):
            return tuple(typed(item, each) for item, each in zip(value, kinds, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind and origin is not Literal:
        raise TypeError(f"{value!r} is no {kind}")
    return value

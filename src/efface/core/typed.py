"""Literals of a text form as values of the types of the fields: one value has one form, and a wrong one is told at once."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

PLAIN = (bool, int, float, str, NoneType, tuple)
"""Types that a literal is held to; what another type takes is for the class itself to say."""


def typed(value: Any, kind: Any) -> Any:
    """The literal as a value of the type: 2 as 2.0 where a float is expected, a list as a tuple; of a union, as the first that takes it.

    Raises TypeError where it is none."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        return _first(value, parts)
    if origin is tuple and isinstance(value, (tuple, list)):
        kinds = [parts[0]] * len(value) if parts[-1] is ... else list(parts)
        if len(kinds) == len(value):
            return tuple(typed(item, each) for item, each in zip(value, kinds, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if origin is tuple or (kind in PLAIN and type(value) is not kind):
        raise TypeError(f"{value!r} is no {kind}")
    return value


def _first(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        try:
            return typed(value, kind)
        except TypeError:
            continue
    raise TypeError(f"{value!r} is none of {kinds}")

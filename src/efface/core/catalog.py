"""Finds methods by name. The file name is the registry: `methods/ap.py` holds the method "ap".

A text is `name`, `name(field=value, …)` or `name(preset='authors', …)`, with literals only. A third party's method is
`their_package.module:Class(…)`, or a name registered under the entry-point group "efface.methods".
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from efface.core.errors import InvalidMethod, suggest
from efface.core.method import Method

GROUP = "efface.methods"


def names() -> list[str]:
    """Every method that can be named: the bundled ones and those registered by other packages."""
    folder = Path(__file__).parents[1] / "methods"
    bundled = {module.name for module in pkgutil.iter_modules([str(folder)]) if not module.name.startswith("_")}
    return sorted(bundled | {point.name for point in entry_points(group=GROUP)})


def find(name: str) -> type[Method]:
    """The class of a method's name or dotted path. Raises InvalidMethod."""
    if ":" in name:
        return _third_party(name)
    if name not in names():
        raise InvalidMethod(f"there is no method {name!r}; {suggest(name, names())}")
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _third_party(point.value)
    module = importlib.import_module(f"efface.methods.{name}")
    found = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Method) and c.__module__ == module.__name__]
    if len(found) != 1:
        raise InvalidMethod(f"methods/{name}.py must hold one subclass of Method, and holds {len(found)}")
    return found[0]


def _third_party(path: str) -> type[Method]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidMethod(f"no method at {path!r} ({error}); write package.module:Class") from error
    if not (inspect.isclass(found) and issubclass(found, Method)):
        raise InvalidMethod(f"{path!r} is no subclass of efface.Method")
    return found


def missing(cls: type[Method], families: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """By family, the parameter groups that a method needs and the family lacks; none where it is supported."""
    return {family: [group for group in cls.needs.groups if group not in groups] for family, groups in families.items()}


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """("ap", {"steps": 200}) from "ap(steps=200)". Raises InvalidMethod; nothing is evaluated."""
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("only field=value is allowed between the brackets")
        return name.strip(), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise InvalidMethod(f"cannot read the method {text!r} ({error}); write name or name(field=value), such as ap(steps=200)") from error


def method(text: str | Method, *, kind: str | None = None) -> Method:
    """The method of a text. Without a preset in the text, the preset of the concept's `kind` is used where there is one.

    Raises InvalidMethod for an unknown method, field, preset or value."""
    if isinstance(text, Method):
        return text
    name, fields = parse(text)
    cls = find(name)
    preset = fields.pop("preset", kind if kind in cls.presets else None)
    return cls.build(preset=preset, **fields)

"""`efface list`, `efface show METHOD`, `efface env`: what there is, and what it runs on."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efface.cli.options import Json
from efface.cli.output import columns, emit

if TYPE_CHECKING:
    from efface.core.method import Method


def list_methods(json: Json = False) -> None:
    """List the methods of erasure."""
    from efface.core import catalog

    rows = [_row(name, catalog.find(name)) for name in catalog.names()]
    emit(rows, columns(rows, ("method", "paper", "venue", "keep", "edit"), header=True), json)


def _row(name: str, cls: type[Method]) -> dict[str, str]:
    kind = getattr(_edit(cls), "kind", "any")
    return {"method": name, "paper": cls.paper.title, "venue": cls.paper.venue, "keep": cls.needs.keep, "edit": kind}


def _edit(cls: type[Method]) -> Any:
    """The kind of edit that `fit` is declared to return."""
    from typing import get_type_hints

    return get_type_hints(cls.fit)["return"]


def show(
    method: Annotated[str, typer.Argument(help="A method's text, such as ap or \"ap(preset='authors')\".")],
    json: Json = False,
) -> None:
    """Show a method's card: idea, formula, fields, presets, needs and threat model."""
    from efface.core import catalog

    built = catalog.method(method)
    card = _card(built)
    emit(card, _page(card), json)


def _card(built: Method) -> dict[str, Any]:
    cls = type(built)
    docs = {name: " ".join(text.split()) for name, text in cls.field_docs().items()}
    fields = [{"field": f.name, "value": getattr(built, f.name), "meaning": docs.get(f.name, "")} for f in dataclasses.fields(built)]  # type: ignore[arg-type]
    return {
        "method": cls.name(),
        "text": str(built),
        "card": inspect.cleandoc(inspect.getmodule(cls).__doc__ or ""),
        "fields": fields,
        "presets": {name: dict(values) for name, values in cls.presets.items()},
        "needs": dataclasses.asdict(cls.needs),
        "paper": dataclasses.asdict(cls.paper),
        "threat": getattr(_edit(cls), "threat", "depends on the edit that it returns; see its card"),
    }


def _page(card: dict[str, Any]) -> str:
    needs, paper = card["needs"], card["paper"]
    fields = [{**row, "value": repr(row["value"])} for row in card["fields"]]
    presets = [{"preset": name, "sets": _assignments(values)} for name, values in card["presets"].items()]
    wants = [f"{key}: {_words(value)}" for key, value in needs.items() if value not in ((), False)]
    source = [paper["title"], f"{paper['authors']}, {paper['venue']}", f"arXiv {paper['arxiv']}" if paper["arxiv"] else "", paper["code"]]
    parts = [
        card["card"],
        "Fields\n" + columns(fields, ("field", "value", "meaning")),
        "Presets\n" + (columns(presets, ("preset", "sets")) if presets else "  none"),
        "Needs\n" + "\n".join(f"  {line}" for line in wants),
        f"Threat model\n  {card['threat']}",
        "Paper\n" + "\n".join(f"  {line}" for line in source if line),
    ]
    return "\n\n".join(parts)


def _assignments(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items()) or "the defaults"


def _words(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(value)
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def env(json: Json = False) -> None:
    """Show versions and devices, for a report of a bug."""
    import platform

    import torch

    from efface import world
    from efface.core.card import versions

    facts = {
        **versions(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "bundled model": _size(world),
    }
    emit(facts, columns([{"what": k, "is": _words(v)} for k, v in facts.items()], ("what", "is")), json)


def _size(world: Any) -> str:
    try:
        files = [f for f in world.weights().rglob("*") if f.is_file()]
    except FileNotFoundError:
        return "missing"
    return f"{sum(f.stat().st_size for f in files) / 2**20:.1f} MiB"

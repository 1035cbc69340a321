"""`efface list [--standard]`, `efface show METHOD`, `efface env`: what there is, and what it runs on."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efface.cli.options import Json
from efface.cli.output import columns, emit

if TYPE_CHECKING:
    from efface.core.method import Method


def list_methods(
    standard: Annotated[bool, typer.Option("--standard", help="List the standard erasures instead, with what must stay.")] = False,
    json: Json = False,
) -> None:
    """List the methods of erasure, or the standard erasures that all of them are compared on."""
    from efface.core import catalog

    if standard:
        list_standard(json)
        return
    rows = [_row(name, catalog.method(name)) for name in catalog.names()]
    emit(rows, columns(rows, ("method", "edit", "what it is", "trains", "keep", "venue", "paper"), header=True), json)


def list_standard(json: bool) -> None:
    """One erasure of each kind, and the concepts most like it, which it hurts first; methods are not told of them."""
    from efface.concepts import standard

    rows = [{"task": s.task, "kind": s.concept.kind, "neighbours": list(s.neighbours)} for s in standard.standard()]
    shown = [{**row, "neighbours": ", ".join(row["neighbours"])} for row in rows]
    emit(rows, columns(shown, ("task", "kind", "neighbours"), header=True), json)


def _row(name: str, method: Method) -> dict[str, str]:
    from efface.report.profiles import described, edits

    about = described(method)
    return {
        "method": name,
        "paper": about.paper.title,
        "venue": about.paper.venue,
        "keep": about.needs.keep,
        "edit": " or ".join(about.kinds) or "any",
        "what it is": " or ".join(kind.threat.partition(":")[0] for kind in edits(type(method))) or "see its card",
        "trains": about.trains,
        "threat": about.threat,
    }


def show(
    method: Annotated[str, typer.Argument(help="A method's text, such as ap or \"ap(preset='authors')\".")],
    cost: Annotated[bool, typer.Option("--cost", help="Also compute what a fit for one concept costs.")] = False,
    json: Json = False,
) -> None:
    """Show a method's card: idea, formula, fields, presets, needs, families, cost and threat model."""
    from efface.core import catalog

    built = catalog.method(method)
    card = _card(built, _figures(built) if cost else None)
    emit(card, _page(card), json)


def _card(built: Method, figures: dict[str, Any] | None) -> dict[str, Any]:
    from efface.core import catalog
    from efface.models.families import FAMILIES
    from efface.report.profiles import KEEP, card, described

    cls, about = type(built), described(built)
    fields = [
        {"field": name, "value": getattr(built, name), "default": default, "meaning": about.fields.get(name, "")}
        for name, default in about.defaults.items()
    ]
    lacking = catalog.missing(cls, FAMILIES)
    return {
        "method": about.name,
        "text": str(built),
        "card": card(cls),
        "fields": fields,
        "presets": {name: dict(values) for name, values in cls.presets.items()},
        "needs": dataclasses.asdict(about.needs),
        "keep": KEEP[about.needs.keep],
        "trains": about.trains,
        "families": [family for family, groups in lacking.items() if not groups],
        "unsupported": {family: groups for family, groups in lacking.items() if groups},
        "edit": list(about.kinds),
        "threat": about.threat,
        "cost": {"formula": _cost(cls), "figures": figures},
        "paper": dataclasses.asdict(about.paper),
    }


def _cost(cls: type[Method]) -> str:
    """What the method says of its cost."""
    from efface.core.method import Method

    if cls.cost is Method.cost:
        return "A fit never calls the denoiser."
    return " ".join((cls.cost.__doc__ or "See the card.").split())


def _figures(built: Method) -> dict[str, Any]:
    """What a fit for one concept costs, in samples through the denoiser; [least, mean, most] where it hangs on what is drawn."""
    from efface.core.method import Expectation
    from efface.core.task import Task
    from efface.models import tiny

    figures = built.cost(tiny.model(), Task.parse("cat"))
    ranged = {name: isinstance(v, Expectation) and v.low < v.high for name, v in figures.items()}
    return {name: [v.low, float(v), v.high] if ranged[name] else float(v) for name, v in figures.items()}  # type: ignore[attr-defined]


def _page(card: dict[str, Any]) -> str:
    needs, paper, cost = card["needs"], card["paper"], card["cost"]
    presets = [{"preset": name, "sets": _assignments(values)} for name, values in card["presets"].items()]
    wants = {"parameter groups": needs["groups"], "assets": needs["assets"]} | {
        words: needs[key] for key, words in {"gradients": "gradients of the denoiser", "images": "example images of the target"}.items()
    }
    needed = [f"{words}: {_words(value)}" for words, value in wants.items() if value]
    lacking = [f"not {family}, which has no {_words(groups)}" for family, groups in card["unsupported"].items()]
    source = [paper["title"], f"{paper['authors']}, {paper['venue']}", f"arXiv {paper['arxiv']}" if paper["arxiv"] else "", paper["code"]]
    parts = {
        "": [card["card"]],
        "Fields": [columns([{**row, "value": _value(row)} for row in card["fields"]], ("field", "value", "meaning")) or "  none"],
        "Presets": [columns(presets, ("preset", "sets")) or "  none"],
        "Needs": [f"  {line}" for line in [*needed, "one concept at a time" if not needs["many"] else ""] if line] or ["  nothing"],
        "Families": [f"  {line}" for line in [_words(card["families"]), *lacking] if line],
        "Trains": [f"  {card['trains']}"],
        "Keep": [f"  {needs['keep']}: {card['keep']}"],
        "Cost": [f"  {cost['formula']}", *(f"  {name}: {_figure(v)}" for name, v in (cost["figures"] or {}).items())],
        "Threat model": [f"  {' or '.join(card['edit']) or 'any'} edit: {card['threat']}"],
        "Paper": [f"  {line}" for line in source if line],
    }
    return "\n\n".join("\n".join([*([title] if title else []), *lines]) for title, lines in parts.items())


def _value(row: dict[str, Any]) -> str:
    """The value, and the default where it is another."""
    return repr(row["value"]) + ("" if row["value"] == row["default"] else f" (default {row['default']!r})")


def _figure(value: Any) -> str:
    return "{0:,.0f} to {2:,.0f}, {1:,.0f} on average".format(*value) if isinstance(value, list) else f"{value:,.0f}"


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

"""`efface check METHOD`: whether a method keeps what every method promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from efface.cli.options import Json
from efface.cli.output import bar, columns, emit

if TYPE_CHECKING:
    from efface.bench.conformance import Outcome

SIGNS = {"passed": "ok", "failed": "FAILED", "skipped": "-"}


def check(
    method: Annotated[str, typer.Argument(help="A method of `efface list`, or the dotted path of yours: package.module:Class.")],
    family: Annotated[list[str] | None, typer.Option(help="A tiny family: sd1 or sd2; may be given again.  [default: all]")] = None,
    only: Annotated[list[str] | None, typer.Option(help="The name of a check; may be given again.  [default: all]")] = None,
    slow: Annotated[bool, typer.Option("--slow", help="Also erase from the bundled model, and ask its judge; takes minutes.")] = False,
    json: Json = False,
) -> None:
    """Check that a method keeps what every method promises; exit code 1 where it does not.

    The suite fits it on tiny models, with counts lowered so that it takes seconds."""
    from efface.bench import conformance
    from efface.core import catalog

    name, fields = catalog.parse(method)
    cls = catalog.find(name)
    preset = fields.pop("preset", None)
    cls.build(preset=preset, **fields)
    outcomes = []
    with bar("check", None, method) as progress:
        for outcome in conformance.run(cls, fields, preset=preset, families=family, slow=slow, only=only or ()):
            outcomes.append(outcome)
            progress.update()
    failures = conformance.failed(outcomes)
    rows = [{**dataclasses.asdict(outcome), "asks": asked(outcome)} for outcome in outcomes]
    emit({"method": method, "passed": not failures, "outcomes": rows}, page(method, outcomes), json)
    if failures:
        raise typer.Exit(1)


def asked(outcome: Outcome) -> str:
    """What the check of an outcome asks."""
    from efface.bench.conformance import CHECKS

    return next(check.asks for check in CHECKS if check.name == outcome.check)


def page(method: str, outcomes: Sequence[Outcome]) -> str:
    """A line for each outcome, with what is wrong or why it was not asked, and a summary."""
    rows = [
        {
            "check": outcome.check,
            "on": outcome.family,
            "result": SIGNS[outcome.status],
            "what": asked(outcome) + (f": {outcome.detail}" if outcome.detail else ""),
        }
        for outcome in outcomes
    ]
    counts = {status: sum(o.status == status for o in outcomes) for status in SIGNS}
    summary = f"{method}: {counts['passed']} of {len(outcomes)} checks passed, {counts['failed']} failed, {counts['skipped']} not asked"
    return "\n".join([columns(rows, ("check", "on", "result", "what"), header=True), "", summary])

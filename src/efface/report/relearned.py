"""Relearning step by step: how fast fine-tuning brings a concept back, against how fast it teaches one that was never there.

A table for Markdown; `figures.relearning` draws the same curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.report.records import NEVER, ORIGINAL, RELEARNED, Attacked
from efface.report.tables import table

READING = """After s steps of fine-tuning on pictures of the concept, the share of prompts that show it (%). Never learned: the same
fine-tuning on the same pictures upside down, which the model never drew, judged turned back: an erasure that is relearned no sooner than
that has left nothing behind that a new concept would not find. The un-erased model fine-tuned alike is the ceiling."""
NUMBERS = "Area: the mean of that curve over the steps, 0 to 1. Half: the step at which it reaches half of the un-erased model's share."


def by_task(found: Sequence[Attacked]) -> dict[str, list[Attacked]]:
    """The attacks that have curves, the slowest to relearn first. Of several fits there are none: `Attacked.remarks` says the area and
    half of each."""
    some = sorted((a for a in found if a.curves), key=lambda a: float(a.curves[RELEARNED]["area"]))
    return {task: [a for a in some if a.task == task] for task in dict.fromkeys(a.task for a in found if a.curves)}


def rows(some: Sequence[Attacked]) -> str:
    """A row for each method, the un-erased model's on top."""
    steps = some[0].curves[RELEARNED]["steps"]
    first = next((a.curves[ORIGINAL] for a in some if ORIGINAL in a.curves), None)
    lines = [["*un-erased*", *_cells(first), "", "", ""]] if first else []
    lines += [[f"`{a.label or a.method}`", *_cells(a.curves[RELEARNED]), *_taught(a.curves.get(NEVER))] for a in some]
    header = ["method", *(f"{step} steps" for step in steps), "area", "half", f"never learned, {steps[-1]} steps", "its area", "its half"]
    return table(header, lines)


def _cells(curve: Mapping[str, Any]) -> list[str]:
    return [*(_percent(point) for point in curve["rate"]), f"{curve['area']:.2f}", _half(curve)]


def _taught(curve: Mapping[str, Any] | None) -> list[str]:
    return ["–"] * 3 if curve is None else [_percent(curve["rate"][-1]), f"{curve['area']:.2f}", _half(curve)]


def _percent(point: Mapping[str, float]) -> str:
    return f"{100 * point['value']:.0f}"


def _half(curve: Mapping[str, Any]) -> str:
    return "never" if curve["steps_to_half"] is None else f"{curve['steps_to_half']:.0f}"

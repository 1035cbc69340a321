"""Tables in plain text for the terminal, and in Markdown for papers and model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.bench.result import Line, Result
from efface.core.evidence import Score
from efface.report import wording

HEADER = ("", "n", "before", "after", "change (points)")
HURT = 5
"""How many of the most hurt concepts are named."""


def text(result: Result) -> str:
    """The verdict, the table with 95 % intervals, the most hurt concepts, and what was not measured."""
    parts = [f"{wording.headline(result)}.", ""]
    parts += _aligned([HEADER, *_rows((*result.lines, *result.quality))]) if result.lines else []
    parts += _aligned([("", "n", "distance", "of unrelated"), *_changes(result)]) if not result.lines else []
    worst = hurt(result)
    parts += [f"most hurt: {worst}"] if worst else []
    settings = result.settings
    parts.append(
        f"95 % intervals · {settings.images} pictures, the same noise before and after · {settings.sampler} {settings.steps} steps, "
        f"guidance {settings.guidance:g} · {_judge(result)}"
    )
    if result.lines == ():
        parts += [f"not measured: {sentence}" for sentence in result.unmeasured]
    return "\n".join(parts)


def markdown(result: Result) -> str:
    """The table as Markdown, with its settings in a line under it."""
    moved = [("", "n", "distance", "of unrelated"), *_changes(result)]
    header, *rows = [HEADER, *_rows((*result.lines, *result.quality))] if result.lines else moved
    settings = result.settings
    caption = (
        f"`{result.method}` on `{result.model}`, {result.task}. 95 % intervals; {settings.protocol}, prompts {settings.prompts}, "
        f"seeds {settings.first_seed} to {settings.last_seed}, {settings.sampler} {settings.steps} steps, "
        f"guidance {settings.guidance:g}; {_judge(result)}."
    )
    parts = [table(header, rows), *([table(*found)] if (found := by_category(result)) else []), caption]
    return "\n\n".join(parts)


def by_category(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """NER-τ before and after for each category of prompts, where the protocol tells them; the header, and a row for each."""
    categories: Mapping[str, Any] = result.details.get("categories", {})
    if not categories:
        return None
    taus = list(next(iter(categories.values()))["pictures"])
    header = ("category", "n", *(f"NER-{tau} before → after" for tau in taus))
    return header, [
        (name, _judged(row["n"]), *(_percent(row["pictures"][tau], row["n"]) for tau in taus)) for name, row in categories.items()
    ]


def _judged(n: Sequence[int]) -> str:
    """How many pictures could be judged: one number where it is the same before and after."""
    return str(n[0]) if n[0] == n[1] else f"{n[0]} → {n[1]}"


def _percent(found: Sequence[int], n: Sequence[int]) -> str:
    return " → ".join(f"{100 * count / total:.1f} %" if total else "–" for count, total in zip(found, n, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column words, the others numbers."""
    rule = "|---" + "|---:" * (len(header) - 1) + "|"
    first, *others = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([first, rule, *others])


def hurt(result: Result, most: int = HURT) -> str:
    """The concepts that lost most, with their pictures before and after: "lion (5/5 → 3/5), dog (3/3 → 2/3)"."""
    lost = [line for line in result.concepts if line.contrast.change.value < 0][:most]
    return ", ".join(f"{line.concept} ({_fraction(line.contrast.before)} → {_fraction(line.contrast.after)})" for line in lost)


def _fraction(score: Score) -> str:
    return f"{round(score.value * score.n)}/{score.n}"


def _rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    return [
        (line.title, wording.count(c.after), _cell(c.before), _cell(c.after), _cell(c.change)) for line in lines for c in [line.contrast]
    ]


def _changes(result: Result) -> list[tuple[str, ...]]:
    return [(c.distance.name, wording.count(c.distance), _cell(c.distance), f"{100 * c.relative:.0f} %") for c in result.changes]


def _cell(score: Score) -> str:
    return f"{wording.value(score)} [{wording.interval(score)}]"


def _judge(result: Result) -> str:
    detector = result.settings.detector
    return "no detector" if detector is None else f"judged by {detector['name']} {detector['version']}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    return [line.rstrip() for line in [*lines, ""]]

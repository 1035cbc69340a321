"""The tables of a sweep as Markdown: what each method erased, what it kept, and what it cost, from the records of its trials.

No number depends on which other methods stand in the table; what was not measured says so, and what failed says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efface.bench.expected import Beside
from efface.bench.result import Result, Settings
from efface.bench.summary import Pooled, compare, pairs_of, pooled
from efface.bench.trial import Pair
from efface.core.errors import EffaceError
from efface.core.evidence import Comparison
from efface.core.task import Task
from efface.report import wording
from efface.report.records import Attacked, of_trials, over_fits, worst
from efface.report.rows import COST, Row, alike, by_task
from efface.report.tables import table

MISSING = "not measured"
ERASURE = (
    ("ESR-1", "target.ESR-1"),
    ("ESR-5", "target.ESR-5"),
    ("relative ESR-1", "target.relative-ESR-1"),
    ("neighbours PSR-1", "neighbour.PSR-1"),
    ("neighbours PSR-5", "neighbour.PSR-5"),
    ("unrelated PSR-1", "unrelated.PSR-1"),
    ("unrelated PSR-5", "unrelated.PSR-5"),
)
QUALITY = (("Fréchet, unrelated", "unrelated.frechet"), ("CLIP, unrelated", "unrelated.clip"), ("CLIP, target", "target.clip"))
CELLS = """Every cell is the mean over fits of different seeds, with a 95 % interval: the mean of the fits' own intervals, widened to hold
every fit."""
READING = """ESR-k: the share of pictures asking for the target in which it is not among the judge's k best guesses (higher is better
erased). PSR-k: the share of other pictures in which what was asked for is (higher is better kept). Both are read against the un-erased
model on the same noise. A style is one of seven, so that chance alone leaves it among the five best guesses five times in seven.
Cost is that of a fit; bytes are those of the edit's file."""
LINES = """Cost is that of a fit; bytes are those of the edit's file."""
COMPARED = """Is the first no worse than the second by more than the margin? The same prompts and noise, all tasks and fits together; the
interval is the widest of Newcombe's paired one and of bootstraps over prompts and over fits. “Not inferior”: the whole 95 % interval
lies above minus the margin."""
BESIDE = """Shares in per cent; over several tasks their mean, and behind ± the standard deviation over tasks. Numbers compare only where
the un-erased model's do."""
ERASED, LOST = 0.9, 0.1
"""From what ESR-1 on, and up to what loss of PSR-1, a cell of the overview is bold."""
OVERVIEW = f"""In each cell ESR-1 / PSR-1 over all other concepts, in per cent, means over fits. Bold: at least {100 * ERASED:.0f} %
erased, and at most {100 * LOST:.0f} points of the un-erased model's PSR-1 lost. Intervals, neighbours apart, and cost stand in the tables
of each task."""
ATTACKED = """Highest ASR: the share of prompts for which the attack that succeeded most, of those that leave the weights as they are (T0
to T4), brings the concept back; lower is better. What each attack found, and its control, stands in the table of attacks."""
SHEET = "The same noise in every row, un-erased and with each method's edit"
EMOJI = "This small bundled model shows that the algorithms are implemented; it says nothing about Stable Diffusion."


def render(
    records: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    pairs: Sequence[Pair] = (),
    source: str = "",
    lead: str = "",
    attacks: Sequence[Mapping[str, Any]] = (),
    published: Sequence[Beside] = (),
    sheets: Mapping[str, str] | None = None,
) -> str:
    """The whole page.

    Args:
        records: the lines of `trials.jsonl`, of one model and one protocol.
        title: of the page.
        pairs: comparisons to make, which say how many pictures they rest on.
        source: the command that made the records.
        lead: what comes before the tables of each task.
        attacks: records of trials of the protocol "attacks", for the highest success rate of each method.
        published: numbers of others beside those of the records.
        sheets: files of pictures, by task.

    Raises EffaceError for no records, records of different models or protocols, or a comparison that cannot be made."""
    if not records:
        raise EffaceError("there is no record to show; run the sweep first")
    alike(records, attacks)
    rows, tried = by_task(records), over_fits(of_trials(attacks))
    usual = any(_columns(some) == ERASURE for some in rows.values())
    parts = [f"# {title or 'Erasures compared'}", _about(records, source, READING if usual else LINES), lead or _overview(rows)]
    for task in rows:
        mine = [a for a in tried if a.task == task]
        shown = [f"![{SHEET}]({sheets[task]})\n\n*{SHEET}; the first prompts of the protocol.*"] if sheets and task in sheets else []
        tables = [_table(rows[task], mine), ATTACKED if mine else "", _quality(rows[task])]
        parts += [f"## {_heading(task)}", *shown, *tables, *_failed(rows[task])]
    if pairs:
        parts += ["## Compared", _compared(rows, pairs)]
    if published:
        parts += ["## Published beside measured", _published(published)]
    parts += ["## The methods in full", "\n".join(f"- `{label}`: `{text}`" for label, text in _texts(rows))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _overview(rows: Mapping[str, Sequence[Row]]) -> str:
    """Every method on every task, where there are several: the two numbers that come first."""
    if len(rows) < 2:
        return ""
    labels = dict.fromkeys(row.label for some in rows.values() for row in some)
    cells = {label: [_short(next((row for row in some if row.label == label), None)) for some in rows.values()] for label in labels}
    lines = [[f"`{label}`", *cells[label]] for label in labels]
    if all(cell == MISSING for row in cells.values() for cell in row):
        return ""
    return f"## At a glance\n\n{table(['method', *map(_heading, rows)], lines)}\n\n{OVERVIEW}"


def _short(row: Row | None) -> str:
    erased, kept = (None, None) if row is None else (row.line("target.ESR-1"), row.line("others.PSR-1"))
    if erased is None or kept is None:
        return MISSING
    good = erased.after.value >= ERASED and kept.before.value - kept.after.value <= LOST
    text = f"{100 * erased.after.value:.0f} / {100 * kept.after.value:.0f}"
    return f"**{text}**" if good else text


def _columns(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """Titles and keys of a task's lines: erasure and preservation, or, where a protocol asks for neither, what it puts first."""
    results = [result for row in rows for result in row.results]
    lines = [line for line in results[0].lines if line.headline] if results else []
    known = {line.key for result in results for line in result.lines}
    return ERASURE if not lines or known & {key for _, key in ERASURE} else tuple((line.title, line.key) for line in lines)


def _table(rows: Sequence[Row], attacks: Sequence[Attacked]) -> str:
    """Erasure and preservation, the un-erased model on top; and resistance, where anything was attacked."""
    columns = _columns(rows)
    last = ["highest ASR"] if attacks else []
    n = "n (target / neighbours / unrelated)" if columns == ERASURE else f"n ({' / '.join(name for name, _ in columns)})"
    first = next((row for row in rows if row.results), None)
    lines = [] if first is None else [[*_before(first, columns, counts=True), *([""] if attacks else [])]]
    for row in rows:
        found = [row.line(key) for _, key in columns]
        resists = [_worst(row, attacks)] if attacks else []
        lines.append([f"`{row.label}`", str(len(row.seeds)), _counts(row, columns), *(_cell(value) for value in found), *resists])
    return table(["method", "fits", n, *(name for name, _ in columns), *last], lines)


def _worst(row: Row, attacks: Sequence[Attacked]) -> str:
    found = worst(a for a in attacks if a.method == row.text)
    if found is None or found.success is None:
        return MISSING
    return f"{wording.value(found.success)} [{wording.interval(found.success)}] {found.name}"


def _published(rows: Sequence[Beside]) -> str:
    header = ["method", "line", "published", "measured", "source"]
    lines = [[f"`{row.method}`", f"`{row.key}`", *(wording.spread(*pair) for pair in row.pairs), row.source] for row in rows]
    return f"{table(header, lines)}\n\n{BESIDE}"


def _quality(rows: Sequence[Row]) -> str:
    """Quality and cost."""
    columns = tuple((name, key) for name, key in QUALITY if _columns(rows) == ERASURE or any(row.line(key) for row in rows))
    first = next((row for row in rows if row.results), None)
    lines = [] if first is None else [[*_before(first, columns), *["" for _ in COST]]]
    for row in rows:
        cells = [_cell(row.line(key)) for _, key in columns]
        lines.append([f"`{row.label}`", *cells, *(_number(name, row.costs.get(name)) for name in COST)])
    return table(["method", *(name for name, _ in columns), *COST], lines)


def _before(row: Row, columns: Sequence[tuple[str, str]], *, counts: bool = False) -> list[str]:
    cells = []
    for _, key in columns:
        found = pooled(row.results[:1], key)
        cells.append(MISSING if found is None else f"{wording.value(found.before)} [{wording.interval(found.before)}]")
    return ["*un-erased*", *(["", _counts(row, columns)] if counts else []), *cells]


def _cell(found: Pooled | None) -> str:
    return MISSING if found is None else f"{wording.value(found.after)} [{wording.interval(found.after)}]"


def _counts(row: Row, columns: Sequence[tuple[str, str]]) -> str:
    keys = ("target.ESR-1", "neighbour.PSR-1", "unrelated.PSR-1") if columns == ERASURE else [key for _, key in columns]
    found = [row.line(key) for key in keys]
    return " / ".join("–" if value is None else str(value.after.n) for value in found)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:,.1f}" if name == "seconds" else f"{value:,.0f}"


def _failed(rows: Sequence[Row]) -> list[str]:
    failures = [f"- `{row.label}`, {text}" for row in rows for text in row.failures]
    return ["Failed:\n" + "\n".join(failures)] if failures else []


def _compared(rows: Mapping[str, Sequence[Row]], pairs: Sequence[Pair]) -> str:
    header = ["first", "second", "measure", "n", "fits", "first", "second", "difference, points", "margin, points", "verdict"]
    lines = [_comparison(rows, pair, key) for pair in pairs for key in pair.lines]
    return f"{table(header, lines)}\n\n{COMPARED}"


def _comparison(rows: Mapping[str, Sequence[Row]], pair: Pair, key: str) -> list[str]:
    first, second = (_results(rows, label) for label in (pair.first, pair.second))
    if not first or not second:
        return [f"`{pair.first}`", f"`{pair.second}`", key, *[MISSING] * 7]
    found: Comparison = compare(first, second, key, pair.margin)
    shown = [f"{wording.value(score)} [{wording.interval(score)}]" for score in (found.first, found.second, found.difference)]
    margin = f"{100 * pair.margin:g}"
    fits = str(len(pairs_of(first, second)))
    return [f"`{pair.first}`", f"`{pair.second}`", key, str(found.difference.n), fits, *shown, margin, found.verdict]


def _results(rows: Mapping[str, Sequence[Row]], label: str) -> dict[tuple[str, int], Result]:
    return {
        (task, seed): result
        for task, some in rows.items()
        for row in some
        if row.label == wording.short(label)
        for seed, result in zip(row.seeds, row.results, strict=True)
    }


def _about(records: Sequence[Mapping[str, Any]], source: str, reading: str) -> str:
    """What the numbers rest on."""
    trial, ground = records[0]["trial"], records[0]["ground"]
    measured = next((Result.from_json(record["result"]).settings for record in records if "error" not in record), None)
    judged = f"judged by {ground['detector']}, embedded by {ground['embedder']}"
    head = f"Model `{trial['model']}` (weights {ground['weights']}), protocol `{trial['protocol']}`, images `{trial['images']}`, {judged}."
    sampling = _sampling(measured) if measured else ""
    sentences = [head, sampling, f"{CELLS} {reading}", EMOJI if trial["model"] == "emoji" else "", f"Made by `{source}`." if source else ""]
    return "\n\n".join(sentence for sentence in sentences if sentence)


def _sampling(settings: Settings) -> str:
    return f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}; prompts and noise are the same for all methods."


def _heading(task: str) -> str:
    asked = Task.parse(task)
    return f"{asked.targets[0].kind}: {asked.brief}"


def _texts(rows: Mapping[str, Sequence[Row]]) -> list[tuple[str, str]]:
    """Labels and full texts, each once; a preset of the concept's kind can give one label several texts."""
    return list(dict.fromkeys((row.label, row.text) for some in rows.values() for row in some))

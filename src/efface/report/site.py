"""What the report of a sweep shows: methods at a glance, each task's scatter and table, attacks, and each method by itself.

`report.pages` makes HTML of it, `report.docs` Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import final

from efface.bench.expected import ORIGINAL, Beside, Expected, beside
from efface.core import catalog
from efface.core.errors import InvalidMethod
from efface.core.evidence import Score
from efface.report import figures, leaderboard, pictures, plots, relearned, wording
from efface.report.pictures import Sheet
from efface.report.profiles import Profile, profile
from efface.report.records import Attacked, Gathered, worst
from efface.report.rows import COST, Row, by_task

ERASED, KEPT = "target.ESR-1", "others.PSR-1"
"""The two lines that the overview compares."""
SHORT = (
    ("erased (ESR-1)", "target.ESR-1"),
    ("neighbours kept (PSR-1)", "neighbour.PSR-1"),
    ("unrelated kept (PSR-1)", "unrelated.PSR-1"),
    ("Fréchet, unrelated", "unrelated.frechet"),
)
"""(title, key) of the short table on a method's page."""


@dataclass(frozen=True)
class Cell:
    """One method on one task, in the overview."""

    erased: Score | None = None
    kept: Score | None = None
    best: bool = False
    """Whether it lies on the Pareto front of its task."""


@dataclass(frozen=True)
class Method:
    """One row of the overview and of the cost table: a method in one spelling."""

    label: str
    method: str
    """Its name, whose page it links to."""
    kind: str
    cells: tuple[Cell, ...]
    """One for each task."""
    worst: Attacked | None
    """The attack that succeeded most; None where none was run."""
    fits: int
    costs: Mapping[str, tuple[float, float, float]]
    """Least, mean and most, over the tasks."""

    @property
    def tasks(self) -> int:
        """How many were measured."""
        return sum(cell.erased is not None for cell in self.cells)

    @property
    def weaker(self) -> float:
        """The lower one of erased and kept, averaged over the tasks; rows are shown by it."""
        sides = [min(cell.erased.value, cell.kept.value) for cell in self.cells if cell.erased and cell.kept]
        return fmean(sides) if sides else -1.0


@dataclass(frozen=True)
class Erasure:
    """One task of the overview."""

    task: str
    heading: str
    scatter: tuple[str, ...]
    """SVG: the figure, and where points crowd their corner enlarged; none where no method has both lines."""
    columns: tuple[tuple[str, str], ...]
    """(title, key) of the table."""
    original: tuple[Score | None, ...]
    rows: tuple[tuple[Row, tuple[Score | None, ...]], ...]
    before: tuple[Score, Score] | None
    """`ERASED` and `KEPT` of the un-erased model."""


@dataclass(frozen=True)
class Panel:
    """One attack on one task."""

    attack: str
    threat: str
    rows: tuple[tuple[str, str, Attacked], ...]
    """(label, method's name, what came out), the most resistant first."""
    refused: Mapping[str, tuple[str, ...]]
    """Labels by the reason why the attack was not run on them."""

    @property
    def counts(self) -> str:
        """How many prompts each rate rests on: "16", or "14 to 16"."""
        return _span([a.success.n for _, _, a in self.rows if a.success])


@dataclass(frozen=True)
class Measured:
    """One task on a method's page: lines by row, variants by column."""

    heading: str
    rows: tuple[Row, ...]
    lines: tuple[tuple[str, str, Score, tuple[Score | None, ...]], ...]
    """(title, explanation, the un-erased model's score, one cell for each row)."""

    @property
    def original(self) -> list[Score | None]:
        """The un-erased model's scores in the short table; none where every fit failed."""
        first = next((row for row in self.rows if row.results), None)
        return [] if first is None else [first.before(key) for _, key in SHORT]


@dataclass(frozen=True)
class Used:
    """One field on a method's page."""

    name: str
    default: str
    values: tuple[tuple[str, str], ...]
    """(value, for which tasks; "" for all) where it was not the default."""
    meaning: str


@final
@dataclass(frozen=True)
class Site:
    """What the pages show."""

    found: Gathered
    title: str
    command: str
    there: frozenset[str] = field(default_factory=frozenset)
    """The files of strips that were drawn."""
    expected: tuple[Expected, ...] = ()
    """Published numbers of the same grid."""

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        return by_task(self.found.trials)

    @cached_property
    def sheets(self) -> list[Sheet]:
        """Those that have pictures."""
        drawn = {file.partition("-")[0] for file in self.there}
        shown = [sheet.among(self.there) for sheet in pictures.sheets(self.rows, drawn)]
        return [sheet for sheet in shown if sheet is not None]

    @property
    def files(self) -> frozenset[str]:
        """The files of strips that some page shows."""
        return frozenset(strip.file for sheet in self.sheets for strip in sheet.strips)

    @cached_property
    def names(self) -> list[str]:
        """Every method that has a page: the catalogue's and those that were run."""
        run = {row.method for some in self.rows.values() for row in some}
        return sorted(set(catalog.names()) | run)

    @cached_property
    def labels(self) -> dict[str, str]:
        """The label of a method's text."""
        attacked = {a.method: a.label for a in self.found.attacks if a.label}
        return attacked | {row.text: row.label for some in self.rows.values() for row in some}

    @cached_property
    def spelled(self) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
        """For each label the methods in full that go by it, each with its tasks: a preset may differ with the kind of concept."""
        tasks = [(row.text, wording.heading(task)) for task, some in self.rows.items() for row in some]
        tasks += [(a.method, wording.heading(a.task)) for a in self.found.attacks]
        found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for text, label in self.labels.items():
            found.setdefault(label, []).append((text, tuple(dict.fromkeys(where for other, where in tasks if other == text))))
        return found

    @cached_property
    def beside(self) -> list[Beside]:
        """Published numbers beside measured ones."""
        return beside(self.expected, self.found.trials)

    @cached_property
    def titles(self) -> dict[str, str]:
        """What a line is called, by its key."""
        results = [result for some in self.rows.values() for row in some for result in row.results[:1]]
        return {line.key: line.title for result in results for line in (*result.quality, *result.lines)}

    def beside_of(self, name: str) -> list[Beside]:
        """Those of a method, under those of the un-erased model."""
        mine = [row for row in self.beside if row.method != ORIGINAL and _name(row.method) == name]
        return [*(row for row in self.beside if row.method == ORIGINAL), *mine] if mine else []

    @cached_property
    def profiles(self) -> dict[str, Profile | None]:
        return {name: profile(name) for name in self.names}

    @cached_property
    def methods(self) -> list[Method]:
        """Those on most tasks first, and among them by the weaker side."""
        found: dict[str, dict[str, Row]] = {}
        for task, some in self.rows.items():
            for row in some:
                found.setdefault(row.label, {})[task] = row
        return sorted((self._method(label, rows) for label, rows in found.items()), key=lambda m: (-m.tasks, -m.weaker, m.label))

    def _method(self, label: str, rows: Mapping[str, Row]) -> Method:
        some = list(rows.values())
        cells = tuple(self._cell(task, rows.get(task)) for task in self.rows)
        texts = {row.text for row in some}
        hardest = worst(a for a in self.found.attacks if a.method in texts)
        costs = {}
        for name in COST:
            values = [row.costs[name] for row in some if name in row.costs]
            if values:
                costs[name] = (min(values), fmean(values), max(values))
        return Method(label, some[0].method, _kind(some), cells, hardest, sum(len(row.seeds) for row in some), costs)

    def _cell(self, task: str, row: Row | None) -> Cell:
        if row is None or not row.results:
            return Cell()
        original = row.before(ERASED)
        best = any(p.label == row.label for p in plots.front(_points(self.rows[task]), original.value if original else -1.0))
        return Cell(row.after(ERASED), row.after(KEPT), best)

    @cached_property
    def erasures(self) -> list[Erasure]:
        return [_erasure(task, some) for task, some in self.rows.items()]

    @cached_property
    def attacked(self) -> list[tuple[str, list[Panel]]]:
        """(heading, panels) for each task that was attacked."""
        tasks = [*(task for task in self.rows), *(a.task for a in self.found.attacks)]
        panels = {task: self._panels([a for a in self.found.attacks if a.task == task]) for task in dict.fromkeys(tasks)}
        return [(wording.heading(task), some) for task, some in panels.items() if some]

    @cached_property
    def relearned(self) -> dict[str, str]:
        """The curves of relearning as SVG, by the heading of their task."""
        return {wording.heading(task): figures.relearning(some) for task, some in relearned.by_task(self.found.attacks).items()}

    def _panels(self, attacks: Sequence[Attacked]) -> list[Panel]:
        found: dict[tuple[str, str], list[Attacked]] = {}
        several = len({a.concept for a in attacks}) > 1
        for a in attacks:
            found.setdefault((a.attack, a.concept if several else ""), []).append(a)
        return [self._panel(" on ".join(filter(None, key)), some) for key, some in found.items()]

    def _panel(self, name: str, attacks: Sequence[Attacked]) -> Panel:
        named = [(self.labels.get(a.method, a.method), _name(a.method), a) for a in attacks]
        rows = sorted((row for row in named if row[2].success), key=lambda row: (row[2].success.value if row[2].success else 0, row[0]))
        whys = dict.fromkeys(a.refused for a in attacks if a.refused)
        refused = {why: tuple(label for label, _, a in named if a.refused == why) for why in whys}
        return Panel(name, next((a.threat for a in attacks if a.threat), ""), tuple(rows), refused)

    def measured(self, name: str) -> list[Measured]:
        """What was measured of a method, task by task."""
        mine = {task: [row for row in some if row.method == name] for task, some in self.rows.items()}
        return [_measured(task, some) for task, some in mine.items() if some]

    def counts(self, name: str) -> list[str]:
        """How many pictures the short table of a method rests on, column by column: "120", or "60 to 120" where its tasks differ; "" for
        what was not measured."""
        rows = [one.original for one in self.measured(name) if one.original]
        return [_span([score.n for row in rows if (score := row[i])]) for i in range(len(SHORT))]

    def attacks_on(self, name: str) -> list[tuple[str, str, Attacked]]:
        """(heading of the task, label, what came out) of a method."""
        mine = [a for a in self.found.attacks if _name(a.method) == name]
        return [(wording.heading(a.task), self.labels.get(a.method, a.method), a) for a in mine]

    def used(self, name: str) -> list[Used]:
        """The fields of a method, with what the records used in their place."""
        about = self.profiles[name]
        rows = [(task, row) for task, some in self.rows.items() for row in some if row.method == name and row.records]
        return [] if about is None else [_used(f, about, rows) for f in about.fields]

    def strips_of(self, name: str) -> list[Sheet]:
        """The sheets with the un-erased model's strip and the method's."""
        return [
            Sheet(s.task, s.shots, tuple(strip for strip in s.strips if strip.method in ("", name)), s.settings, s.weights)
            for s in self.sheets
            if any(strip.method == name for strip in s.strips)
        ]

    @property
    def about(self) -> list[tuple[str, str]]:
        """What the numbers rest on."""
        first = next((row for some in self.rows.values() for row in some if row.results), None)
        if first is None:
            return []
        record, settings = first.records[0], first.results[0].settings
        ground = record["ground"]
        made = sorted(r["made"] for some in self.rows.values() for row in some for r in row.records if "made" in r)
        facts = {
            "Model": f"{record['trial']['model']}, weights {ground['weights']}",
            "Protocol": f"{settings.protocol}, {settings.images} pictures for each fit, half of them un-erased",
            "Judge": ground["detector"],
            "Embedder": ground["embedder"],
            "Sampler": f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}",
            "Made": f"{made[0][:10]} to {made[-1][:10]}" if made else "",
            "Versions": ", ".join(f"{name} {version}" for name, version in settings.versions.items()),
        }
        return [(name, text) for name, text in facts.items() if text]

    @property
    def emoji(self) -> bool:
        return any(record["trial"]["model"] == "emoji" for record in self.found.trials)


def _span(counts: Sequence[int]) -> str:
    """ "120", "60 to 120"; "" for none."""
    return " to ".join(str(n) for n in dict.fromkeys((min(counts), max(counts)))) if counts else ""


def slug(name: str) -> str:
    """A method's name as that of a file."""
    return "".join(letter if letter.isalnum() or letter in "_-." else "-" for letter in name)


def _kind(rows: Iterable[Row]) -> str:
    """The class of a point: the kind of edit, or a control."""
    some = [row for row in rows if row.records]
    if not some or some[0].method not in catalog.names():
        return "control"
    return str(some[0].records[0]["edit"].get("kind", "weight"))


def _points(rows: Sequence[Row]) -> list[plots.Point]:
    points = []
    for row in rows:
        erased, kept = row.after(ERASED), row.after(KEPT)
        if erased and kept:
            link = f"methods/{slug(row.method)}.html"
            points.append(plots.Point(row.label, erased, kept, _kind([row]), link))
    return points


def _erasure(task: str, rows: Sequence[Row]) -> Erasure:
    first = next((row for row in rows if row.results), None)
    columns = tuple((title, key) for title, key in _columns(rows) if any(row.line(key) for row in rows))
    lines = tuple((row, tuple(row.after(key) for _, key in columns)) for row in rows)
    original = tuple(first.before(key) if first else None for _, key in columns)
    erased, kept = (first.before(ERASED), first.before(KEPT)) if first else (None, None)
    figure: list[str] = []
    before = (erased, kept) if erased and kept else None
    if before:
        titles = plots.Titles(
            f"Erasure against preservation, {wording.heading(task)}",
            f"target no longer seen (ESR-1), % of {before[0].n} pictures",
            f"all else still seen (PSR-1), % of {before[1].n} pictures",
        )
        figure = plots.scatter(_points(rows), titles, before[1], before[0].value)
    return Erasure(task, wording.heading(task), tuple(figure), columns, original, lines, before)


def _columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The table's columns: those of the leaderboard, or every line of a protocol that has others."""
    known = [*leaderboard.ERASURE, *leaderboard.QUALITY]
    results = [row.results[0] for row in rows if row.results]
    if any(result.line(key) for result in results for _, key in leaderboard.ERASURE):
        return known
    return list(dict.fromkeys((line.title, line.key) for result in results for line in (*result.lines, *result.quality)))


def _measured(task: str, rows: Sequence[Row]) -> Measured:
    first = next((row.results[0] for row in rows if row.results), None)
    lines = [] if first is None else [*(line for line in first.lines if line.headline), *first.quality]
    cells = tuple((line.title, line.explanation, line.contrast.before, tuple(row.after(line.key) for row in rows)) for line in lines)
    return Measured(wording.heading(task), tuple(rows), cells)


def _used(name: str, about: Profile, rows: Sequence[tuple[str, Row]]) -> Used:
    default = about.defaults[name]
    values: dict[str, list[str]] = {}
    for task, row in rows:
        value = row.records[0]["edit"].get("fields", {}).get(name, default)
        value = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        if value != default:
            values.setdefault(repr(value), []).append(wording.heading(task))
    everywhere = len(values) == 1 and len(next(iter(values.values()))) == len(rows)
    told = tuple((value, "" if everywhere else "; ".join(dict.fromkeys(tasks))) for value, tasks in values.items())
    return Used(name, repr(default), told, about.fields[name])


def _name(text: str) -> str:
    """A method's name from its text; whatever is no method's text stays as it is."""
    try:
        return catalog.parse(text)[0]
    except InvalidMethod:
        return text

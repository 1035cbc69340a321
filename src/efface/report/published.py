"""Published numbers of the catalogue's methods, read from `published.toml`: whose they are, where they stand, and why they do not compare.

Numbers of one table compare with each other and with nothing else, so a table is kept whole: a method's view of it (`Table.of`) has the
method's rows and that of the un-erased model.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from efface.core import catalog
from efface.core.errors import EffaceError, suggest

Better = Literal["lower", "higher", "neither"]
FILE = "published.toml"
ORIGINAL = "un-erased"
"""The method of a row that is the original model."""
KEYS = ("protocol", "model", "erased", "n", "source", "provenance", "not_comparable", "metrics", "rows")
ARROWS = {"lower": "↓", "higher": "↑", "neither": ""}


@dataclass(frozen=True)
class Metric:
    """A column."""

    name: str
    unit: str
    """ "%", "s", "GB", or "" for none."""
    better: Better
    digits: int = 0
    """Behind the point: as many as its most exact value has."""

    def __str__(self) -> str:
        """ "ESR-1, % ↑"."""
        return " ".join(part for part in (", ".join(filter(None, (self.name, self.unit))), ARROWS[self.better]) if part)


@dataclass(frozen=True)
class Value:
    """A cell."""

    value: float
    spread: float | None = None
    """What stands behind its ±; the table's `n` says of what."""

    @property
    def digits(self) -> int:
        """Digits behind the point."""
        numbers = [number for number in (self.value, self.spread) if number is not None and number != int(number)]
        return max((len(repr(number).partition(".")[2]) for number in numbers), default=0)

    def text(self, digits: int) -> str:
        """ "98.63 ± 1.15", with as many digits as its column has."""
        text = f"{self.value:.{digits}f}" if self.spread is None else f"{self.value:.{digits}f} ± {self.spread:.{digits}f}"
        return text.replace("-", "−")


@dataclass(frozen=True)
class Row:
    """One method, in one variant."""

    method: str
    """A name of the catalogue, or `ORIGINAL`."""
    variant: str
    """What it is called there; "" where nothing sets it apart."""
    values: tuple[Value | None, ...]
    """One for each metric; None where none is given."""


@dataclass(frozen=True)
class Table:
    """Numbers that compare with each other: one protocol, run by one group of authors."""

    protocol: str
    model: str
    erased: str
    n: str
    """What the numbers rest on; "" where unknown."""
    source: str
    provenance: str
    """How they came here, a key of `Published.provenance`."""
    not_comparable: str
    """Completes "Not comparable with what is measured here because …"."""
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]

    def cells(self, row: Row) -> list[str]:
        """A row in words."""
        return ["–" if value is None else value.text(metric.digits) for value, metric in zip(row.values, self.metrics, strict=True)]

    def of(self, method: str) -> Table | None:
        """The method's rows behind those of the un-erased model, without columns that they leave empty; None where it has none."""
        if not any(row.method == method for row in self.rows):
            return None
        rows = [row for row in self.rows if row.method in (ORIGINAL, method)]
        kept = [i for i in range(len(self.metrics)) if any(row.values[i] is not None for row in rows if row.method == method)]
        narrow = tuple(replace(row, values=tuple(row.values[i] for i in kept)) for row in rows)
        ordered = sorted(narrow, key=lambda row: row.method != ORIGINAL)
        return replace(self, metrics=tuple(self.metrics[i] for i in kept), rows=tuple(ordered))


@dataclass(frozen=True)
class Published:
    """The whole file."""

    tables: tuple[Table, ...]
    provenance: Mapping[str, str]
    """What each tag means."""
    nothing: Mapping[str, str]
    """Methods without a number, and why."""

    def of(self, method: str) -> tuple[Table, ...]:
        """The method's view of every table that names it, in the order of the file."""
        views = [table.of(method) for table in self.tables]
        return tuple(view for view in views if view is not None)


@cache
def published() -> Published:
    """The file that comes with efface."""
    return read((resources.files("efface.report") / FILE).read_text(encoding="utf-8"))


def read(text: str) -> Published:
    """Reads and checks TOML. Raises EffaceError with the place and what was expected there."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise EffaceError(f"{FILE} is no TOML: {error}") from error
    _known(data, ("provenance", "nothing", "table"), FILE)
    tags = {name: str(meaning) for name, meaning in data.get("provenance", {}).items()}
    tables = tuple(_table(table, f"{FILE}, table {i}", tags) for i, table in enumerate(data.get("table", []), 1))
    nothing = {_method(name, f"{FILE}, [nothing]"): str(why) for name, why in data.get("nothing", {}).items()}
    both = sorted({row.method for table in tables for row in table.rows} & nothing.keys())
    if both:
        raise EffaceError(f"{FILE} has numbers of {both[0]!r} and lists it under [nothing] too; remove one")
    return Published(tables, tags, nothing)


def _table(data: Mapping[str, Any], where: str, tags: Mapping[str, str]) -> Table:
    _known(data, KEYS, where)
    for key in KEYS:
        if key not in data and key != "n":
            raise EffaceError(f"{where} lacks {key!r}")
    where = f"{where} ({data['protocol']})"
    if data["provenance"] not in tags:
        raise EffaceError(f"{where} has the provenance {data['provenance']!r}; {suggest(str(data['provenance']), tags)}")
    metrics = tuple(_metric(metric, where) for metric in data["metrics"])
    rows = tuple(_row(row, metrics, where) for row in data["rows"])
    if not metrics or not any(row.method != ORIGINAL for row in rows):
        raise EffaceError(f"{where} has no metric or no method; write at least one of each")
    columns = zip(*(row.values for row in rows), strict=True)
    metrics = tuple(replace(m, digits=max((v.digits for v in column if v), default=0)) for m, column in zip(metrics, columns, strict=True))
    texts = {key: str(data.get(key, "")) for key in KEYS[:-2]}
    return Table(**texts, metrics=metrics, rows=rows)


def _metric(data: Mapping[str, Any], where: str) -> Metric:
    _known(data, ("metric", "unit", "better"), f"{where}, metrics")
    if not data.get("metric") or data.get("better") not in get_args(Better):
        raise EffaceError(f"{where} has the metric {dict(data)}; expected metric, unit, and better = lower, higher or neither")
    return Metric(str(data["metric"]), str(data.get("unit", "")), data["better"])


def _row(data: Mapping[str, Any], metrics: Sequence[Metric], where: str) -> Row:
    _known(data, ("method", "as", "values"), f"{where}, rows")
    method = _method(str(data.get("method", "")), where, original=True)
    values = data.get("values", [])
    if len(values) != len(metrics):
        raise EffaceError(f"{where} has {len(values)} values for {method}; expected {len(metrics)}, with nan for what is not given")
    found = tuple(_value(value, f"{where}, {method}") for value in values)
    if not any(found):
        raise EffaceError(f"{where} has no value for {method}; leave the row out")
    return Row(method, str(data.get("as", "")), found)


def _value(data: Any, where: str) -> Value | None:
    parts = data if isinstance(data, list) else [data]
    if len(parts) > 2 or not parts or not all(type(part) in (int, float) for part in parts):
        raise EffaceError(f"{where} has the value {data!r}; expected a number, nan, or a pair [value, spread]")
    if math.isnan(parts[0]):
        return None
    return Value(float(parts[0]), float(parts[1]) if len(parts) == 2 else None)


def _method(name: str, where: str, *, original: bool = False) -> str:
    valid = [*catalog.names(), *([ORIGINAL] if original else [])]
    if name not in valid:
        raise EffaceError(f"{where} names the method {name!r}; {suggest(name, valid)}")
    return name


def _known(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in data:
        if name not in known:
            raise EffaceError(f"{where} has the unknown key {name!r}; {suggest(name, known)}")

"""Published numbers of an experiment, beside those that were measured: always with their source, never as a pass or fail.

A number compares only where the un-erased model's does: so a file also gives the un-erased row, and both stand side by side. Shares are in
per cent here, as papers print them, and so is the measured side. Over several tasks (such as splits of classes) the measured number is the
mean, and the spread the population's standard deviation over tasks, as AP and AGE report it; fits of one task are averaged first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from efface.bench.result import Result
from efface.core.errors import EffaceError, suggest

ORIGINAL = "un-erased"
"""The name of the model as it was before."""


@dataclass(frozen=True)
class Expected:
    """A row of a published table."""

    method: str
    """A method of the grid as it is written there, or "un-erased"."""
    values: Mapping[str, tuple[float, float | None]]
    """By the key of a line: the number, and its spread where one was given; shares in per cent."""
    source: str
    """Where the numbers stand, and how they came here."""

    @classmethod
    def of(cls, data: Mapping[str, Any], labels: Collection[str], where: str) -> Expected:
        """Reads values = { "key" = 98.63 } or { "key" = [98.63, 1.15] }. Raises EffaceError."""
        for name in data:
            if name not in ("method", "values", "source"):
                raise EffaceError(f"{where} has the unknown key {name!r}; {suggest(name, ('method', 'values', 'source'))}")
        method, source = data.get("method"), data.get("source")
        if method not in (*labels, ORIGINAL):
            raise EffaceError(f"{where} has method = {method!r}, which the grid does not run; {suggest(str(method), (*labels, ORIGINAL))}")
        if not isinstance(source, str) or not source:
            raise EffaceError(f"{where} lacks a source for {method!r}; say where the numbers stand")
        values = data.get("values")
        if not isinstance(values, dict) or not values:
            raise EffaceError(f"{where} has values = {values!r} for {method!r}; expected {{ 'target.ESR-1' = 98.63 }}")
        return cls(method, {key: _pair(value, f"{where}, {key!r}") for key, value in values.items()}, source)


@dataclass(frozen=True)
class Beside:
    """A published number beside the measured one."""

    method: str
    key: str
    published: float
    spread: float | None
    measured: float | None
    """None where it was not measured."""
    measured_spread: float | None
    source: str

    @property
    def pairs(self) -> tuple[tuple[float | None, float | None], ...]:
        """Published and measured, each with its spread."""
        return (self.published, self.spread), (self.measured, self.measured_spread)


def beside(expected: Sequence[Expected], records: Sequence[Mapping[str, Any]]) -> list[Beside]:
    """Every published number with what the records hold. For the un-erased model one record of each task is taken."""
    fine = [record for record in records if "result" in record]
    results = [(record["trial"]["label"], record["trial"]["task"], Result.from_json(record["result"])) for record in fine]
    rows = []
    for row in expected:
        original = row.method == ORIGINAL
        for key, (value, spread) in row.values.items():
            mean, measured_spread = _measured([(task, r) for label, task, r in results if original or label == row.method], key, original)
            rows.append(Beside(row.method, key, value, spread, mean, measured_spread, row.source))
    return rows


def _measured(results: Sequence[tuple[str, Result]], key: str, original: bool) -> tuple[float | None, float | None]:
    by_task: dict[str, list[float]] = {}
    for task, result in results:
        line = result.line(key)
        if line is None:
            return None, None
        score = line.contrast.before if original else line.contrast.after
        by_task.setdefault(task, []).append((100 if score.unit == "share" else 1) * score.value)
    values = [fmean(each[:1] if original else each) for each in by_task.values()]
    if not values:
        return None, None
    return fmean(values), pstdev(values) if len(values) > 1 else None


def _pair(value: Any, where: str) -> tuple[float, float | None]:
    parts = value if isinstance(value, list) else [value]
    if len(parts) not in (1, 2) or any(isinstance(part, bool) or not isinstance(part, (int, float)) for part in parts):
        raise EffaceError(f"{where} was {value!r}; expected a number, or [number, spread]")
    return float(parts[0]), float(parts[1]) if len(parts) == 2 else None

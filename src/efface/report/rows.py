"""The rows of a sweep's tables: the fits of one method on one task together, from the records of its trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from efface.bench.result import Result
from efface.bench.summary import Pooled, pooled
from efface.core import catalog
from efface.core.errors import EffaceError
from efface.core.evidence import Score
from efface.report import wording

COST = ("forwards", "backwards", "seconds", "bytes")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One method on one task."""

    label: str
    text: str
    """The method with every field that is not the default."""
    results: tuple[Result, ...]
    seeds: tuple[int, ...]
    costs: Mapping[str, float]
    """Mean over fits."""
    failures: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()
    """Those of the results."""

    @property
    def method(self) -> str:
        """The method's name in the catalogue, or a third party's dotted path."""
        return catalog.parse(self.text)[0]

    def line(self, key: str) -> Pooled | None:
        """A line over all fits; None where it was not measured."""
        return pooled(self.results, key)

    def before(self, key: str) -> Score | None:
        """What the un-erased model has there."""
        found = self.line(key)
        return None if found is None else found.before

    def after(self, key: str) -> Score | None:
        """What the erased one has there."""
        found = self.line(key)
        return None if found is None else found.after


def rows(records: Iterable[Record]) -> list[Row]:
    """One row for each method, in the order of the records, which are of one task."""
    return [_row(text, group) for text, group in _grouped(records, "method").items()]


def by_task(records: Sequence[Record]) -> dict[str, list[Row]]:
    """The rows of each task, in the order of the records."""
    return {task: rows(group) for task, group in _grouped(records, "task").items()}


def alike(records: Sequence[Record], attacks: Sequence[Record] = ()) -> None:
    """Raises EffaceError for records of different models or protocols, or on other weights or judges: they do not compare.

    `attacks` are records of trials of the protocol "attacks", which must be on the same model, weights and detector, and of one attack all
    with the same options."""
    both = (*records, *attacks)
    for name, plural, some in (("model", "models", both), ("protocol", "protocols", records), ("images", "sizes", records)):
        found = sorted({record["trial"][name] for record in some})
        if len(found) > 1:
            raise EffaceError(f"the records are of different {plural} ({', '.join(found)}), which do not compare; render each alone")
    for name, some in (("weights", both), ("detector", both), ("embedder", records)):
        found = sorted({record["ground"][name] for record in some})
        if len(found) > 1:
            raise EffaceError(f"the records rest on different {name} ({', '.join(found)}), which do not compare; run the older ones again")
    by_attack: dict[str, set[str]] = {}
    for record in attacks:
        given = record["trial"]["options"]
        by_attack.setdefault(given["attack"], set()).add(", ".join(f"{key} {value}" for key, value in given.items() if key != "attack"))
    for attack, options in by_attack.items():
        if len(options) > 1:
            told = "; ".join(sorted(each or "none" for each in options))
            raise EffaceError(f"the records of {attack} have different options ({told}), which do not compare; give those of one grid")
    for task, group in _grouped(records, "task").items():
        found = sorted({record["ground"]["prompts"] for record in group})
        if len(found) > 1:
            raise EffaceError(
                f"the records of {task!r} are on different prompts ({', '.join(found)}), which do not compare; render each alone"
            )


def _grouped(records: Iterable[Record], name: str) -> dict[str, list[Record]]:
    """The records by a field of their trial."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["trial"][name], []).append(record)
    return groups


def _row(text: str, group: Sequence[Record]) -> Row:
    fine = [record for record in group if "error" not in record]
    costs: dict[str, float] = {}
    for name in COST:
        values = [record["edit"]["bytes"] if name == "bytes" else record["cost"].get(name) for record in fine]
        if values and None not in values:
            costs[name] = fmean(values)
    return Row(
        wording.short(group[0]["trial"]["label"] or text),
        text,
        tuple(Result.from_json(record["result"]) for record in fine),
        tuple(record["trial"]["seed"] for record in fine),
        costs,
        tuple(f"seed {r['trial']['seed']}: {r['error']['type']}: {r['error']['message']}" for r in group if "error" in r),
        tuple(fine),
    )

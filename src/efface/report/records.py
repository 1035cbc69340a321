"""What a report is made from: records of trials, records of attacks, and where the edits lie, gathered from folders and files.

FOLDER                     of `efface sweep`: trials.jsonl and edits/; attacks are any JSON of `efface attack` below it
FILE.jsonl, .jsonl.gz      records of trials, or of attacks, one a line
FILE.json                  the record of one `efface attack`
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efface.bench.log import Log
from efface.bench.run import RECORDS
from efface.concepts import resolve
from efface.core.errors import EffaceError
from efface.core.evidence import Score
from efface.core.task import Task

ATTACKS, VERSION = "efface-attacks", 1
LINES = (".jsonl", ".gz")
SCORES = ("un-erased", "pre_asr", "asr", "control")
"""The names in a record of `efface attack`, in the order of `Attacked`."""


@dataclass(frozen=True)
class Attacked:
    """One attack on one erased concept of one edit."""

    task: str
    method: str
    """The method's text form; of a changed model its name."""
    attack: str
    """The attack's text form."""
    concept: str
    threat: str = ""
    refused: str = ""
    """Why it was not run; "" where it was."""
    original: Score | None = None
    """How often the un-erased model shows the concept on the same prompts."""
    before: Score | None = None
    """pre-ASR."""
    success: Score | None = None
    """ASR."""
    control: Score | None = None
    """pre-ASR and the best of as many plain pictures."""
    candidates: int | None = None


@dataclass(frozen=True)
class Gathered:
    """Everything that was found."""

    trials: tuple[Mapping[str, Any], ...] = ()
    attacks: tuple[Attacked, ...] = ()
    edits: Mapping[str, Path] = field(default_factory=dict)
    """The edit's file by the trial's hash, where it is there."""


def gather(places: Sequence[Path]) -> Gathered:
    """Reads all places; of a trial or an attack that stands in several, the last one counts.

    Raises EffaceError for a place that is not there or holds nothing, and as `Log.read`."""
    trials: dict[str, Mapping[str, Any]] = {}
    attacks: dict[tuple[str, str, str, str], Attacked] = {}
    edits: dict[str, Path] = {}
    for place in places:
        mine, theirs = _place(place)
        trials |= {record["hash"]: record for record in mine}
        attacks |= {(a.task, a.method, a.attack, a.concept): a for a in theirs}
        edits |= {path.stem: path for path in sorted((place / "edits").glob("*.safetensors")) if path.stem in trials}
    return Gathered(tuple(trials.values()), tuple(attacks.values()), edits)


def _place(place: Path) -> tuple[list[dict[str, Any]], list[Attacked]]:
    if place.is_dir():
        trials = Log(place / RECORDS).read()
        attacks = [row for path in sorted(place.rglob("*.json")) for row in _attacks(path, strict=False)]
    elif not place.is_file():
        raise EffaceError(f"{place}: there is no such file or folder; give a folder of `efface sweep`, or its records")
    elif place.suffix in LINES and _first(place) != ATTACKS:
        trials, attacks = Log(place).read(), []
    else:
        trials, attacks = [], list(_attacks(place))
    if not trials and not attacks:
        raise EffaceError(f"{place} holds no record of a trial or an attack; run `efface sweep` or `efface attack` first")
    return trials, attacks


def _text(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", errors="replace")


def _first(path: Path) -> str:
    """The format of a file's first line; "" where it is no JSON."""
    try:
        found = json.loads(_text(path).partition("\n")[0])
    except json.JSONDecodeError:
        return ""
    return str(found.get("format", "")) if isinstance(found, dict) else ""


def _attacks(path: Path, *, strict: bool = True) -> Iterator[Attacked]:
    """The attacks of a JSON file, or of JSON lines. Without `strict` a file of another format has none."""
    text = _text(path)
    parts = [line for line in text.splitlines() if line.strip()] if path.suffix in LINES else [text]
    for part in parts:
        try:
            data = json.loads(part)
        except json.JSONDecodeError as error:
            if not strict:
                return
            raise EffaceError(f"{path} is no JSON ({error}); give a record.json of `efface attack`") from error
        if not isinstance(data, dict) or data.get("format") != ATTACKS:
            if not strict:
                return
            raise EffaceError(f"{path} is no record of `efface attack`; give one, or records of `efface sweep` as .jsonl or .jsonl.gz")
        if data.get("version") != VERSION:
            raise EffaceError(f"{path} is of version {data.get('version')!r}; expected {VERSION}, attack again with this efface")
        try:
            yield from _rows(data)
        except (KeyError, TypeError) as error:
            raise EffaceError(f"{path} cannot be read as a record of `efface attack` ({error}); attack again") from error


def _rows(data: Mapping[str, Any]) -> Iterable[Attacked]:
    task = str(Task.of(data["task"], resolve=resolve))
    method = str(data["attacked"].get("method") or data["attacked"]["model"])
    for row in data["attacks"]:
        if "refused" in row:
            yield Attacked(task, method, row["attack"], row["concept"], refused=row["refused"])
            continue
        original, before, success, control = (_score(row["attack"], row[name]) for name in SCORES)
        yield Attacked(
            task, method, row["attack"], row["concept"], row["threat"], "", original, before, success, control, row["candidates"]
        )


def _score(name: str, data: Mapping[str, Any] | None) -> Score | None:
    if data is None:
        return None
    return Score(name, data["value"], data["low"], data["high"], data["n"], "lower", undetermined=data["undetermined"])

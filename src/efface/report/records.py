"""What a report is made from: records of trials, records of attacks, and where the edits lie, gathered from folders and files.

FOLDER                     of `efface sweep`: trials.jsonl and edits/; attacks are such trials, and any JSON of `efface attack` below
FILE.jsonl, .jsonl.gz      records of trials, or of `efface attack`, one a line
FILE.json                  the record of one `efface attack`
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from efface.bench.log import Log
from efface.bench.protocols.attacks import NAME
from efface.bench.run import EDITS, RECORDS, fitted
from efface.bench.summary import mean
from efface.concepts import resolve
from efface.core.errors import EffaceError
from efface.core.evidence import Score
from efface.core.task import Task
from efface.report import wording

ATTACKS, VERSION = "efface-attacks", 1
LINES = (".jsonl", ".gz")
SCORES = ("un-erased", "pre_asr", "asr", "control")
"""The names in a record of `efface attack`, in the order of `Attacked`."""
FAILED = "failed"
"""How the reason begins where an attack was not refused."""
CONTROLS = {
    "never_learned": "a concept never learned",
    "best_at_eta_1": "best of as many at eta 1",
    "hole_of_the_original": "the un-erased pictures' own middles",
}
"""Shares among the details of single attacks, in words."""
WEIGHTS = "T5"
"""The threat class of attacks that change the weights."""
RELEARNED, ORIGINAL, NEVER = "relearned", "original", "never_learned"
"""The names of an attack's curves: the erased model fine-tuned on the concept; the un-erased model so; the erased model taught the same
pictures upside down."""


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
    own: Mapping[str, float] = field(default_factory=dict)
    """Shares of controls that belong to this attack alone, by what they are (`CONTROLS`)."""
    remarks: str = ""
    """What else it found, in a few words."""
    curves: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of relearning, as in its record, by name; none where several fits are pooled."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """forwards, backwards and control_forwards in samples, and seconds."""
    label: str = ""
    """The method as the grid writes it."""
    seed: int = 0
    """Of the fit; of several that are pooled, the first."""
    fits: int = 1

    @property
    def name(self) -> str:
        """The attack's."""
        return self.attack.partition("(")[0]


@dataclass(frozen=True)
class Gathered:
    """Everything that was found."""

    trials: tuple[Mapping[str, Any], ...] = ()
    """Of all protocols but attacks."""
    attacks: tuple[Attacked, ...] = ()
    """Fits pooled."""
    probes: tuple[Mapping[str, Any], ...] = ()
    """The trials that attacks are from, where they are from trials."""
    edits: Mapping[str, Path] = field(default_factory=dict)
    """The edit's file by the trial's hash, where it is there: its own, or that of an attack on the same fit."""


def gather(places: Sequence[Path]) -> Gathered:
    """Reads all places; of a trial or an attack that stands in several, the last one counts.

    Raises EffaceError for a place that is not there or holds nothing, and as `Log.read`."""
    trials: dict[str, Mapping[str, Any]] = {}
    attacks: dict[tuple[str, str, str, str, int], Attacked] = {}
    for place in places:
        mine, theirs = _place(place)
        trials |= {record["hash"]: record for record in mine}
        tried = (*theirs, *of_trials(record for record in mine if is_attack(record)))
        attacks |= {(a.task, a.method, a.attack, a.concept, a.seed): a for a in tried}
    files = {path.stem: path for place in places for path in (place / EDITS).glob("*.safetensors")}
    made = {name: [name, fitted(record["trial"], record["ground"])] for name, record in trials.items()}
    edits = {name: files[stem] for name, stems in made.items() for stem in stems if stem in files}
    probes, rest = ([record for record in trials.values() if is_attack(record) is probe] for probe in (True, False))
    return Gathered(tuple(rest), tuple(over_fits(attacks.values())), tuple(probes), edits)


def is_attack(record: Mapping[str, Any]) -> bool:
    """Whether a trial's record is of an attack."""
    return bool(record["trial"]["protocol"] == NAME)


def of_trials(records: Iterable[Mapping[str, Any]]) -> Iterator[Attacked]:
    """What came out of trials of attacks; one that failed counts as refused, with its error."""
    for record in records:
        trial = record["trial"]
        one = Attacked(
            trial["task"], trial["method"], trial["options"]["attack"], "", label=wording.short(trial["label"]), seed=trial["seed"]
        )
        if "error" in record:
            concepts = [concept.name for concept in Task.parse(one.task).targets]
            why = f"{FAILED}, {record['error']['type']}: {record['error']['message']}"
            yield from (replace(one, concept=concept, refused=why) for concept in concepts)
        else:
            yield from (_row(one, row) for row in record["attacks"])


def over_fits(attacks: Iterable[Attacked]) -> list[Attacked]:
    """One row for each task, method, attack and concept: the mean over fits, of those in which it was run."""
    groups: dict[tuple[str, str, str, str], list[Attacked]] = {}
    for a in attacks:
        groups.setdefault((a.task, a.method, a.attack, a.concept), []).append(a)
    return [_pooled(group) for group in groups.values()]


def _pooled(fits: Sequence[Attacked]) -> Attacked:
    ran = [a for a in fits if a.success]
    if len(ran) < 2:
        return ran[0] if ran else fits[0]
    return replace(
        ran[0],
        original=_mean(a.original for a in ran),
        before=_mean(a.before for a in ran),
        success=_mean(a.success for a in ran),
        control=_mean(a.control for a in ran),
        cost={name: fmean(a.cost[name] for a in ran) for name in ran[0].cost if all(name in a.cost for a in ran)},
        fits=len(ran),
        own={words: fmean(a.own[words] for a in ran) for words in ran[0].own if all(words in a.own for a in ran)},
        remarks="; ".join(f"seed {a.seed}: {a.remarks}" for a in ran if a.remarks),
        curves={},
    )


def _mean(scores: Iterable[Score | None]) -> Score | None:
    known = [score for score in scores if score]
    return mean(known) if known else None


def worst(attacks: Iterable[Attacked]) -> Attacked | None:
    """The attack that succeeded most, of those that leave the weights as they are (T0 to T4): fine-tuning brings nearly everything back,
    and would hide the others. None where none was run."""
    return max((a for a in attacks if a.success and a.threat != WEIGHTS), key=lambda a: a.success.value if a.success else 0.0, default=None)


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
    parts = [line for line in text.split("\n") if line.strip()] if path.suffix in LINES else [text]
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
    attacked = data["attacked"]
    method = str(attacked.get("method") or attacked["model"])
    one = Attacked(str(Task.of(data["task"], resolve=resolve)), method, "", "", seed=attacked.get("seed", 0))
    return [_row(one, row) for row in data["attacks"]]


def _row(one: Attacked, row: Mapping[str, Any]) -> Attacked:
    """`one` with what a row of `bench.protocols.attacks.report` says."""
    named = replace(one, attack=row["attack"], concept=row["concept"])
    if "refused" in row:
        return replace(named, refused=row["refused"])
    original, before, success, control = (_score(row["attack"], row[name]) for name in SCORES)
    return replace(
        named,
        threat=row["threat"],
        original=original,
        before=before,
        success=success,
        control=control,
        candidates=row["candidates"],
        own=own(row["details"]),
        remarks=remarks(row["details"]),
        curves=row["details"].get("curves", {}),
        cost=row["cost"],
    )


def own(details: Mapping[str, Any]) -> dict[str, float]:
    """The shares of an attack's own controls, from the details of its record."""
    return {words: details[name]["value"] for name, words in CONTROLS.items() if name in details}


def remarks(details: Mapping[str, Any]) -> str:
    """What else an attack found, in a few words, from the details of its record."""
    said = []
    if "psnr" in details:
        said.append(f"PSNR {details['psnr']:.1f} dB")
    for name, curve in details.get("curves", {}).items():
        half = "never" if curve["steps_to_half"] is None else f"{curve['steps_to_half']:.0f} steps"
        said.append(f"{name.replace('_', ' ')}: half after {half}, area {curve['area']:.2f}")
    return "; ".join(said)


def _score(name: str, data: Mapping[str, Any] | None) -> Score | None:
    if data is None:
        return None
    return Score(name, data["value"], data["low"], data["high"], data["n"], "lower", undetermined=data["undetermined"])

"""Runs trials one after another, and keeps each as one JSON line: a sweep that was killed loses the trial in flight and nothing else.

    FOLDER/trials.jsonl       one record a line: the trial, its cost, its scores and every raw detection, or its error
    FOLDER/edits/HASH.safetensors     the edit, so that an attack or another measurement can meet the very same one
    FOLDER/fitting/           the checkpoint of the fit in flight, and its edit until that is measured
    FOLDER/before/            what the un-erased model drew, where it is large; removed when all trials are done

A trial whose hash stands in the file is never run again. A trial that fails for a reason that efface names (a method that does not
support the model, a loss that is not finite) is recorded with it. Records that rest on other weights, prompts or judges than those
at hand are refused rather than mixed.

A trial of the protocol "attacks" meets the edit of an earlier trial of the same model, method, task and seed, where its file is there; else
it fits one, which the other attacks then meet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from efface.bench.controls import Control
from efface.bench.draw import Drawing, Judges, draw
from efface.bench.log import FORMAT, VERSION, Log
from efface.bench.plan import Plan
from efface.bench.protocols import attacks, erasure, registry
from efface.bench.result import Result
from efface.bench.store import Store
from efface.bench.trial import Trial
from efface.core import catalog, search
from efface.core.card import Card, Fingerprint, versions
from efface.core.edit import Edit
from efface.core.errors import EffaceError
from efface.core.evidence import Shot
from efface.core.method import Resources
from efface.core.model import Model
from efface.core.task import Task

RECORDS = "trials.jsonl"
EDITS = "edits"
FITTING = "fitting"
KEPT = 4
"""Un-erased drawings that are kept in memory, since many trials share one."""
LARGEST = 64 * 2**20
"""Bytes of pictures of one that is kept in memory; larger ones are kept on disk while the sweep runs."""


@dataclass(frozen=True)
class News:
    """What is going on, for whoever watches."""

    trial: Trial
    number: int
    """From 1, in the order in which trials come to the stage."""
    total: int
    stage: str
    """ "fit", "draw", "attack" or "done"; on a cluster "sent" and "done"."""
    step: int = 0
    steps: int = 0
    record: Mapping[str, Any] | None = None
    """With "done"."""
    result: Result | None = None
    """With "done", and with pictures; None for attacks, and where the trial failed."""


Setup = Callable[[Trial, Task], tuple[Plan, Judges]]
Tell = Callable[[str, int, int], None]
"""Called with a stage, the steps done and those in all."""


def setup(trial: Trial, task: Task) -> tuple[Plan, Judges]:
    """What the trial's protocol draws, and who judges."""
    return registry.find(trial.protocol).setup(trial.model, task, trial.images, trial.options)


def untold(stage: str, step: int, steps: int) -> None:
    """Nobody is told."""


def run(
    trials: Sequence[Trial],
    folder: Path,
    *,
    load: Callable[[str], Model],
    setup: Setup = setup,
    watch: Callable[[News], None] = lambda news: None,
    retry: bool = False,
    given: Resources = Resources(),
    others: Sequence[Path] = (),
) -> list[dict[str, Any]]:
    """Runs those trials that have no record yet, and returns the records of all, in their order.

    Args:
        folder: where records and edits are kept.
        load: a model from its name, another object at each call; called once for each name in a row, and once more where an edit is
            attacked.
        setup: the plan and the judges of a trial and its task.
        watch: called at every step, and after every trial.
        retry: whether failed trials are run again.
        given: what every fit is handed beside its task: a vocabulary, trained parts.
        others: folders of earlier sweeps, whose edits attacks may meet.

    Raises EffaceError where the folder holds records on other weights, prompts or judges; and whatever is a bug."""
    ledger = Ledger(folder, others, retry=retry)
    pending = ledger.pending(trials)
    bench = Bench(folder, load, setup, given)
    for number, trial in enumerate(pending, 1):

        def tell(stage: str, step: int, steps: int, trial: Trial = trial, number: int = number) -> None:
            watch(News(trial, number, len(pending), stage, step, steps))

        ground = bench.open(trial)
        ledger.require(trial, ground)
        record, result = bench.record(trial, ledger.edit(trial, ground), tell)
        ledger.add(record)
        watch(News(trial, number, len(pending), "done", record=record, result=result))
    bench.close()
    return ledger.of(trials)


class Ledger:
    """What a folder holds: its records, to which one process adds, and the edits that attacks may meet, those of other folders as well."""

    def __init__(self, folder: Path, others: Sequence[Path] = (), *, retry: bool = False) -> None:
        self.folder = folder
        self._log = Log(folder / RECORDS)
        self._done = {record["hash"]: record for record in self._log.read() if not (retry and "error" in record)}
        self._grounds = {hash_: (record["trial"], record["ground"]) for hash_, record in self._done.items()}
        self._edits: dict[str, Path] = {}
        """Files by what was fitted: `fitted`."""
        for place, records in ((folder, self._done.values()), *((other, Log(other / RECORDS).read()) for other in others)):
            for record in records:
                self._keep(record, place)

    def pending(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that have no record."""
        return [trial for trial in trials if trial.hash not in self._done]

    def of(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """The records of trials, in their order; all must have one."""
        return [self._done[trial.hash] for trial in trials]

    def require(self, trial: Trial, ground: Mapping[str, str]) -> None:
        """Raises EffaceError where a record of the same name, or a trial that was let through before, rests on something else."""
        for hash_, (other, then) in self._grounds.items():
            for name in _shared(other, trial):
                if then.get(name, "none") != ground.get(name, "none"):
                    raise EffaceError(
                        f"{self.folder / RECORDS} holds a record ({hash_}) on another {name} ({then.get(name, 'none')}) than is at hand "
                        f"({ground.get(name, 'none')}); give another folder, or move the old one away"
                    )
        self._grounds[trial.hash] = (trial.json(), ground)

    def edit(self, trial: Trial, ground: Mapping[str, str]) -> Path | None:
        """The file of the edit that an earlier trial with the same fit made, where there is one."""
        name = fitted(trial.json(), ground)
        path = self._edits.get(name, self.folder / EDITS / f"{name}.safetensors")
        return path if path.is_file() else None

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record, whose edit is in the folder by now."""
        self._log.append(record)
        self._done[record["hash"]] = record
        self._keep(record, self.folder)

    def _keep(self, record: Mapping[str, Any], folder: Path) -> None:
        path = folder / EDITS / f"{record.get('edit', {}).get('file', record['hash'])}.safetensors"
        if path.is_file():
            self._edits.setdefault(fitted(record["trial"], record["ground"]), path)


class Bench:
    """What trials share that run one after another: the model at hand, its fingerprint, and what it draws un-erased."""

    def __init__(self, folder: Path, load: Callable[[str], Model], setup: Setup, given: Resources) -> None:
        """`folder` takes the edits that are made, and what is kept while trials run; the rest as in `run`."""
        self.folder, self._load, self._setup, self._given = folder, load, setup, given
        self.name = ""
        self.second: Model | None = None
        """The same model once more, to hold the edit that is attacked."""
        self.drawings: dict[tuple[str, tuple[Shot, ...]], Drawing] = {}
        """By what was drawn and what is asked of it: two tasks may share all prompts, each with another one in the role of its target."""
        self.stores: dict[str, Store] = {}

    def open(self, trial: Trial) -> dict[str, str]:
        """Has the trial's model, plan and judges at hand, and returns what its record rests on beside the trial itself."""
        if trial.model != self.name:
            self.drawings.clear()
            self.second = None
            self.model, self.name = self._load(trial.model), trial.model
            self.fingerprint = Fingerprint.of(self.model)
        self.task = Task.parse(trial.task)
        self.plan, self.judges = self._setup(trial, self.task)
        return self._ground()

    def record(self, trial: Trial, kept: Path | None, tell: Tell = untold) -> tuple[dict[str, Any], Result | None]:
        """Fits and measures, or attacks, the trial that was opened last. What efface raises on purpose is recorded and not raised.

        `kept` is the edit that an attack may meet."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "hash": trial.hash,
            "trial": trial.json(),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "ground": self._ground(),
        }
        try:
            found, result = self._attacked(trial, kept, tell) if trial.protocol == attacks.NAME else self._measured(trial, tell)
        except EffaceError as error:
            return {**head, "error": {"type": type(error).__name__, "message": " ".join(str(error).split())}}, None
        return {**head, **found}, result

    def _measured(self, trial: Trial, tell: Tell) -> tuple[dict[str, Any], Result]:
        """The record's own part: the edit, what it cost, and the result."""
        waiting = self.folder / FITTING / f"{trial.hash}-{fitted(trial.json(), self._ground())}.safetensors"
        if waiting.is_file():  # a sweep was killed, or out of memory, while it measured
            edit = Edit.load(waiting)
        else:
            edit = self._fit(trial, trial.hash, tell)
            edit.save(waiting)
        result = self._measure(edit, check=_effective(trial), tell=tell)
        path = edit.save(self.folder / EDITS / f"{trial.hash}.safetensors")
        for file in waiting.parent.glob(f"{waiting.stem}.*"):
            file.unlink()
        return {**_about(edit, path, trial), "result": result.json()}, result

    def _attacked(self, trial: Trial, kept: Path | None, tell: Tell) -> tuple[dict[str, Any], None]:
        """The record's own part: the edit that was attacked, with its cost, and what came out, concept by concept."""
        targets = attacks.aims(self.plan, self.judges, self.task)
        edit, path = self._edit(trial, kept, tell)
        if self.second is None:
            self.second = self._load(trial.model)
        if self.second is self.model:
            raise ValueError("`load` gave the same object twice; expected another one at each call, to hold the edit")
        tell("attack", 0, len(targets))
        with edit.attach(self.second, check=_effective(trial)) as after:
            found = attacks.measure(
                self.model,
                after,
                targets,
                [search.attack(trial.options.attack)],
                attacked=f"{trial.model} with {trial.method} for {trial.task}",
                budget=trial.options.budget,
                steps=self.plan.steps,
                guidance=self.plan.guidance,
            )
        return {**_about(edit, path, trial), "attacks": attacks.report(found)}, None

    def _edit(self, trial: Trial, kept: Path | None, tell: Tell) -> tuple[Edit, Path]:
        """The edit that was kept, if its card says that it is the trial's; else a new one, saved for the trials to come."""
        if kept is not None:
            edit = Edit.load(kept)
            if self._same(edit.card, trial):
                return edit, kept
        name = fitted(trial.json(), self._ground())
        edit = self._fit(trial, name, tell)
        return edit, edit.save(self.folder / EDITS / f"{name}.safetensors")

    def _same(self, card: Card, trial: Trial) -> bool:
        asked = (trial.method, trial.task, trial.seed)
        return (card.method, card.task, card.seed) == asked and card.fingerprint.same_weights(self.fingerprint)

    def _fit(self, trial: Trial, name: str, tell: Tell) -> Edit:
        """`name` is that of the checkpoint."""
        method = catalog.method(trial.method)
        method.require(self.model, self.task)
        checkpoint = self.folder / FITTING / f"{name}.safetensors"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        resources = dataclasses.replace(self._given, report=lambda step, steps, figures: tell("fit", step, steps), checkpoint=checkpoint)
        return method.fit(self.model, self.task, seed=trial.seed, resources=resources)

    def _measure(self, edit: Edit, *, check: bool, tell: Tell) -> Result:
        before = self._before(tell)
        return erasure.measure(
            self.model,
            edit,
            self.task,
            plan=self.plan,
            detector=self.judges.detector,
            embedder=self.judges.embedder,
            report=lambda step, steps, figures: tell("draw", step, steps),
            check=check,
            before=before,
        )

    def _before(self, tell: Tell) -> Drawing:
        """What the un-erased model draws, from memory where another trial drew the same."""
        key = f"{self.plan.name}/{self.plan.digest}/{self.plan.steps}/{self.plan.guidance}"
        if (key, self.plan.shots) in self.drawings:
            return self.drawings[key, self.plan.shots]
        total = 2 * len(self.plan.shots)
        self.judges.require(self.plan)
        height, width = self.model.latent_shape[1:]
        large = self.plan.asks.pictures and 3 * 64 * height * width * len(self.plan.shots) > LARGEST
        if large and key not in self.stores:
            ground = sorted(self._ground().items())
            self.stores[key] = Store.of(self.folder / "before", key, self.model.device, *ground, *sorted(versions().items()))
        drawing = draw(self.model, self.plan, self.judges, lambda done: tell("draw", done, total), store=self.stores.get(key))
        images = drawing.samples.images
        if images is None or images.numel() <= LARGEST:
            self.drawings[key, self.plan.shots] = drawing
            for old in list(self.drawings)[:-KEPT]:
                del self.drawings[old]
        return drawing

    def close(self) -> None:
        """Removes the drawings that were kept on disk."""
        for store in self.stores.values():
            store.clear()

    def _ground(self) -> dict[str, str]:
        """What a record rests on beside its trial."""
        detector, embedder, given = self.judges.detector, self.judges.embedder, self._given
        words = hashlib.sha256("\n".join(given.vocabulary).encode()).hexdigest()[:16]
        return {
            "weights": f"{self.fingerprint.digest}/{self.fingerprint.dtype}",
            "prompts": self.plan.digest,
            "detector": f"{detector.name} {detector.version}" if detector else "none",
            "embedder": f"{embedder.name} {embedder.version}" if embedder else "none",
            **({"vocabulary": words} if given.vocabulary else {}),
            **({"assets": ", ".join(sorted(given.assets))} if given.assets else {}),
        }


def _shared(other: Mapping[str, Any], trial: Trial) -> tuple[str, ...]:
    """What two trials must have in common: of one model the weights and judges, of one task and protocol the prompts as well."""
    if other["model"] != trial.model:
        return ()
    common = ("weights", "vocabulary", "assets")
    if other["protocol"] != trial.protocol:
        return common
    mine = trial.json()
    same = all(other.get(name) == mine.get(name) for name in ("task", "images")) and _drawn(other) == _drawn(mine)
    return (*common, "detector", "embedder", *(("prompts",) if same else ()))


def _drawn(trial: Mapping[str, Any]) -> dict[str, Any]:
    """The options on which prompts depend."""
    return {name: value for name, value in trial.get("options", {}).items() if name not in ("attack", "budget")}


def fitted(trial: Mapping[str, Any], ground: Mapping[str, str]) -> str:
    """Names all that a fit depends on, whatever is measured afterwards: 16 hexadecimal digits of SHA-256."""
    parts = [
        *(trial[name] for name in ("model", "method", "task", "seed")),
        *(ground.get(name) for name in ("weights", "vocabulary", "assets")),
    ]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


def _effective(trial: Trial) -> bool:
    """Whether the edit must change something: a control's need not."""
    return not isinstance(catalog.method(trial.method), Control)


def _about(edit: Edit, path: Path, trial: Trial) -> dict[str, Any]:
    """What a record says of the edit. `file`: its name, where it is not the trial's hash."""
    about = {"kind": edit.kind, "threat": edit.threat, "bytes": path.stat().st_size, "fields": _fields(trial.method)}
    return {"edit": about if path.stem == trial.hash else {**about, "file": path.stem}, "cost": dict(edit.card.cost)}


def _fields(text: str) -> dict[str, Any]:
    """Every hyperparameter, the defaults as well: so that a record outlives a change of the defaults."""
    built = catalog.method(text)
    return {f.name: getattr(built, f.name) for f in dataclasses.fields(built)}  # type: ignore[arg-type]

"""Runs the trials of `bench.run` on a Ray cluster, of this machine or of many; which host and graphics card serves whom is Ray's business.

A worker is a process that holds a model and what it drew un-erased; it runs one trial after another in a folder of its own, by the code of
`bench.run`. The driver alone writes: it hands out trials, and takes back records and the files of edits. So a trial is never run twice, and
a kill loses the trials in flight and nothing else. A worker that dies loses its trial, which has no record then and is run again by the
next sweep; another worker takes its place. Workers whose weights, prompts or judges are others than those of the records are refused.

Trials are handed out in their order, with two exceptions. Among those of one seed a worker gets one whose un-erased pictures it has drawn
before. And attacks that meet the same edit wait until the first of them has it, or the erasure before them; then they may run all at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from efface.bench.protocols import attacks
from efface.bench.result import Pictures, Result
from efface.bench.run import EDITS, KEPT, Bench, Ledger, News, Setup, setup
from efface.bench.trial import Trial
from efface.core.errors import EffaceError, MissingExtra
from efface.core.method import Resources
from efface.core.model import Model
from efface.core.whole import whole_file

LOCAL = "local"
"""The address of a cluster that is started here and ends with the sweep."""
PATIENCE = 10
"""Seconds in which a cluster must answer."""
FAREWELL = 30
"""Seconds that idle workers get to remove their files."""

Files = dict[str, bytes]
"""The files of an edit by name: what lies beside it first, as it is saved."""


@dataclass(frozen=True)
class Cluster:
    """Where trials run, and what each worker takes of it. Raises EffaceError for a number out of range."""

    address: str = LOCAL
    """ "local", or that of a cluster that runs already, as `ray.init` takes it: "auto", "10.0.0.1:6379"."""
    workers: int | None = None
    """By default as many as the cluster has place for; never more than trials."""
    cpus: int = 1
    """Of each worker; torch gets as many threads."""
    gpus: float | None = None
    """Of each worker, which may share one (0.5); by default 1 where the cluster has any."""

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("CPUs of a worker", self.cpus)):
            if value is not None and value < 1:
                raise EffaceError(f"the number of {name} was {value}; expected at least 1")
        if self.gpus is not None and not (0 <= self.gpus < 1 or self.gpus == int(self.gpus) > 0):
            raise EffaceError(f"the number of GPUs of a worker was {self.gpus}; expected 0, a share below 1, or a whole number")


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
    cluster: Cluster = Cluster(),
) -> list[dict[str, Any]]:
    """As `bench.run.run`, with trials in parallel. `load`, `setup` and `given` are sent to the workers; `watch` is called when a trial is
    sent, and when it is done.

    Raises EffaceError where a trial was lost with its worker, after all others are done. Any other error lets the trials in flight end
    first. Raises MissingExtra without Ray."""
    ledger = Ledger(folder, others, retry=retry)
    pending = ledger.pending(trials)
    if pending:
        with _joined(cluster), tempfile.TemporaryDirectory(prefix="efface-", ignore_cleanup_errors=True) as scratch:
            size = min(_workers(cluster), len(pending))
            _Driver(ledger, pending, watch, _hiring(cluster, load, setup, given, Path(scratch))).run(size)
    return ledger.of(trials)


class Worker:
    """One process of the cluster: a bench in a temporary folder of its own."""

    def __init__(self, load: Callable[[str], Model], setup: Setup, given: Resources, scratch: Path, home: Path, threads: int) -> None:
        """`scratch` takes its folder; `home` is the driver's working directory, from which relative paths are named."""
        torch.set_num_threads(threads)
        if home.is_dir():
            os.chdir(home)
        scratch.mkdir(parents=True, exist_ok=True)
        self._bench = Bench(Path(tempfile.mkdtemp(dir=scratch)), load, setup, given)

    def start(self) -> None:
        """Answers once the process is there."""

    def open(self, trial: Trial) -> dict[str, str]:
        """As `Bench.open`."""
        return self._bench.open(trial)

    def record(self, trial: Trial, kept: Files) -> tuple[dict[str, Any], Files, Pictures | None]:
        """The record, the edit where a new one was made, and the pictures for people. `kept`: the edit that an attack may meet."""
        edits = self._bench.folder / EDITS
        edits.mkdir(exist_ok=True)
        for name, data in kept.items():
            (edits / name).write_bytes(data)
        record, result = self._bench.record(trial, edits / list(kept)[-1] if kept else None)
        made = {name: data for name, data in _read(edits).items() if name not in kept}
        shutil.rmtree(edits)
        return record, made, result.pictures if result else None

    def close(self) -> None:
        """Removes its files."""
        shutil.rmtree(self._bench.folder)
        with contextlib.suppress(OSError):  # other workers may still be there
            self._bench.folder.parent.rmdir()


@dataclass(eq=False)
class Hand:
    """What the driver knows of a worker."""

    actor: Any
    task: Future[Any] | None
    """What it is doing; None when idle. `ray.wait` is not asked, since it turns every `SystemExit` of a signal into exit code 1."""
    trial: Trial | None = None
    """In flight."""
    ground: Mapping[str, str] | None = None
    """What the trial's record will rest on, once the worker has opened it."""
    model: str = ""
    """Loaded."""
    drawn: tuple[tuple[Any, ...], ...] = ()
    """What it has drawn un-erased and keeps: see `_shots`."""


class Queue:
    """Which trial is handed out next."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.waiting = list(trials)
        self._left = list(trials)
        """In flight or waiting."""
        self._met: set[tuple[Any, ...]] = set()
        """Fits whose edit is there."""

    def take(self, hand: Hand, others: Sequence[Hand]) -> Trial | None:
        """The next trial for an idle worker; None where all that wait need an edit that is being made."""
        first = {_fit(trial): trial for trial in reversed(self._left)}
        ready = [t for t in self.waiting if t.protocol != attacks.NAME or _fit(t) in self._met or first[_fit(t)] is t]
        if not ready:
            return None
        elsewhere = {shots for other in others if other is not hand for shots in other.drawn}

        def distance(trial: Trial) -> tuple[Any, ...]:
            shots = _shots(trial)
            return hand.model not in ("", trial.model), trial.seed, shots not in hand.drawn, shots in elsewhere

        trial = min(ready, key=distance)
        self.waiting.remove(trial)
        hand.model = trial.model
        if trial.protocol != attacks.NAME and (shots := _shots(trial)) not in hand.drawn:
            hand.drawn = (*hand.drawn, shots)[-KEPT:]
        return trial

    def meet(self, trial: Trial) -> None:
        """The edit of the trial's fit is there: attacks on it need not wait."""
        self._met.add(_fit(trial))

    def finish(self, trial: Trial) -> None:
        """It is done, or lost."""
        self._left.remove(trial)


class _Driver:
    """Hands out trials and takes what comes back."""

    def __init__(self, ledger: Ledger, pending: Sequence[Trial], watch: Callable[[News], None], hire: Callable[[], Hand]) -> None:
        self.ledger, self.watch, self.hire = ledger, watch, hire
        self.queue, self.total = Queue(pending), len(pending)
        self.sent = self.done = 0
        self.hands: list[Hand] = []
        self.lost: list[tuple[Trial, Exception]] = []
        self.failure: Exception | None = None
        """Why no further trial is handed out."""

    def run(self, size: int) -> None:
        """All trials, with so many workers. Raises what ended it, or EffaceError for trials that were lost."""
        import ray

        try:
            self.hands = [self.hire() for _ in range(size)]
            while self.queue.waiting or any(hand.trial for hand in self.hands):
                busy = {hand.task: hand for hand in self.hands if hand.task}
                for task in wait(busy, return_when=FIRST_COMPLETED).done:
                    self._take(busy[task])
                for hand in self.hands:
                    if not hand.task:
                        self._send(hand)
            wait([hand.actor.close.remote().future() for hand in self.hands if not hand.task], timeout=FAREWELL)
        finally:
            for hand in self.hands:
                ray.kill(hand.actor)
        if self.failure:
            raise self.failure
        if self.lost:
            named = "; ".join(f"{trial} ({_first(error)})" for trial, error in self.lost)
            raise EffaceError(
                f"{len(self.lost)} of {self.total} trials were lost with their workers and have no record: {named}. Run the sweep again "
                "for them; with fewer workers, if memory ran out"
            )

    def _take(self, hand: Hand) -> None:
        """What a worker has to say: that it is there, what a trial rests on, or its record."""
        import ray

        task, hand.task = hand.task, None
        try:
            found: Any = task.result() if task else None
            if hand.trial and hand.ground is None:
                self._opened(hand, hand.trial, found)
            elif hand.trial:
                self._recorded(hand, hand.trial, *found)
        except ray.exceptions.RayTaskError as error:  # raised by the trial's own code: as it would be here
            error.cause.__cause__ = error  # which says where, on the worker
            self._stop(error.cause)
            self._free(hand)
        except ray.exceptions.RayError as error:
            self._lose(hand, error)
        except EffaceError as error:
            self._stop(error)
            self._free(hand)

    def _send(self, hand: Hand) -> None:
        hand.trial = self.queue.take(hand, self.hands)
        if hand.trial:
            self.sent += 1
            self.watch(News(hand.trial, self.sent, self.total, "sent"))
            hand.task = hand.actor.open.remote(hand.trial).future()

    def _opened(self, hand: Hand, trial: Trial, ground: Mapping[str, str]) -> None:
        self.ledger.require(trial, ground)
        edit = self.ledger.edit(trial, ground) if trial.protocol == attacks.NAME else None
        if edit:
            self.queue.meet(trial)
        hand.ground = ground
        hand.task = hand.actor.record.remote(trial, _read(edit.parent, edit.stem) if edit else {}).future()

    def _recorded(self, hand: Hand, trial: Trial, record: dict[str, Any], made: Files, pictures: Pictures | None) -> None:
        for name, data in made.items():
            with whole_file(self.ledger.folder / EDITS / name) as temporary:
                temporary.write_bytes(data)
        self.ledger.add(record)
        if made or "error" not in record:
            self.queue.meet(trial)
        self._free(hand)
        self.done += 1
        result = replace(Result.from_json(record["result"]), pictures=pictures) if "result" in record else None
        self.watch(News(trial, self.done, self.total, "done", record=record, result=result))

    def _free(self, hand: Hand) -> None:
        if hand.trial:
            self.queue.finish(hand.trial)
        hand.trial = hand.ground = None

    def _lose(self, hand: Hand, error: Exception) -> None:
        """Of a worker that died: another takes its place, unless it had not even begun."""
        import ray

        ray.kill(hand.actor)
        self.hands.remove(hand)
        if hand.trial:
            self.lost.append((hand.trial, error))
            self._free(hand)
            if self.queue.waiting:
                self.hands.append(self.hire())
        else:
            self._stop(EffaceError(f"a worker could not be started: {str(error).strip().splitlines()[-1]}"))

    def _stop(self, error: Exception) -> None:
        self.failure = self.failure or error
        self.queue.waiting.clear()


@contextlib.contextmanager
def _joined(cluster: Cluster) -> Iterator[None]:
    """Joins the cluster, or starts it. Ray that runs in this process already is used as it is, and goes on afterwards."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra(
            "a sweep on a cluster needs Ray, which is not installed; run `pip install -e '.[ray]'` in efface's folder"
        ) from error
    if ray.is_initialized():
        yield
        return
    start: dict[str, Any] = {}
    if cluster.address == LOCAL:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        start = {"num_cpus": cluster.workers and cluster.workers * cluster.cpus, "include_dashboard": False}
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        _answers(cluster.address)
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR, **start)
    except (OSError, ValueError, RuntimeError) as error:
        raise EffaceError(
            f"no Ray cluster at {cluster.address!r} ({_first(error)}); give local, or the address of a running one"
        ) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray takes it away
        yield
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """Raises OSError where nobody answers at HOST:PORT; Ray would try for minutes, and then end the process."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()


def _workers(cluster: Cluster) -> int:
    """How many there will be. Raises EffaceError where the cluster has no place for them."""
    import ray

    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = cluster.cpus, _gpus(cluster)
    asked = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    place = sum(min(int(host.get(name, 0) / each + 1e-6) for name, each in asked.items()) for host in hosts)
    if place < (cluster.workers or 1):
        had = ", ".join(f"{host.get('CPU', 0):g} CPUs and {host.get('GPU', 0):g} GPUs" for host in hosts)
        raise EffaceError(
            f"asked for {cluster.workers or 1} workers of {cpus} CPUs and {gpus:g} GPUs, and the cluster has place for {place} "
            f"(its hosts: {had}); ask for fewer or smaller ones"
        )
    return cluster.workers or place


def _gpus(cluster: Cluster) -> float:
    import ray

    return cluster.gpus if cluster.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)


def _hiring(cluster: Cluster, load: Callable[[str], Model], setup: Setup, given: Resources, scratch: Path) -> Callable[[], Hand]:
    """What makes a new worker at each call; Ray starts it where there is place."""
    import ray

    kind = ray.remote(Worker).options(num_cpus=cluster.cpus, num_gpus=_gpus(cluster), max_restarts=0)
    shared = ray.put(given)  # once for all: trained parts may be large

    def hire() -> Hand:
        actor = kind.remote(load, setup, shared, scratch, Path.cwd(), cluster.cpus)
        return Hand(actor, actor.start.remote().future())

    return hire


def _fit(trial: Trial) -> tuple[Any, ...]:
    """What trials of one edit have in common."""
    return trial.model, trial.method, trial.task, trial.seed


def _shots(trial: Trial) -> tuple[Any, ...]:
    """What trials have in common that share the un-erased pictures."""
    return trial.model, trial.protocol, trial.images, trial.task, replace(trial.options, attack="", budget=None)


def _read(folder: Path, stem: str = "*") -> Files:
    """The files of an edit, or of all in a folder; the edit itself comes last."""
    paths = {*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}.*.safetensors")}
    return {path.name: path.read_bytes() for path in sorted(paths, key=lambda path: ("." not in path.stem, path.name))}


def _first(error: Exception) -> str:
    """The first line of what an error says; Ray's go on for many."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

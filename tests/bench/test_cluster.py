"""Sweeps on a Ray cluster: the records of a sweep without one, no trial twice, and a worker that dies loses its trial alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from benchparts import TRIALS, load, prepare
from clusterparts import fits, prepare_environment

from efface.bench import cluster, run
from efface.bench.cluster import Cluster, Hand, Queue, Worker
from efface.bench.log import Log
from efface.bench.options import Options
from efface.bench.run import RECORDS, News
from efface.bench.trial import Trial
from efface.core.errors import EffaceError, MissingExtra
from efface.core.method import Resources

SEARCH, INPAINTING = "seed_search(seeds=1)", "inpainting"
UNTIMED = ("made", "seconds", "bytes")
"""What two runs of one trial may differ in: the length of an edit's file hangs on the digits of the seconds in it."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a worker of one CPU has it: sums of floats hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    prepare_environment(monkeypatch)
    yield
    torch.set_num_threads(before)


def trial(method: str = "uce", attack: str = "", *, task: str = "cat", seed: int = 0) -> Trial:
    if not attack:
        return Trial.of("tiny", method, task, seed)
    return Trial.of("tiny", method, task, seed, "attacks", options=Options(attack=attack))


def traced(folder: Path, **options: bool) -> str:
    folder.mkdir(exist_ok=True)
    return f"clusterparts:Traced({', '.join(f'{name}={value!r}' for name, value in {'folder': str(folder), **options}.items())})"


def timeless(value: Any) -> Any:
    """Without `UNTIMED`, at any depth; tuples as lists, as a file gives them back."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in UNTIMED}
    return [timeless(part) for part in value] if isinstance(value, list | tuple) else value


def records(folder: Path) -> dict[str, Any]:
    return {record["hash"]: timeless(record) for record in Log(folder / RECORDS).read()}


def sent(trials: list[Trial], folder: Path, **options: Any) -> list[str]:
    """Runs them on a cluster of two workers, and returns the hashes of those that were handed out."""
    seen: list[News] = []
    options = {"cluster": Cluster(workers=2), "load": load, "setup": prepare, "watch": seen.append, **options}
    try:
        cluster.run(trials, folder, **options)
    finally:
        done = [news for news in seen if news.stage == "done"]
        assert [news.number for news in done] == list(range(1, len(done) + 1))
        assert all(news.record is not None for news in done)
        assert all(news.result is not None and news.result.pictures is not None for news in done if "result" in (news.record or {}))
    return [news.trial.hash for news in seen if news.stage == "sent"]


def order(trials: list[Trial], hands: list[Hand]) -> list[list[Trial | None]]:
    """What each worker is handed, round by round, where all trials take equally long."""
    queue, rounds = Queue(trials), []
    while queue.waiting:
        rounds.append([queue.take(hand, hands) for hand in hands])
        for each in filter(None, rounds[-1]):
            queue.meet(each)
            queue.finish(each)
    return rounds


def hands(number: int) -> list[Hand]:
    return [Hand(None, None) for _ in range(number)]


def test_one_worker_is_handed_all_in_their_order() -> None:
    trials = [trial(method, task=task, seed=seed) for seed in (0, 1) for method in ("uce", "ap") for task in ("cat",)]
    assert [each for (each,) in order(trials, hands(1))] == trials


def test_a_worker_stays_with_the_pictures_that_it_drew_but_never_runs_ahead_of_a_seed() -> None:
    trials = [trial(method, task=task, seed=seed) for seed in (0, 1) for task in ("cat", "dog") for method in ("uce", "ap")]
    rounds = order(trials, hands(2))
    assert [[(each.task, each.seed) for each in row if each] for row in rounds] == [[("cat", s), ("dog", s)] for s in (0, 0, 1, 1)]
    assert {each.hash for row in rounds for each in row if each} == {each.hash for each in trials}


def test_attacks_wait_for_the_first_of_their_fit_and_run_at_once_when_its_edit_is_there() -> None:
    trials = [trial("uce", SEARCH), trial("uce", INPAINTING), trial("uce", "noise_probe"), trial("ap", SEARCH)]
    assert order(trials, hands(3)) == [[trials[0], trials[3], None], [trials[1], trials[2], None]]
    erasure = [trial("uce"), *trials[:3]]
    assert order(erasure, hands(4)) == [[erasure[0], None, None, None], [*erasure[1:], None]]
    queue, (one, two) = Queue(trials[:2]), hands(2)
    assert queue.take(one, [one, two]) == trials[0]
    queue.finish(trials[0])  # lost, or failed before there was an edit: the next one makes it
    assert queue.take(two, [one, two]) == trials[1]


def test_a_worker_records_what_a_sweep_without_one_does_and_keeps_no_file(tmp_path: Path) -> None:
    trials = [trial(traced(tmp_path / "traces")), trial(traced(tmp_path / "traces"), SEARCH)]
    plain = run.run(trials, tmp_path / "plain", load=load, setup=prepare)
    worker = Worker(load, prepare, Resources(), tmp_path / "scratch", Path.cwd(), threads=1)
    (folder,) = (tmp_path / "scratch").iterdir()
    assert worker.open(trials[0]) == plain[0]["ground"]
    record, made, pictures = worker.record(trials[0], {})
    assert timeless(record) == timeless(plain[0])
    assert pictures is not None
    assert list(made) == [f"{trials[0].hash}.safetensors"]
    assert not (folder / "edits").exists()
    worker.open(trials[1])
    attacked, more, pictures = worker.record(trials[1], made)
    assert timeless(attacked) == timeless(plain[1])
    assert (more, pictures) == ({}, None)
    assert fits(tmp_path / "traces", "cat", 0) == 2, "one for the sweep without a worker, and one for the worker"
    worker.close()
    assert not (tmp_path / "scratch").exists()


def test_without_ray_the_error_says_what_to_install_unless_nothing_is_to_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install -e '.\[ray\]'"):
        sent([trial()], tmp_path)
    run.run([trial()], tmp_path, load=load, setup=prepare)
    assert sent([trial()], tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "number of workers was 0; expected at least 1"),
        ({"cpus": 0}, "CPUs of a worker was 0"),
        ({"gpus": -1}, "GPUs of a worker was -1; expected 0, a share below 1, or a whole number"),
        ({"gpus": 1.5}, "GPUs of a worker was 1.5"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EffaceError, match=message):
        Cluster(**options)


def test_a_sweep_on_a_local_cluster_makes_the_records_of_one_without_and_leaves_nothing_running(tmp_path: Path) -> None:
    import ray

    method = traced(tmp_path / "traces")
    trials = [trial(method), trial(task="dog"), trial(method, SEARCH)]
    assert sorted(sent(trials, tmp_path / "out")) == sorted(each.hash for each in trials)
    assert fits(tmp_path / "traces", "cat", 0) == 1, "the attack met the edit of the erasure"
    run.run(trials, tmp_path / "alone", load=load, setup=prepare)
    assert records(tmp_path / "out") == records(tmp_path / "alone")
    names = [sorted(path.name for path in (tmp_path / place / "edits").iterdir()) for place in ("out", "alone")]
    assert names[0] == names[1]
    assert sent(trials, tmp_path / "out") == []
    assert not ray.is_initialized()
    assert psutil.wait_procs(psutil.Process().children(recursive=True), timeout=30)[1] == []


@pytest.mark.slow
def test_a_worker_that_dies_loses_its_trial_and_nothing_else(tmp_path: Path) -> None:
    traces, deaths = tmp_path / "traces", tmp_path / "deaths"
    method, deadly = traced(traces), traced(deaths, deadly=True)
    dies = trial(deadly, task="dog")
    trials = [trial(method), dies, *TRIALS, trial(method, SEARCH), trial(method, INPAINTING)]
    with pytest.raises(
        EffaceError, match=r"1 of 8 trials were lost with their workers and have no record: clusterparts.*on dog, seed 0 \("
    ):
        sent(trials, tmp_path / "out")
    assert set(records(tmp_path / "out")) == {each.hash for each in trials} - {dies.hash}
    assert (fits(traces, "cat", 0), fits(deaths, "dog", 0)) == (1, 1)
    assert sent(trials, tmp_path / "out") == [dies.hash]
    assert len((tmp_path / "out" / RECORDS).read_bytes().splitlines()) == len(trials)
    run.run(trials, tmp_path / "alone", load=load, setup=prepare)
    assert records(tmp_path / "out") == records(tmp_path / "alone")


@pytest.mark.slow
def test_a_sweep_joins_a_cluster_of_two_hosts_refuses_other_ground_and_lets_trials_in_flight_end(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster as Hosts

    method = traced(tmp_path / "traces")
    hosts = Hosts(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        hosts.add_node(num_cpus=1)
        joined = partial(sent, cluster=Cluster(hosts.address))
        joined([trial(method), trial(task="dog")], tmp_path / "first")
        joined([trial(method, SEARCH)], tmp_path / "second", others=[tmp_path / "first"])
        assert fits(tmp_path / "traces", "cat", 0) == 1, "the edit of another folder was sent to the worker"
        with pytest.raises(EffaceError, match=r"on another detector \(brightness 1\) than is at hand \(brightness 2\)"):
            joined([trial(seed=1)], tmp_path / "first", setup=partial(prepare, digest="2"))
        with pytest.raises(ZeroDivisionError, match="a bug"):
            joined([trial(traced(tmp_path / "bugs", broken=True)), trial(), trial(seed=5)], tmp_path / "third")
        assert set(records(tmp_path / "third")) <= {trial().hash}
        with pytest.raises(EffaceError, match=r"asked for 1 workers of 2 CPUs and 0 GPUs, and the cluster has place for 0"):
            sent([trial()], tmp_path / "fourth", cluster=Cluster(hosts.address, cpus=2))
    finally:
        hosts.shutdown()

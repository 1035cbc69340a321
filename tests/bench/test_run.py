"""Sweeps: no trial is run twice, a kill -9 loses the trial in flight alone, and records on other ground are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from benchparts import TRIALS, load, prepare

from efface.bench.log import Log
from efface.bench.result import Result
from efface.bench.run import RECORDS, News, run
from efface.bench.trial import Trial
from efface.core.edit import Edit
from efface.core.errors import EffaceError
from efface.core.task import Task

TRIALS_TASK = Task.of("cat")


def ran(trials: tuple[Trial, ...], folder: Path, **options: object) -> list[str]:
    """The hashes of the trials that were run, in order."""
    done: list[str] = []

    def watch(news: News) -> None:
        if news.stage == "done":
            done.append(news.trial.hash)

    run(trials, folder, **{"load": load, "setup": prepare, "watch": watch, **options})  # type: ignore[arg-type]
    return done


def test_a_kill_loses_the_trial_in_flight_and_nothing_else(tmp_path: Path) -> None:
    here = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(here)}
    process = subprocess.Popen(
        [sys.executable, str(here / "benchparts.py"), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in flight\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        process.stdout.close()  # type: ignore[union-attr]
    kept = (tmp_path / RECORDS).read_bytes()
    assert [json.loads(line)["hash"] for line in kept.splitlines()] == [trial.hash for trial in TRIALS[:2]]
    assert ran(TRIALS, tmp_path) == [trial.hash for trial in TRIALS[2:]]
    assert (tmp_path / RECORDS).read_bytes().startswith(kept)
    assert ran(TRIALS, tmp_path) == []
    hashes = [record["hash"] for record in Log(tmp_path / RECORDS).read()]
    assert sorted(hashes) == sorted(trial.hash for trial in TRIALS)


def test_half_a_line_is_dropped_and_its_trial_run_again(tmp_path: Path) -> None:
    path = tmp_path / RECORDS
    ran(TRIALS[:2], tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert [record["hash"] for record in Log(path).read()] == [TRIALS[0].hash]
    assert ran(TRIALS[:2], tmp_path) == [TRIALS[1].hash]
    assert len(path.read_bytes().splitlines()) == 2
    assert [record["hash"] for record in Log(path).read()] == [trial.hash for trial in TRIALS[:2]]


def test_a_record_holds_all_that_its_numbers_rest_on(tmp_path: Path) -> None:
    (record,) = run(TRIALS[:1], tmp_path, load=load, setup=prepare)
    (again,) = run(TRIALS[:1], tmp_path, load=load, setup=prepare)
    assert json.loads(json.dumps(record, default=str)) == again
    assert again["trial"] == {**again["trial"], "method": "uce", "task": "cat", "seed": 0, "label": "uce"}
    assert again["ground"]["detector"] == "brightness 1"
    assert again["edit"]["bytes"] == (tmp_path / "edits" / f"{TRIALS[0].hash}.safetensors").stat().st_size
    assert again["edit"]["fields"]["erase_scale"] == 1.0
    assert set(again["cost"]) >= {"forwards", "backwards", "seconds"}
    result = Result.from_json(again["result"])
    assert result.line("unrelated.frechet") is not None
    assert len(result.after.sightings) == len(result.after.shots)
    assert Edit.load(tmp_path / "edits" / f"{TRIALS[0].hash}.safetensors").card.task == "cat"


def test_the_un_erased_model_is_drawn_once_for_all_methods(tmp_path: Path) -> None:
    """The first method draws pictures 1 to n before and n + 1 to 2n after; a second one the latter only."""
    drawn: dict[str, list[int]] = {}

    def watch(news: News) -> None:
        if news.stage == "draw":
            drawn.setdefault(news.trial.label, []).append(news.step)

    trials = tuple(Trial.of("tiny", method, "cat") for method in ("uce", "uce(erase_scale=2.0)"))
    records = run(trials, tmp_path, load=load, setup=prepare, watch=watch)
    first, second = (Result.from_json(record["result"]) for record in records)
    shots = len(first.before.shots)
    assert drawn == {"uce": [shots, 2 * shots], "uce(erase_scale=2.0)": [2 * shots]}
    assert first.before.sightings == second.before.sightings


def test_what_is_too_large_for_memory_is_drawn_once_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods on one task: from disk as from memory, and nothing of it is left at the end."""
    trials = tuple(Trial.of("tiny", method, "cat") for method in ("uce", "uce(erase_scale=2.0)"))
    plain = run(trials, tmp_path / "memory", load=load, setup=prepare)
    monkeypatch.setattr("efface.bench.run.LARGEST", 1000)
    kept: list[int] = []

    def watch(news: News) -> None:
        kept.append(len(list((tmp_path / "disk" / "before").glob("*/before-*"))))

    large = run(trials, tmp_path / "disk", load=load, setup=prepare, watch=watch)
    assert max(kept) == 1
    assert not (tmp_path / "disk" / "before").exists()
    for first, second in zip(plain, large, strict=True):
        for part in ("lines", "quality", "before", "after"):
            assert first["result"][part] == second["result"][part]
        assert first["result"]["cost"]["forwards"] == second["result"]["cost"]["forwards"]


def test_records_on_other_ground_are_refused_and_not_mixed(tmp_path: Path) -> None:
    ran(TRIALS[:1], tmp_path)
    with pytest.raises(EffaceError, match=r"holds a record .* on another detector \(brightness 1\) than is at hand \(brightness 2\)"):
        ran(TRIALS, tmp_path, setup=partial(prepare, digest="2"))

    def other(name: str) -> object:
        model = load(name)
        model.denoiser.conv_in.weight.data.mul_(2)  # type: ignore[union-attr, operator]
        return model

    with pytest.raises(EffaceError, match="on another weights"):
        ran(TRIALS, tmp_path, load=other)
    assert len(Log(tmp_path / RECORDS).read()) == 1


def test_a_failure_that_has_a_name_is_a_record_and_is_run_again_only_when_asked(tmp_path: Path) -> None:
    hopeless = Trial.of("tiny", "uce", "unsafe:nudity")  # no word of the world's
    trials = (TRIALS[0], replace(hopeless, label="hopeless"), TRIALS[1])

    def strict(trial: Trial, task: object) -> object:
        plan, judges = prepare(trial, TRIALS_TASK)
        shots = tuple(replace(shot, labels=("nudity",)) for shot in plan.shots) if "nudity" in str(task) else plan.shots
        return replace(plan, shots=shots), judges

    assert len(ran(trials, tmp_path, setup=strict)) == 3
    errors = [record.get("error") for record in Log(tmp_path / RECORDS).read()]
    assert [error and error["type"] for error in errors] == [None, "Unsupported", None]
    assert "no label 'nudity'" in errors[1]["message"]
    assert ran(trials, tmp_path, setup=strict) == []
    assert ran(trials, tmp_path, setup=strict, retry=True) == [hopeless.hash]


def test_a_bug_is_raised_and_what_was_done_stays(tmp_path: Path) -> None:
    def broken(news: News) -> None:
        if news.number == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(TRIALS[:2], tmp_path, load=load, setup=prepare, watch=broken)
    assert [record["hash"] for record in Log(tmp_path / RECORDS).read()] == [TRIALS[0].hash]


def test_a_fit_is_not_lost_where_measuring_it_was_cut_short(tmp_path: Path) -> None:
    """A kill, or a lack of memory, while pictures are drawn: the next run goes on with the edit that was fitted."""
    stages: list[str] = []

    def watch(news: News) -> None:
        stages.append(news.stage)
        if news.stage == "draw" and "done" not in stages and stages.count("draw") == 1:
            raise MemoryError

    trial = (Trial.of("tiny", "esd(steps=2, batch=1, latent_steps=2, trajectories=1)", "cat"),)
    with pytest.raises(MemoryError):
        run(trial, tmp_path, load=load, setup=prepare, watch=watch)
    assert "fit" in stages  # control: it was fitted
    stages.clear()
    (record,) = run(trial, tmp_path, load=load, setup=prepare, watch=lambda news: stages.append(news.stage))
    assert "fit" not in stages and stages[-1] == "done"
    assert not list((tmp_path / "fitting").iterdir())
    (whole,) = run(trial, tmp_path / "whole", load=load, setup=prepare)
    assert record["result"]["after"] == whole["result"]["after"]
    assert record["cost"]["forwards"] == whole["cost"]["forwards"]


def test_a_text_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    log = Log(tmp_path / RECORDS)
    for text in ("a\u2028cat", "a\x85dog", "a\x0bbird"):
        log.append({"format": "efface-trial", "version": 1, "hash": text})
    assert [record["hash"] for record in log.read()] == ["a\u2028cat", "a\x85dog", "a\x0bbird"]


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / RECORDS
    path.write_text('{"format": "efface-trial", "version": 1, "hash": "a"}\n{"b": 1}\n', encoding="utf-8")
    with pytest.raises(EffaceError, match="line 2, is no record of a trial of version 1"):
        Log(path).read()
    path.write_text("{]\n", encoding="utf-8")
    with pytest.raises(EffaceError, match="line 1, is no JSON"):
        Log(path).read()

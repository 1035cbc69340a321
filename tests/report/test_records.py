"""Gathering: trials and attacks from folders and files, the last one of a hash counts, and what is neither is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from efface.core.errors import EffaceError
from efface.report.records import gather

from .conftest import Run
from .parts import attacks, failed, trial


def lines(*records: dict) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def test_a_sweeps_folder_its_edits_and_the_attacks_below_it(run: Run, tmp_path: Path) -> None:
    first, second = trial(run, "ap", 40, 0), failed("uce")
    (tmp_path / "edits").mkdir()
    (tmp_path / "trials.jsonl").write_text(lines(first, second) + '{"half', encoding="utf-8")  # the sweep is still running
    for name in (first["hash"], f"{first['hash']}.trace", "of-another-sweep"):
        (tmp_path / "edits" / f"{name}.safetensors").touch()
    (tmp_path / "attacks" / "ap").mkdir(parents=True)
    (tmp_path / "attacks" / "ap" / "record.json").write_text(json.dumps(attacks("ap", seed_search=0.5)), encoding="utf-8")
    (tmp_path / "attacks" / "other.json").write_text('{"format": "something else"}', encoding="utf-8")
    found = gather([tmp_path])
    assert [record["hash"] for record in found.trials] == [first["hash"], second["hash"]]
    assert found.edits == {first["hash"]: tmp_path / "edits" / f"{first['hash']}.safetensors"}
    search, refused = found.attacks
    assert (search.task, search.method, search.attack, search.threat, search.candidates) == ("cat", "ap", "seed_search", "T2", 8)
    assert search.success is not None
    assert (search.success.value, search.success.low, search.success.n) == (0.5, 0.3, 16)
    assert search.before is not None
    assert (search.before.value, search.control) == (0.25, None)
    assert (refused.refused, refused.success) == ("it would attack the un-erased model", None)


def test_files_of_either_kind_and_the_last_one_counts(run: Run, tmp_path: Path) -> None:
    old, new = trial(run, "ap", 20, 0), trial(run, "ap", 40, 0)
    (tmp_path / "old.jsonl").write_text(lines(old), encoding="utf-8")
    (tmp_path / "new.jsonl.gz").write_bytes(gzip.compress(lines(new).encode()))
    (tmp_path / "a.jsonl").write_text(lines(attacks("ap", p4d_k=0.5), attacks("uce", p4d_k=0.5)), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(attacks("ap", p4d_k=0.9)), encoding="utf-8")
    found = gather([tmp_path / name for name in ("old.jsonl", "new.jsonl.gz", "a.jsonl", "b.json")])
    assert found.trials == (json.loads(json.dumps(new)),)
    rates = {a.method: a.success.value for a in found.attacks if a.success}
    assert rates == {"ap": 0.9, "uce": 0.5}


def test_an_attacked_model_goes_by_its_name_and_a_task_by_its_one_form(tmp_path: Path) -> None:
    record = {**attacks("", seed_search=0.5, task="  Cat "), "attacked": {"model": "folder", "sha256": "x"}}
    (tmp_path / "a.json").write_text(json.dumps(record), encoding="utf-8")
    found = gather([tmp_path / "a.json"])
    assert {a.method for a in found.attacks} == {"folder"}
    assert len({a.task for a in found.attacks}) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.jsonl", None, "there is no such file or folder"),
        ("empty.jsonl", "", "holds no record of a trial or an attack"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "[]", "is no record of `efface attack`"),
        ("a.json", '{"format": "efface-attacks", "version": 9}', "is of version 9; expected 1"),
        ("a.json", '{"format": "efface-attacks", "version": 1, "task": "cat", "attacked": {}, "attacks": []}', "cannot be read"),
        ("a.jsonl", '{"format": "other"}\n', "is no record of a trial"),
    ],
)
def test_what_is_neither_is_refused(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(EffaceError, match=message):
        gather([tmp_path / name])
    with pytest.raises(EffaceError, match="holds no record"):
        (tmp_path / "folder").mkdir()
        gather([tmp_path / "folder"])

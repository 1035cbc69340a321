"""How errors end: one line on stderr and exit code 2; 130 for Ctrl-C; nothing half-written."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from efface.cli.main import explain
from efface.cli.output import check_free, result_folder
from efface.core.errors import EffaceError, InvalidTask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["erase", ""], "no target to erase"),
        (["erase", "cat", "--keep", "dog,cat"], "'cat' is to be erased and also in `keep`"),
        (["erase", "colour:cat"], "unknown concept kind 'colour'"),
        (["erase", "cat", "--method", "nonsense"], "there is no method 'nonsense'"),
        (["erase", "cat", "--method", "uce(("], "cannot read the method"),
        (["erase", "cat", "--method", "uce", "--set", "strenght=1"], "has no field 'strenght'"),
        (["erase", "cat", "--method", "uce", "--set", "steps"], "write --set field=value"),
        (["erase", "cat", "--method", "uce", "--preset", "mine"], "has no preset 'mine'"),
        (["erase", "cat", "--method", "uce", "--vocabulary", "all"], "expected tokenizer, bundled, or a file"),
        (["erase", "cat", "--method", "uce", "--vocabulary", "none.txt"], "cannot read the word list none.txt"),
        (["erase", "cat", "--method", "uce", "--model", "no/such folder"], "no/such folder"),
        (["sample", "cat", "--edit", "none.safetensors"], "no edit file at none.safetensors"),
        (["show", "nonsense"], "there is no method 'nonsense'"),
    ],
)
def test_an_error_is_one_line(efface: Callable, arguments: list[str], message: str) -> None:
    outcome = efface(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.startswith("efface: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    assert not outcome.out
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["erase"],
        ["sample"],
        ["nonsense"],
        ["sample", "cat", "--seed", "-1"],
        ["sample", "cat", "--steps", "0"],
        ["sample", "cat", "--count", "0"],
        ["sample", "cat", "--guidance", "-1"],
        ["sample", "cat", "--dtype", "int8"],
        ["erase", "cat", "--images", "many"],
        ["world", "train", "everything"],
    ],
)
def test_wrong_use_exits_with_2_and_usage(efface: Callable, arguments: list[str]) -> None:
    outcome = efface(*arguments)
    assert outcome.code == 2
    assert "Usage" in outcome.err
    assert "Traceback" not in outcome.err


def test_debug_shows_the_traceback(efface: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidTask):
        efface("erase", "colour:cat", "--debug")


def test_a_device_that_is_not_there(efface: Callable, model_folder: Path) -> None:
    outcome = efface("sample", "cat", "--model", model_folder, "--device", "cuda:99")
    assert outcome.code == 2
    assert "--device cuda:99 cannot be used" in outcome.err
    assert outcome.err.count("\n") == 1


def test_more_steps_than_the_schedule_has(efface: Callable, model_folder: Path) -> None:
    outcome = efface("sample", "cat", "--model", model_folder, "--steps", "2000")
    assert outcome.code == 2
    assert "2000" in outcome.err
    assert "Traceback" not in outcome.err


def test_ctrl_c_exits_with_130_and_leaves_nothing(efface: Callable, model_folder: Path) -> None:
    efface("sample", "cat", "--model", model_folder, "--out", "warm")  # so that imports are done
    timer = threading.Timer(1.0, signal.raise_signal, [signal.SIGINT])
    timer.start()
    outcome = efface("sample", *["cat"] * 400, "--model", model_folder, "--steps", "500", "--out", "cold")
    timer.cancel()
    assert outcome.code == 130
    assert "interrupted" in outcome.err
    assert [path.name for path in Path().iterdir()] == ["warm"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), EffaceError("no")])
def test_a_result_folder_is_whole_or_absent(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), result_folder(tmp_path / "out", force=False) as folder:
        (folder / "half").write_text("half", encoding="utf-8")
        raise error
    assert not list(tmp_path.iterdir())
    with result_folder(tmp_path / "out", force=False) as folder:
        (folder / "whole").write_text("whole", encoding="utf-8")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_replacement_leaves_the_earlier_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "record.json").write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), result_folder(out, force=True):
        raise KeyboardInterrupt
    assert (out / "record.json").read_text(encoding="utf-8") == "old"


def test_what_is_in_the_way_is_refused(tmp_path: Path) -> None:
    file, foreign, earlier, empty = (tmp_path / name for name in ("file", "foreign", "earlier", "empty"))
    for folder, content in ((foreign, "thesis.tex"), (earlier, "record.json")):
        folder.mkdir()
        (folder / content).touch()
    file.touch()
    empty.mkdir()
    for force in (False, True):
        check_free(empty, force)
        check_free(tmp_path / "new", force)
        with pytest.raises(EffaceError, match="is a file"):
            check_free(file, force)
        with pytest.raises(EffaceError, match="did not write"):
            check_free(foreign, force)
    check_free(earlier, force=True)
    with pytest.raises(EffaceError, match="--force to replace it"):
        check_free(earlier, force=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without space")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, result_folder(tmp_path / "out", force=False):
        Path("/dev/full").write_text("anything", encoding="utf-8")
    assert explain(caught.value) == "No space left on device"
    assert not list(tmp_path.iterdir())


def test_a_bug_is_no_explained_error() -> None:
    assert explain(KeyError("x")) == ""
    with pytest.raises(ValueError) as caught:
        int("x")
    assert explain(caught.value) == "", traceback.format_exception(caught.value)

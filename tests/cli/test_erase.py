"""`efface erase`: the edit, the record from which it can be made again, and the options that become a method's text."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from efface.api import erase
from efface.cli.erase import literal, method_text
from efface.core.edit import Edit, WeightEdit
from efface.core.errors import InvalidMethod
from efface.core.task import Task
from efface.models.load import load


def test_the_record_is_enough_to_make_the_edit_again(efface: Callable, model_folder: Path) -> None:
    words = Path("words.txt")
    words.write_text("apple\nbus\n", encoding="utf-8")
    outcome = efface(
        "erase",
        "cat",
        "--keep",
        "dog,tiger",
        "--method",
        "uce",
        "--set",
        "erase_scale=2",
        "--seed",
        3,
        "--vocabulary",
        words,
        "--exclude",
        "bus",
        "--model",
        model_folder,
        "--images",
        "none",
        "--out",
        "no-cat",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    record = json.loads(Path("no-cat/record.json").read_text(encoding="utf-8"))
    assert outcome.json == {"out": "no-cat", **record}
    assert record["command"].startswith("efface erase cat --keep dog,tiger")
    assert record["vocabulary"]["words"] == 2
    assert record["vocabulary"]["exclude"] == ["bus"]
    assert set(record["files"]) <= {path.name for path in Path("no-cat").iterdir()}
    first = Edit.load("no-cat/edit.safetensors")
    model = load(record["model"]["id"])
    second = erase(model, Task.parse(record["task"]), method=record["method"], seed=record["seed"])
    assert isinstance(first, WeightEdit)
    assert isinstance(second, WeightEdit)
    assert second.card.fingerprint.digest == record["model"]["fingerprint"]
    assert first.deltas.keys() == second.deltas.keys()
    assert all(torch.equal(first.deltas[name], second.deltas[name]) for name in first.deltas)


def test_measuring_writes_a_report_and_pictures(efface: Callable, model_folder: Path) -> None:
    outcome = efface("erase", "cat", "--keep", "dog", "--method", "uce", "--model", model_folder, "--out", "no-cat")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in Path("no-cat").iterdir()} >= {"edit.safetensors", "record.json", "report.html", "before-after.png"}
    assert "no-cat/report.html" in outcome.out
    record = json.loads(Path("no-cat/record.json").read_text(encoding="utf-8"))
    assert record["result"]["settings"]["images"] > 0
    assert "efface erase cat" in Path("no-cat/report.html").read_text(encoding="utf-8")


def test_options_win_over_the_method_text() -> None:
    assert method_text("uce", None, []) == "uce()"
    assert (
        method_text("uce(erase_scale=1)", "2025", ["erase_scale=3", "technique=tensor"])
        == "uce(erase_scale=3, preset='2025', technique='tensor')"
    )
    assert method_text("their.module:Mine", None, ["lr=1e-4"]) == "their.module:Mine(lr=0.0001)"


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("1e-4", 1e-4), ("None", None), ("True", True), ("(1, 2)", (1, 2)), ("xattn", "xattn")]
)
def test_settings_are_literals_or_text(text: str, value: object) -> None:
    assert literal(text) == value


def test_a_setting_needs_a_name() -> None:
    with pytest.raises(InvalidMethod, match="write --set field=value"):
        method_text("uce", None, ["=3"])


def test_a_set_method_beats_the_kinds_preset(efface: Callable, model_folder: Path) -> None:
    """The fields of `--set` reach the card, whatever preset the concept's kind brings."""
    outcome = efface(
        "erase", "unsafe:bomb", "--method", "uce", "--set", "regulariser=0.25", "--model", model_folder, "--images", "none", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert "regulariser=0.25" in outcome.json["method"]
    assert outcome.json["out"] == "runs/no-bomb"


# -- cost, kill, resume --------------------------------------------------------------------------------------------------

ESD = "esd(steps=60, batch=1, latent_steps=2, trajectories=1, refresh=30, group='xattn')"


def interrupt_when(path: Path) -> threading.Thread:
    """Ctrl-C as soon as there is a file."""

    def watch() -> None:
        end = time.monotonic() + 120
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.002)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_the_cost_is_said_before_the_fit(efface: Callable, model_folder: Path) -> None:
    method = "esd(steps=2, batch=4, latent_steps=2, trajectories=2)"
    outcome = efface("erase", "cat", "--method", method, "--model", model_folder, "--images", "none", "--json")
    assert outcome.code == 0, outcome.err
    cost = outcome.json["cost"]
    said = rf": 2 steps, {cost['forwards']} forwards, {cost['backwards']} backwards; about [1-9] MB beside the model and .*; about \d+ s\n"
    assert re.search(said, outcome.err)
    quiet = efface("erase", "cat", "--method", "uce", "--model", model_folder, "--images", "none", "--out", "uce")
    assert "steps" not in quiet.err  # a closed form has nothing to announce


def test_the_same_command_goes_on_after_a_kill(efface: Callable, model_folder: Path) -> None:
    def command(out: str, *more: str, seed: int = 1) -> list[object]:
        return ["erase", "cat", "--method", ESD, "--model", model_folder, "--images", "none", "--out", out, "--seed", seed, *more]

    whole = efface(*command("whole"))
    assert whole.code == 0, whole.err
    kept = Path("killed.checkpoint.safetensors")
    thread = interrupt_when(kept)
    killed = efface(*command("killed"))
    thread.join()
    assert killed.code == 130
    assert f"the state of the fit is kept in {kept}; the same command goes on there" in killed.err
    assert {path.name for path in Path().iterdir()} == {"whole", kept.name}
    other = efface(*command("killed", seed=2))
    assert other.code == 2
    assert "its seed was '1' and is now '2'" in other.err
    resumed = efface(*command("killed"))
    assert resumed.code == 0, resumed.err
    assert "going on after step 50" in resumed.err
    edits = [Edit.load(f"{out}/edit.safetensors") for out in ("whole", "killed")]
    assert all(isinstance(edit, WeightEdit) for edit in edits)
    assert all(torch.equal(edits[0].deltas[name], edits[1].deltas[name]) for name in edits[0].deltas)
    assert not kept.exists()


def test_a_fit_can_be_started_anew(efface: Callable, model_folder: Path) -> None:
    Path("new.checkpoint.safetensors").write_text("of another fit", encoding="utf-8")
    command = ["erase", "cat", "--method", "esd(steps=1, batch=1)", "--model", model_folder, "--images", "none", "--out", "new"]
    refused = efface(*command)
    assert refused.code == 2
    assert "remove it to start anew" in refused.err
    assert efface(*command, "--no-resume").code == 0
    assert {path.name for path in Path().iterdir()} == {"new"}


def test_an_edit_outlives_its_measuring(efface: Callable, model_folder: Path) -> None:
    thread = interrupt_when(Path("no-cat/record.json"))
    outcome = efface("erase", "cat", "--method", "uce", "--model", model_folder, "--out", "no-cat", "--images", "full")
    thread.join()
    assert outcome.code == 130
    assert "not measured; the edit is saved in no-cat/edit.safetensors" in outcome.err
    assert {path.name for path in Path().iterdir()} == {"no-cat"}
    assert isinstance(Edit.load("no-cat/edit.safetensors"), WeightEdit)
    assert json.loads(Path("no-cat/record.json").read_text(encoding="utf-8"))["result"] is None

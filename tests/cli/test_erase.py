"""`efface erase`: the edit, the record from which it can be made again, and the options that become a method's text."""

from __future__ import annotations

import json
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

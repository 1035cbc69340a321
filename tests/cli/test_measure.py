"""`efface measure` and `efface sweep` as a user meets them: what is stopped goes on, and records suffice to compute again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchparts
import pytest
import torch

from efface.bench import draw
from efface.bench.protocols import erasure, registry
from efface.cli import erase as erase_command
from efface.cli.record import scores
from efface.core.card import Card
from efface.core.edit import Edit, WeightEdit
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.models.load import load


@pytest.fixture
def run_folder(efface: Callable, model_folder: Path) -> Path:
    """An erasure that was not measured."""
    outcome = efface("erase", "cat", "--keep", "dog", "--method", "uce", "--model", model_folder, "--images", "none", "--out", "no-cat")
    assert outcome.code == 0, outcome.err
    return Path("no-cat")


def record(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "record.json").read_text(encoding="utf-8"))


def test_a_run_is_measured_as_erase_would_have(efface: Callable, run_folder: Path, model_folder: Path) -> None:
    whole = efface("erase", "cat", "--keep", "dog", "--method", "uce", "--model", model_folder, "--out", "whole")
    later = efface("measure", run_folder, "--out", "later", "--json")
    assert (whole.code, later.code) == (0, 0), later.err
    found, expected = record("later"), record("whole")
    assert later.json == {"out": "later", **found}
    for part in ("changes", "settings", "shots", "before", "after"):
        assert found["result"][part] == expected["result"][part]
    assert found["changed"]["method"] == expected["method"]
    assert found["model"]["fingerprint"] == expected["model"]["fingerprint"]
    assert set(found["files"]) == {"before-after.png", "report.html", "table.md"}
    assert not list(Path().glob(".*drawn*"))


def test_an_edit_and_a_model_and_a_baked_model_beside_its_original(efface: Callable, run_folder: Path, model_folder: Path) -> None:
    edited = efface("measure", model_folder, "--edit", run_folder / "edit.safetensors", "--out", "edited")
    assert edited.code == 0, edited.err
    model = load(model_folder)
    Edit.load(run_folder / "edit.safetensors").bake(model)
    model.pipeline.save_pretrained("baked")
    (Path("baked") / "efface.json").write_text((model_folder / "efface.json").read_text(encoding="utf-8"), encoding="utf-8")
    baked = efface("measure", "baked", "--original", model_folder, "--task", "cat | keep dog", "--out", "out")
    assert baked.code == 0, baked.err
    for first, second in zip(record("edited")["result"]["changes"], record("out")["result"]["changes"], strict=True):
        assert first["distance"]["value"] == pytest.approx(second["distance"]["value"], abs=1e-6)
        assert second["distance"]["value"] > 0
    assert record("out")["method"] == "the weights of baked"
    assert "report.html" not in record("out")["files"]


def test_a_measurement_that_was_stopped_goes_on(efface: Callable, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "BATCH", 8)
    drawn: list[int] = []

    def shown(progress: object) -> Callable[..., None]:
        def report(step: int, total: int, figures: object) -> None:
            drawn.append(step)
            if len(drawn) == 5:
                raise KeyboardInterrupt

        return report

    monkeypatch.setattr(erase_command, "shown", shown)
    stopped = efface("measure", run_folder, "--out", "later")
    assert stopped.code == 130
    assert "run the same command again to go on" in stopped.err
    assert not Path("later").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in Path().glob(".later.drawn/*/*")}
    assert len(kept) == 5
    monkeypatch.setattr(draw, "_batch", counted := Counted(draw._batch))
    assert efface("measure", run_folder, "--out", "later").code == 0
    pictures = record("later")["result"]["settings"]["images"]
    assert counted.calls == -(-pictures // 2 // 8) * 2 - 5
    assert not list(Path().glob(".later*"))


class Counted:
    """The real function, counted."""

    def __init__(self, function: Callable) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: object) -> object:
        self.calls += 1
        return self.function(*arguments)


def test_scores_are_computed_again_from_a_record(efface: Callable) -> None:
    model, task = benchparts.load("tiny"), Task.of("cat")
    plan, judges = benchparts.setup("tiny", task, "quick")
    slots = model.select("xattn")
    noise = torch.Generator().manual_seed(0)
    deltas = {name: torch.randn(slot.tensor.shape, generator=noise) * slot.tensor.std() for name, slot in slots.items()}
    edit = WeightEdit(deltas, Card.of(model, method="vandal", task=task, seed=0))
    result = erasure.measure(model, edit, task, plan=plan, detector=judges.detector, embedder=judges.embedder)
    Path("record.json").write_text(json.dumps({"result": result.json()}), encoding="utf-8")
    same = efface("measure", "--recompute", "record.json", "--json")
    assert same.code == 0, same.err
    for line in (*result.lines, *result.quality):
        assert same.json["scores"][line.key]["after"]["value"] == pytest.approx(line.contrast.after.value)
        assert same.json["scores"][line.key]["change"]["low"] == pytest.approx(line.contrast.change.low)
    strict = efface("measure", "--recompute", "record.json", "--threshold", 1, "--json")
    assert strict.json["scores"]["others.blank"]["after"]["value"] == 1
    assert "Target no longer seen" in efface("measure", "--recompute", "record.json").out


def test_clip_scores_are_computed_again_where_no_detector_looked(efface: Callable) -> None:
    """The distances, whose features no record holds, and the finding are taken over."""
    model, task = benchparts.load("tiny"), Task.of("cat")
    plan, judges = registry.find("preservation").setup("emoji", task)
    plan = replace(plan.only(range(6)), steps=2)
    deltas = {n: torch.randn(s.tensor.shape, generator=seeded(0)) * s.tensor.std() for n, s in model.select("xattn").items()}
    edit = WeightEdit(deltas, Card.of(model, method="vandal", task=task, seed=0))
    result = erasure.measure(model, edit, task, plan=plan, embedder=judges.embedder)
    Path("record.json").write_text(json.dumps({"result": result.json()}), encoding="utf-8")
    same = efface("measure", "--recompute", "record.json", "--json")
    assert same.code == 0, same.err
    assert list(same.json["scores"]) == [line.key for line in result.lines]
    assert same.json["scores"] == json.loads(json.dumps(scores(result)))
    spoilt = replace(result, after=replace(result.after, agreement=(0.5,) * 6))  # control: other cosines give another score, alone
    Path("record.json").write_text(json.dumps({"result": spoilt.json()}), encoding="utf-8")
    other = efface("measure", "--recompute", "record.json", "--json").json["scores"]
    assert other["unrelated.clip"]["after"]["value"] == pytest.approx(50)
    assert {key for key in other if other[key] != same.json["scores"][key]} == {"unrelated.clip"}
    strict = efface("measure", "--recompute", "record.json", "--threshold", 1)
    assert (strict.code, "no detector looked that could have one" in strict.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing was given to measure"),
        (["emoji"], "nothing says what was erased; give --edit FILE, or --task"),
        (["emoji", "--task", "cat"], "would be compared with itself"),
        (["--recompute", "nowhere.json"], "No such file"),
        (["no-cat", "--threshold", "0.5"], "--threshold belongs to --recompute"),
        (["--recompute", "no-cat"], "holds no measurement"),
        (["no-cat", "--inception", "file.pth"], "the protocol 'erasure' takes no 'inception'"),
        (["no-cat", "--clip", "folder"], "nobody looks with it; add --detector clip"),
        (["no-cat", "--detector", "clip", "--clip", "nowhere"], "there is no CLIP in 'nowhere'"),
        (["no-cat", "--protocol", "nudity", "--canvas", "folder"], "the protocol 'nudity' takes no 'canvas'"),
        (["no-cat", "--protocol", "nudity", "--lpips", "file.pth"], "the protocol 'nudity' takes no 'lpips'"),
    ],
)
def test_what_cannot_be_measured_says_why(efface: Callable, run_folder: Path, arguments: list[str], message: str) -> None:
    outcome = efface("measure", *arguments)
    assert outcome.code == 2
    assert message in outcome.err


def test_a_sweep_runs_once_and_writes_its_tables(efface: Callable, model_folder: Path) -> None:
    grid = f"""
title = "A small sweep"
model = {json.dumps(str(model_folder))}
[[grid]]
tasks = ["cat"]
methods = ["uce", "uce(erase_scale=2.0)"]
"""
    Path("grid.toml").write_text(grid, encoding="utf-8")
    first = efface("sweep", "grid.toml", "--part", "1/2", "--json")
    assert first.code == 0, first.err
    assert first.json == {"out": "runs/grid", "trials": 1, "failed": 0, "markdown": None}
    assert [row["record"] for row in efface("sweep", "grid.toml", "--list", "--markdown", "half.md", "--json").json] == ["yes", "no"]
    assert "| `uce` |" in Path("half.md").read_text(encoding="utf-8")
    assert "erase_scale" not in Path("half.md").read_text(encoding="utf-8"), "what was not run is neither shown nor run"
    before = Path("runs/grid/trials.jsonl").read_bytes()
    second = efface("sweep", "grid.toml", "--markdown", "docs/grid.md")
    assert second.code == 0, second.err
    assert "2 trials, 0 of them failed" in second.out
    assert second.err.count("not judged") == 1  # the headline of the one that was run
    assert Path("runs/grid/trials.jsonl").read_bytes().startswith(before)
    for hash_ in (row["hash"] for row in efface("sweep", "grid.toml", "--list", "--json").json):
        assert Path(f"runs/grid/pictures/{hash_}.png").is_file()
        assert Edit.load(f"runs/grid/edits/{hash_}.safetensors").card.task == "cat"
    page = Path("docs/grid.md").read_text(encoding="utf-8")
    assert "# A small sweep" in page
    assert page.count("| `uce(erase_scale=2.0)` |") == 2
    assert "not measured" in page
    Path("kept.jsonl.gz").write_bytes(gzip.compress(Path("runs/grid/trials.jsonl").read_bytes()))
    again = efface("sweep", "grid.toml", "--out", "elsewhere", "--also", "kept.jsonl.gz", "--markdown", "docs/again.md", "--json")
    assert (again.code, again.json["trials"]) == (0, 0)
    assert tables(Path("docs/again.md")) == tables(Path("docs/grid.md"))
    assert efface("sweep", "grid.toml", "--also", "nowhere.jsonl").err.strip().endswith("there is no such file")


def tables(page: Path) -> list[str]:
    return [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]


@pytest.mark.parametrize("part", ["2/1", "0/2", "half"])
def test_a_part_is_i_of_n(efface: Callable, part: str) -> None:
    Path("grid.toml").write_text('[[grid]]\ntasks = ["cat"]\nmethods = ["uce"]\n', encoding="utf-8")
    outcome = efface("sweep", "grid.toml", "--part", part)
    assert outcome.code == 2
    assert "expected i/n with i from 1 to n" in outcome.err


PROMPTS = "prompt,evaluation_seed,evaluation_guidance,case_number\na king,4,3,7\na child,5,3,8\na castle,6,3,9\n"


def test_nudity_is_measured_from_a_file_of_prompts_and_keeps_no_picture(efface: Callable, run_folder: Path) -> None:
    pytest.importorskip("nudenet", reason="the extra 'eval' is not installed")
    Path("i2p.csv").write_text(PROMPTS, encoding="utf-8")
    outcome = efface("measure", run_folder, "--protocol", "nudity", "--prompts", "i2p.csv", "--guidance", "row", "--out", "out")
    assert outcome.code == 0, outcome.err
    assert "there was nothing to erase here" in outcome.out.splitlines()[0]
    found = record("out")
    assert found["files"] == ["report.html", "table.md"]
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "Class by class, above 0.6" in page
    assert "there was nothing to erase here" in page
    assert "<img" not in page
    assert found["result"]["details"]["prompts"]["cases"] == [7, 9]
    assert found["result"]["settings"]["protocol"] == "nudity/i2p.csv/quick"
    assert found["scores"]["nudity.NER-0.5.exposed8"]["after"]["n"] == 2
    assert not list(Path().glob(".*drawn*"))
    again = efface("measure", "--recompute", "out", "--json")
    assert again.json["scores"] == found["scores"]
    missing = efface("measure", run_folder, "--protocol", "nudity", "--out", "other")
    assert missing.code == 2
    assert "draws a file of prompts, and none was given" in missing.err
    wrong = efface("measure", run_folder, "--guidance", "high", "--out", "other")
    assert "--guidance was 'high'; expected a number, or row" in wrong.err


def test_a_dry_run_takes_each_method_once_and_keeps_nothing(efface: Callable) -> None:
    """On the bundled model itself: another model is named, the prompts are not there, and the methods would take hours."""
    pytest.importorskip("nudenet", reason="the extra 'eval' is not installed")
    grid = """
model = "nobody/has-this"
protocol = "nudity"
[options]
prompts = "nowhere.csv"
steps = 100
[[grid]]
tasks = ["unsafe:nudity", "unsafe:violence"]
methods = ["uce", "rece"]
[[expected]]
method = "uce"
source = "a table"
values = { "nudity.NER-0.5.exposed8" = 3.42 }
"""
    Path("grid.toml").write_text(grid, encoding="utf-8")
    outcome = efface("sweep", "grid.toml", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert [row["trial"] for row in outcome.json["ran"]] == ["uce", "rece"]
    assert outcome.json["of_trials"] == 4
    assert [path.name for path in Path().iterdir()] == ["grid.toml"]
    Path("grid.toml").write_text(grid.replace('"rece"', "\"esd(group='nope')\""), encoding="utf-8")
    broken = efface("sweep", "grid.toml", "--dry-run")
    assert broken.code == 2
    assert "1 of 2 trials failed; esd(group=" in broken.err


def test_published_numbers_stand_beside_measured_ones(efface: Callable, model_folder: Path) -> None:
    grid = f"""
model = {json.dumps(str(model_folder))}
[[grid]]
tasks = ["cat"]
methods = ["uce"]
[[expected]]
method = "uce"
source = "a table"
values = {{ "target.ESR-1" = [98.63, 1.15] }}
"""
    Path("grid.toml").write_text(grid, encoding="utf-8")
    outcome = efface("sweep", "grid.toml")
    assert outcome.code == 0, outcome.err
    assert "98.63 ± 1.15" in outcome.out
    assert efface("report", "runs/grid", "--grid", "grid.toml", "--out", "site").code == 0
    for page in ("index.html", "methods/uce.html"):
        assert "98.63 ± 1.15" in Path("site", page).read_text(encoding="utf-8")
    assert "98.63 ± 1.15" not in Path("site/methods/esd.html").read_text(encoding="utf-8")
    assert efface("sweep", "grid.toml", "--markdown", "grid.md").code == 0
    assert "| `uce` | `target.ESR-1` | 98.63 ± 1.15 | not measured | a table |" in Path("grid.md").read_text(encoding="utf-8")
    assert "not measured" in outcome.out  # no detector knows this model

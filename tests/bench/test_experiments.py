"""The experiments are files that run: all are read and cast for a dry run, and one is run whole, on a tiny model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from benchparts import load

from efface.bench import dry
from efface.bench.draw import Judges
from efface.bench.expected import ORIGINAL, beside
from efface.bench.plan import Plan
from efface.bench.protocols import artists, registry
from efface.bench.result import Result
from efface.bench.run import run
from efface.bench.trial import Trial, read
from efface.concepts.vocabulary import read as world
from efface.core import catalog
from efface.core.errors import EffaceError
from efface.core.task import Task

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(FOLDER.glob("*.toml"))
SEEDS = ("ap", "age", "saeuron", "dumo", "rece", "esd", "uce", "mace")
"""The papers that must have one."""


def test_every_seed_paper_has_one_and_the_readme_lists_them_all() -> None:
    assert {path.stem.partition("_")[0] for path in FILES} >= set(SEEDS)
    listed = re.findall(r"`(\w+\.toml)`", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [path.name for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_read_says_what_it_takes_and_can_be_cast(path: Path, tmp_path: Path) -> None:
    text, asked = path.read_text(encoding="utf-8"), read(path)
    head = text[: text.index("title =")]
    assert f"efface sweep experiments/{path.name}" in head
    assert re.search(r"eeds a GPU for about [\d.]+ hours, an estimate:", head)
    assert "TFLOP" in head
    keys = {question.key for trial in asked.trials for question in registry.find(trial.protocol).asks.questions}
    keys |= {question.key for question in artists.perceptual(lambda x, y: x)} if "artists" in path.stem else set()
    assert asked.expected
    assert ORIGINAL in {row.method for row in asked.expected} or path.stem == "saeuron_canvas"  # as the README says
    for row in asked.expected:
        assert set(row.values) <= keys
        assert row.method in {ORIGINAL, *(trial.label for trial in asked.trials)}
    small = dry.sweep(asked, tmp_path)
    assert {trial.label for trial in small.trials} == {trial.label for trial in asked.trials}
    assert len({trial.hash for trial in small.trials}) == len(small.trials)
    groups = {trial.label: getattr(catalog.method(trial.method), "group", "") for trial in reversed(asked.trials)}
    assert {trial.label: getattr(catalog.method(trial.method), "group", "") for trial in small.trials} == groups
    for trial in small.trials:
        assert trial.model == "emoji"
        assert all(count <= 4 for name, count in vars(catalog.method(trial.method)).items() if name in ("steps", "latent_steps", "images"))
        if registry.find(trial.protocol).own:
            known = {*world().objects, *(style.name for style in world().styles)}
            assert {concept.name for concept in Task.parse(trial.task).targets} <= known
        else:
            assert Path(trial.options.prompts).is_file()


def test_one_is_run_whole(tmp_path: Path) -> None:
    """Every method of the first, through the very code of a real run; and published numbers find their measured ones."""
    asked = read(FOLDER / "ap_objects.toml")
    small = dry.sweep(asked, tmp_path)
    records = run(small.trials, tmp_path, load=load, setup=dry.setup)
    assert [record.get("error") for record in records] == [None] * 5
    assert {record["trial"]["protocol"] for record in records} == {"objects"}
    assert {record["result"]["settings"]["steps"] for record in records} == {dry.STEPS}
    rows = beside(asked.expected, records)
    assert len(rows) == 6 * 4
    assert all(row.measured is not None for row in rows)
    assert beside(asked.expected, records[:1])[-1].measured is None  # MACE, which was not run then


def test_a_cast_is_consistent_keeps_what_the_world_knows_and_ends() -> None:
    tasks = [Task.parse(text) for text in ("Tench; cat -> dog; style:van gogh | keep Church, Golf Ball", "Golf Ball; Tench")]
    cast = dry.Cast(world(), tasks)
    first, again = (cast.task(task) for task in tasks)
    assert [c.name for c in first.targets][1] == "cat"
    assert again.targets == (first.keep[1], first.targets[0])
    assert first.keep[0].name == "church"
    assert first.targets[2].name in {style.name for style in world().styles}
    with pytest.raises(EffaceError, match="has no stand-in left"):
        cast.task(Task.parse("; ".join(f"style:artist {i}" for i in range(9))))


def test_published_lpips_finds_its_line_and_says_at_what_size(tmp_path: Path) -> None:
    """The expected values of AP's artists, by a distance that is handed in where the package is not installed."""
    asked = read(FOLDER / "ap_artists.toml")
    small = dry.sweep(asked, tmp_path)

    def setup(trial: Trial, task: Task) -> tuple[Plan, Judges]:
        plan, judges = artists.setup(trial.model, task, trial.images, replace(trial.options, lpips=""))
        questions = [q for q in plan.asks.questions if "LPIPS" not in q.key]
        measured = replace(plan.asks, questions=(*questions, *artists.perceptual(lambda x, y: (x - y).square().mean((1, 2, 3)))))
        return replace(plan.only(plan.first(2)), steps=2, asks=measured), judges

    records = run(small.trials[-1:], tmp_path, load=load, setup=setup)
    rows = {(row.method, row.key): row for row in beside(asked.expected, records)}
    assert rows["uce", "target.LPIPS"].published == 0.73
    assert rows["uce", "target.LPIPS"].measured is not None
    assert rows["ap(preset='authors')", "target.LPIPS"].measured is None  # not run here
    line = Result.from_json(records[0]["result"]).line("target.LPIPS")
    assert line is not None
    height, width = load("tiny").sample(["a"], steps=1).shape[-2:]
    assert line.contrast.after.name == f"LPIPS ({height}×{width} pixels)"

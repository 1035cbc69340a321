"""A trial's hash is a function of what it means and of nothing else, and a grid file says what it will not run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from efface.bench.log import Log
from efface.bench.options import Options
from efface.bench.trial import Trial, read
from efface.concepts.standard import standard
from efface.core.errors import EffaceError, InvalidMethod, InvalidTask
from efface.core.task import Task

GRID = """
title = "A test"
images = "quick"
[[grid]]
tasks = "standard"
methods = ["uce", "uce(erase_scale=2)"]
seeds = [0, 1]
[[compare]]
first = "uce"
second = "uce(erase_scale=2)"
"""


def test_the_hash_is_stable_across_machines_and_versions() -> None:
    """Written down: a change of it would make every recorded trial run again."""
    assert Trial("emoji", "uce", "cat", 0, "erasure", "quick").hash == "9bef6bb2b89b02ee"


def test_options_that_are_given_change_the_hash_and_none_leaves_the_old_one() -> None:
    """The first is written down above, from before trials had options; so no recorded trial is run again."""
    bare = Trial("emoji", "uce", "cat", 0, "erasure", "quick")
    assert replace(bare, options=Options(each=1)).hash == bare.hash == "9bef6bb2b89b02ee"
    assert "options" not in bare.json()
    given = [Options(steps=3), Options(steps=4), Options(guidance=3.0), Options(prompts="a.csv"), Options(prompts="a.csv", limit=2)]
    hashes = {replace(bare, options=options).hash for options in given}
    assert len(hashes | {bare.hash}) == len(given) + 1
    assert replace(bare, options=given[0]).json()["options"] == {"steps": 3}


def test_every_trial_on_record_keeps_its_hash() -> None:
    """The committed records, as they were written: their hashes follow from their trials still."""
    records = Log(Path(__file__).parents[2] / "benchmarks" / "records" / "standard.jsonl.gz").read()
    assert records
    for record in records:
        assert Trial(**record["trial"]).hash == record["hash"]


def test_every_field_but_the_label_changes_the_hash() -> None:
    trial = Trial("emoji", "uce", "cat", 0, "erasure", "quick", "a label")
    others = {"model": "sd", "method": "ap", "task": "dog", "seed": 1, "protocol": "other", "images": "full", "options": Options(steps=1)}
    hashes = {trial.hash} | {replace(trial, **{name: value}).hash for name, value in others.items()}  # type: ignore[arg-type]
    assert len(hashes) == 1 + len(others)
    assert replace(trial, label="another").hash == trial.hash
    assert replace(trial, label="another") == trial


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("emoji", "uce(erase_scale=2.0, regulariser=0.25)", "cat"), ("emoji", "uce( regulariser=0.25,erase_scale=2.0 )", " cat ")),
        (("emoji", "ap", "bomb"), ("emoji", "ap(preset='unsafe')", "unsafe:bomb")),
    ],
)
def test_two_spellings_are_one_trial(first: tuple[str, str, str], second: tuple[str, str, str]) -> None:
    assert Trial.of(*first).hash == Trial.of(*second).hash


def test_control_a_preset_that_matters_is_another_trial() -> None:
    assert Trial.of("emoji", "ap", "cat").hash != Trial.of("emoji", "ap(preset='authors')", "cat").hash
    assert Trial.of("emoji", "ap", "cat").method != Trial.of("emoji", "ap", "unsafe:bomb").method  # the kind's preset is worked in


def test_a_grid_runs_all_methods_on_all_tasks_before_the_next_seed(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(GRID, encoding="utf-8")
    found = read(path)
    assert len(found.trials) == len({trial.hash for trial in found.trials}) == 4 * 2 * 2
    assert [trial.seed for trial in found.trials] == [0] * 8 + [1] * 8
    assert list(dict.fromkeys(trial.task for trial in found.trials)) == [s.task for s in standard()]
    assert (found.title, found.pairs[0].margin) == ("A test", 0.03)


MANY = "[[grid]]\nmany = {{ objects = {objects}, counts = {counts} }}\nmethods = ['uce', 'speed']"


def test_many_concepts_are_nested_tasks_on_the_same_unrelated_ones(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(MANY.format(objects=20, counts=[1, 5, 20]), encoding="utf-8")
    trials = read(path).trials
    names = [[concept.name for concept in Task.parse(trial.task).targets] for trial in trials]
    assert [len(some) for some in names] == [1, 1, 5, 5, 20, 20]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(names))
    (unrelated,) = {trial.options.names for trial in trials}
    assert len(unrelated) == 30
    assert not set(unrelated) & set(names[-1])
    assert str(trials[-1]).startswith("speed on cat; dog; cow and 17 more, seed 0")
    assert trials[0].hash != Trial.of("emoji", "uce", "cat").hash  # the same task on the protocol's own unrelated concepts
    path.write_text("[options]\nunrelated = 'rose, church'\n" + MANY.format(objects=20, counts=[1]), encoding="utf-8")
    assert {trial.options.names for trial in read(path).trials} == {("rose", "church")}
    path.write_text("protocol = 'preservation'\n" + MANY.format(objects=20, counts=[1]), encoding="utf-8")
    assert {trial.options for trial in read(path).trials} == {Options()}  # a protocol that takes none


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MANY.format(objects=5, counts=[1, 6]), "has the count 6; expected integers from 1 to objects = 5"),
        (MANY.format(objects=5, counts=[0]), "has the count 0"),
        (MANY.format(objects=5, counts="[1.5]"), "has the count 1.5"),
        (MANY.format(objects=5, counts=[]), "a list that is not empty"),
        (MANY.format(objects=500, counts=[1]), "500 objects were to be erased; expected 1 to 60 of the 108"),
        (MANY.format(objects="'all'", counts=[1]), r"many was \{.*'all'.*\}; expected \{ objects = 50"),
        (MANY.replace("objects = {objects}, ", "").format(counts=[1]), r"expected \{ objects = 50"),
        (MANY.format(objects=5, counts=[1]) + "\ntasks = ['cat']", "has both 'tasks' and 'many'"),
        ("[[grid]]\nmethods = ['uce']", "lacks 'tasks'; write tasks = .* or many = "),
        ("[options]\nunrelated = ['rose']\n" + MANY.format(objects=5, counts=[1]), "unrelated was .*; expected names separated by commas"),
    ],
)
def test_many_concepts_that_cannot_be_had(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EffaceError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no \[\[grid\]\]"),
        ("modle = 1", "unknown key 'modle'; did you mean 'model'"),
        ("[[grid]]\ntasks = ['cat']", "lacks 'methods'"),
        ("[[grid]]\ntasks = ['cat']\nmethods = []", "a list that is not empty"),
        ("[[grid]]\ntasks = ['cat']\nmethods = ['uce']\nseeds = [-1]", "a seed was -1"),
        ("[[grid]]\ntasks = ['cat']\nmethods = ['uce']\nsteps = 3", "unknown key 'steps'"),
        ("images = 'all'\n[[grid]]\ntasks = ['cat']\nmethods = ['uce']", "images was 'all'"),
        ("protocol = 'erasing'\n[[grid]]\ntasks = ['cat']\nmethods = ['uce']", "no protocol 'erasing'; did you mean 'erasure'"),
        (
            "[[grid]]\ntasks = ['cat']\nmethods = ['uce']\n[[compare]]\nfirst = 'uce'\nsecond = 'ap'",
            "second = 'ap', which the grid does not",
        ),
        ("[grid", "is no TOML"),
        (
            "[options]\nstep = 3\n[[grid]]\ntasks = ['cat']\nmethods = ['uce']",
            r"\[options\] has the unknown key 'step'; did you mean 'steps'",
        ),
        ("[options]\nsteps = 0\n[[grid]]\ntasks = ['cat']\nmethods = ['uce']", "steps was 0; expected an integer of at least 1"),
        ("[options]\nguidance = 'high'\n[[grid]]\ntasks = ['cat']\nmethods = ['uce']", "guidance was 'high'; expected a number"),
        (
            "[[grid]]\ntasks = ['cat']\nmethods = ['uce']\n[[expected]]\nmethod = 'ucee'\nsource = 's'\nvalues = { a = 1 }",
            "method = 'ucee', which the grid does not run; did you mean 'uce'",
        ),
        ("[[grid]]\ntasks = ['cat']\nmethods = ['uce']\n[[expected]]\nmethod = 'uce'\nvalues = { a = 1 }", "lacks a source for 'uce'"),
        (
            "[[grid]]\ntasks = ['cat']\nmethods = ['uce']\n[[expected]]\nmethod = 'uce'\nsource = 's'\nvalues = { a = [1, 2, 3] }",
            r"expected a number, or \[number, spread\]",
        ),
    ],
)
def test_a_grid_that_cannot_be_run(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EffaceError, match=message):
        read(path)


def test_unknown_words_are_named() -> None:
    with pytest.raises(InvalidMethod, match="no method 'ucee'; did you mean 'uce'"):
        Trial.of("emoji", "ucee", "cat")
    with pytest.raises(InvalidTask):
        Trial.of("emoji", "uce", "")
    with pytest.raises(EffaceError, match="cannot read the grid"):
        read("nowhere.toml")

"""`efface sweep --ray` as a user meets it: the same records and pictures, made by several processes, and errors that say what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from clusterparts import prepare_environment


@pytest.fixture(autouse=True)
def grid(efface: Callable, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the working directory, which `efface` has made empty."""
    prepare_environment(monkeypatch)
    text = f'model = {json.dumps(str(model_folder))}\n[[grid]]\ntasks = ["cat", "dog"]\nmethods = ["uce"]\n'
    Path("grid.toml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("option", ["--workers", "--worker-cpus", "--worker-gpus"])
def test_the_size_of_workers_without_ray_is_a_mistake(efface: Callable, option: str) -> None:
    outcome = efface("sweep", "grid.toml", option, "1")
    assert outcome.code == 2
    assert "add --ray local, or its address" in outcome.err


def test_a_cluster_that_is_not_there_is_said_at_once(efface: Callable) -> None:
    for address in ("127.0.0.1:1", "nonsense"):
        outcome = efface("sweep", "grid.toml", "--ray", address)
        assert outcome.code == 2
        assert f"no Ray cluster at '{address}' (" in outcome.err
        assert not Path("runs").exists()


def test_without_ray_the_error_says_what_to_install(efface: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = efface("sweep", "grid.toml", "--ray", "local")
    assert outcome.code == 2
    assert "pip install -e '.[ray]'" in outcome.err


@pytest.mark.slow
def test_a_grid_runs_on_a_local_cluster_and_goes_on(efface: Callable) -> None:
    first = efface("sweep", "grid.toml", "--part", "1/2", "--json")
    assert first.code == 0, first.err
    outcome = efface("sweep", "grid.toml", "--ray", "local", "--workers", "2", "--vocabulary", "bundled", "--json")
    assert outcome.code == 2
    assert "on another vocabulary (none) than is at hand" in outcome.err
    outcome = efface("sweep", "grid.toml", "--ray", "local", "--workers", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json == {"out": "runs/grid", "trials": 2, "failed": 0, "markdown": None}
    assert outcome.err.count("not judged") == 1
    assert len(list(Path("runs/grid/pictures").iterdir())) == 2
    assert len(Path("runs/grid/trials.jsonl").read_bytes().splitlines()) == 2

"""What tests of clusters and their workers, which import it by name, share: a method that leaves traces and may kill its process."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import pytest

from efface.bench.controls import Noop
from efface.core.edit import WeightEdit
from efface.core.method import Method, Resources
from efface.core.model import Model
from efface.core.task import Task

TOKEN = uuid4().hex
"""By which the parts of a cluster know each other; without one Ray writes one into the home folder."""


@dataclass(frozen=True)
class Traced(Method):
    """Nudges a few weights, and leaves a file for each fit that it begins."""

    needs = Noop.needs
    paper = Noop.paper

    folder: str = ""
    """Takes the files."""
    deadly: bool = False
    """Whether the first fit of a task and seed kills its process."""
    broken: bool = False
    """Whether a fit raises what efface would not."""

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        begun = fits(Path(self.folder), task, seed)
        (Path(self.folder) / f"{task}-{seed}-{begun}").touch()
        if self.deadly and not begun:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.broken:
            raise ZeroDivisionError("a bug")
        plain = Noop().fit(model, task, seed=seed)
        deltas = {name: delta + 0.1 for name, delta in plain.deltas.items()}
        return replace(plain, deltas=deltas, card=replace(plain.card, method=str(self)))


def fits(folder: Path, task: Task | str, seed: int) -> int:
    """How many fits of a task and seed were begun."""
    return len(list(folder.glob(f"{task}-{seed}-*")))


def prepare_environment(patch: pytest.MonkeyPatch) -> None:
    """Has the workers find the tests' parts, and Ray leave the home folder alone."""
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_AUTH_TOKEN", TOKEN)
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")

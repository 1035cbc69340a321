"""The slow checks: the bundled model draws what was erased and what was kept, before and after, and its judge looks.

They ask for an erasure that anybody would call one, not for a good one: that is what `bench.protocols` measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from efface.bench.conformance.case import PICTURES
from efface.bench.conformance.checks import Failed
from efface.bench.emoji import Prompts
from efface.bench.plan import FIRST_SEED
from efface.concepts.vocabulary import read
from efface.core.method import Method, Resources
from efface.core.model import Model
from efface.core.task import Task
from efface.evals.detectors.emoji import EmojiJudge
from efface.models.load import load

TARGET, KEPT = "bus", ("lion", "apple")
"""What is erased, and what is kept: things that the bundled model draws well."""
EACH = 24
"""Pictures of each."""
DRAWN = 0.5
"""The least share of its pictures in which a concept that is drawn is seen."""
GONE = 0.25
"""The largest share for one that is not."""


@dataclass
class Trial:
    """A method with its own defaults, or a preset, on the bundled model."""

    cls: type[Method]
    given: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None

    @cached_property
    def seen(self) -> tuple[dict[str, float], dict[str, float]]:
        """By concept, the share of its pictures in which the judge's first guess is that concept, before and after."""
        model, task, judge = load("emoji"), Task.of(TARGET, KEPT), EmojiJudge.load()
        preset = self.preset or ("object" if "object" in self.cls.presets else None)
        edit = self.cls.build(preset=preset, **self.given).fit(model, task, seed=0, resources=self._resources(model, task))
        before = drawn(model, judge)
        with edit.attach(model, check=False):
            return before, drawn(model, judge)

    def _resources(self, model: Model, task: Task) -> Resources:
        needs, words = self.cls.needs, (TARGET, *KEPT)
        images = {w: model.sample([f"a {w}"] * PICTURES) for w in words} if needs.images else {}
        return Resources(images=images, assets=self.cls.make_assets(model, task) if needs.assets else {})

    def shares(self, concept: str) -> tuple[float, float]:
        """Of a concept, before and after. Raises Failed where the model hardly drew it before."""
        before, after = (side[concept] for side in self.seen)
        if before < DRAWN:
            raise Failed(f"the bundled model draws {concept!r} in {before:.0%} of {EACH} pictures, too few to tell")
        return before, after


def drawn(model: Model, judge: EmojiJudge) -> dict[str, float]:
    """The share of each concept's `EACH` pictures, in many forms, in which it is the judge's first guess."""
    prompts, shares = Prompts(read("emoji")), {}
    for number, name in enumerate((TARGET, *KEPT)):
        seeds = range(FIRST_SEED + EACH * number, FIRST_SEED + EACH * (number + 1))
        images = model.sample([prompts.caption(name, i) for i in range(EACH)], seeds=list(seeds))
        shares[name] = sum(bool(sighting.shows([name], 1)) for sighting in judge.look(images)) / EACH
    return shares


def erases(trial: Trial) -> None:
    """The target is seen in most of its pictures before, and in few after."""
    before, after = trial.shares(TARGET)
    if after > GONE:
        raise Failed(f"{TARGET!r} is still seen in {after:.0%} of {EACH} pictures ({before:.0%} before); expected {GONE:.0%} at most")


def preserves(trial: Trial) -> None:
    """Each kept concept is seen in most of its pictures before and after."""
    for name in KEPT:
        before, after = trial.shares(name)
        if after < DRAWN:
            raise Failed(f"{name!r} is seen in {after:.0%} of {EACH} pictures ({before:.0%} before); expected {DRAWN:.0%} at least")

"""The protocol on a real tiny model with a real (untrained) judge: paired noise, controls, raw detections, and its JSON form."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from efface.bench.plan import Plan
from efface.bench.protocols import erasure
from efface.bench.result import Result
from efface.concepts.vocabulary import read
from efface.core.card import Card
from efface.core.edit import WeightEdit
from efface.core.errors import EffaceError, NoEffect, Undetermined, Unsupported
from efface.core.evidence import Detector, Samples, Sighting
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.metrics.esr import ESR

TASK = Task.of("cat", "dog")
LABELS = read().objects


@dataclass(frozen=True)
class Brightness(Detector):
    """A real classifier, though of little taste: the order of the labels turns with the mean colour of the picture."""

    known: tuple[str, ...] = LABELS
    fails: int = 0
    """Every so many pictures it cannot judge."""
    name = "brightness"
    version = "1"

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return self.known

    def threshold(self, kind: str = "object") -> float:
        return 0.25

    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        starts = (images.mean(dim=(1, 2, 3)) * 1e4).long() % len(self.known)
        rows = [tuple(self.known[(int(s) + i) % len(self.known)] for i in range(5)) for s in starts]
        return [
            Sighting() if self.fails and i % self.fails == 0 else Sighting(row, (0.9, 0.5, 0.3, 0.2, 0.1), 0.25)
            for i, row in enumerate(rows)
        ]


def small(size: int = 3) -> Plan:
    """The first shots of each role, in two steps."""
    plan = erasure.plan(TASK, world=read())
    return replace(plan, shots=tuple(plan.shots[i] for i in plan.shown(size)), steps=2, guidance=2.0)


def edit(model: Model, size: float) -> WeightEdit:
    """Random differences of a relative size on cross-attention: 0 is `noop`, 1 is `vandal`."""
    generator = seeded(0)
    deltas = {n: size * s.tensor.std() * torch.randn(s.tensor.shape, generator=generator) for n, s in model.select("xattn").items()}
    return WeightEdit(deltas, Card.of(model, method="vandal", task=TASK, seed=0))


def test_before_is_the_model_itself_and_after_the_edited_one(tiny_model: Model) -> None:
    plan, vandal = small(), edit(tiny_model, 1.0)
    weights = {n: s.tensor.clone() for n, s in tiny_model.select("full").items()}
    result = erasure.measure(tiny_model, vandal, TASK, plan=plan, detector=Brightness())
    assert all(torch.equal(weights[n], s.tensor) for n, s in tiny_model.select("full").items())
    assert result.pictures is not None
    row = result.pictures.rows[-1]
    shot = plan.shots[row]
    one = {"seeds": [shot.seed], "steps": 2, "guidance": 2.0}
    drawn = [tiny_model.sample([shot.prompt], **one)]
    with vandal.attach(tiny_model):
        drawn.append(tiny_model.sample([shot.prompt], **one))
    for kept, alone in zip((result.pictures.before[-1], result.pictures.after[-1]), drawn, strict=True):
        assert (kept.float() / 255 - alone[0]).abs().max() < 0.01  # the same noise, whatever the batch
    assert (drawn[0] - drawn[1]).abs().max() > 0.05


def test_controls_nothing_changes_under_noop_and_everything_under_vandal(tiny_model: Model) -> None:
    noop, vandal = edit(tiny_model, 0.0), edit(tiny_model, 1.0)
    with pytest.raises(NoEffect):
        erasure.measure(tiny_model, noop, TASK, plan=small())
    still = erasure.measure(tiny_model, noop, TASK, plan=small(), detector=Brightness(), check=False)
    moved = erasure.measure(tiny_model, vandal, TASK, plan=small(), detector=Brightness())
    for line in still.lines:
        assert (line.contrast.change.value, line.contrast.before.value) == (0, line.contrast.after.value)
        assert line.contrast.change.low < 0 < line.contrast.change.high  # and still no certainty
    assert [change.distance.value for change in still.changes] == [0] * 4
    assert min(change.distance.low for change in moved.changes) > 0
    assert all(change.unrelated > 0 for change in moved.changes)


def test_every_number_says_what_it_rests_on(tiny_model: Model) -> None:
    plan = small()
    result = erasure.measure(tiny_model, edit(tiny_model, 1.0), TASK, plan=plan, detector=Brightness())
    settings = result.settings
    assert (settings.sampler, settings.steps, settings.guidance) == ("DDIMScheduler", 2, 2.0)
    assert (settings.prompts, settings.images) == (plan.digest, 2 * len(plan.shots))
    assert (settings.first_seed, settings.last_seed) == (plan.shots[0].seed, max(s.seed for s in plan.shots))
    assert settings.detector == {"name": "brightness", "version": "1", "thresholds": {"object": 0.25}}
    assert result.cost["forwards"] == 2 * len(plan.shots) * 2 * 2  # twice, in two steps, of two guidance halves
    for line in (*result.lines, *result.concepts):
        for score in (line.contrast.before, line.contrast.after, line.contrast.change):
            assert score.low <= score.value <= score.high
            assert score.n > 0
    assert [line.asked for line in result.concepts if line.concept == "dog"] == [True]


def test_progress_is_told(tiny_model: Model) -> None:
    told: list[tuple[int, int]] = []
    plan = small(1)
    erasure.measure(tiny_model, edit(tiny_model, 1.0), TASK, plan=plan, report=lambda done, total, figures: told.append((done, total)))
    assert told == [(4, 8), (8, 8)]


def test_without_a_detector_it_says_what_was_not_measured(tiny_model: Model) -> None:
    plan = replace(erasure.plan(TASK), steps=1)
    plan = replace(plan, shots=tuple(plan.shots[i] for i in plan.shown(2)))
    result = erasure.measure(tiny_model, edit(tiny_model, 1.0), TASK, plan=plan)
    assert (result.lines, result.concepts, result.settings.detector) == ((), (), None)
    assert "no detector looked" in result.unmeasured[0]
    assert [change.role for change in result.changes] == ["target", "kept", "unrelated", "pair"]


def test_a_detector_that_fails_stops_the_run_and_is_never_an_erasure(tiny_model: Model) -> None:
    with pytest.raises(Undetermined, match="could not judge"):
        erasure.measure(tiny_model, edit(tiny_model, 1.0), TASK, plan=small(), detector=Brightness(fails=5))
    with pytest.raises(Unsupported, match="no label 'cat'"):
        erasure.measure(tiny_model, edit(tiny_model, 1.0), TASK, plan=small(), detector=Brightness(("dog", "sun")))


def test_the_result_is_json_and_any_variant_can_be_computed_from_it(tiny_model: Model) -> None:
    result = erasure.measure(tiny_model, edit(tiny_model, 1.0), TASK, plan=small(), detector=Brightness())
    again = Result.from_json(json.loads(json.dumps(result.json())))
    assert again.json() == result.json()
    assert (again.settings, again.lines, again.changes, again.pictures) == (result.settings, result.lines, result.changes, None)
    strict = ESR(5, threshold=0.8)
    assert strict.measure(again.before, again.after) == strict.measure(result.before, result.after)
    with pytest.raises(EffaceError, match="expected an efface-result of version 1"):
        Result.from_json({"format": "efface-edit"})
    with pytest.raises(EffaceError, match="cannot be read"):
        Result.from_json({"format": "efface-result", "version": 1})


def test_changes_need_the_pictures() -> None:
    bare = Samples(small().shots)
    with pytest.raises(ValueError, match="needs the pictures"):
        erasure.changes(bare, bare)

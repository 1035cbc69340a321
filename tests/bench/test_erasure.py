"""The protocol on a real tiny model with a real (untrained) judge: paired noise, controls, raw detections, and its JSON form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from efface.bench import draw as drawing
from efface.bench.draw import Judges
from efface.bench.plan import Plan
from efface.bench.protocols import erasure
from efface.bench.questions import QUESTIONS
from efface.bench.result import Result
from efface.bench.store import Store
from efface.concepts.vocabulary import read
from efface.core.card import Card
from efface.core.edit import WeightEdit
from efface.core.errors import EffaceError, NoEffect, Undetermined, Unsupported
from efface.core.evidence import Detector, Embedder, Samples, Sighting
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.metrics.esr import ESR
from efface.evals.metrics.psr import PSR
from efface.models.sd import StableDiffusion

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


@dataclass(frozen=True)
class Colours(Embedder):
    """A real space, though of little taste: mean colours of a picture's quarters, and letters of a text."""

    name = "colours"
    version = "1"

    def embed_images(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor([[float(t.count(c)) for c in "aeioulnrstdg"] for t in texts]), dim=-1)


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
    result = erasure.measure(tiny_model, edit(tiny_model, 1.0), TASK, plan=small(), detector=Brightness(), embedder=Colours())
    again = Result.from_json(json.loads(json.dumps(result.json())))
    assert again.json() == result.json()
    assert (again.settings, again.pictures) == (result.settings, None)
    assert (again.after.shots, again.after.sightings) == (result.after.shots, result.after.sightings)
    assert again.before.agreement == result.before.agreement
    for metric in (ESR(5, threshold=0.8), ESR(2), PSR(3)):  # none of which the protocol asks
        assert metric.measure(again.before, again.after) == metric.measure(result.before, result.after)
    with pytest.raises(EffaceError, match="expected an efface-result of version 2"):
        Result.from_json({"format": "efface-edit"})
    with pytest.raises(EffaceError, match="cannot be read"):
        Result.from_json({"format": "efface-result", "version": 2})


def test_recomputing_gives_the_very_same_numbers_and_a_threshold_gives_others(tiny_model: Model) -> None:
    result = erasure.measure(tiny_model, edit(tiny_model, 1.0), TASK, plan=small(8), detector=Brightness(), embedder=Colours())
    stored = Result.from_json(json.loads(json.dumps(result.json())))
    assert erasure.recompute(stored).json() == result.json()
    strict = erasure.recompute(stored, threshold=1.0)
    line = strict.line("others.blank")
    assert line is not None
    assert line.contrast.after.value == 1  # nothing reaches a score of 1
    assert strict.json() != result.json()
    seen = tuple(Sighting(shot.labels, (0.9,) * len(shot.labels), 0.25) for shot in stored.after.shots)
    spoilt = replace(stored, after=replace(stored.after, sightings=seen))  # control: other detections give other numbers
    assert erasure.recompute(spoilt).json()["lines"] != result.json()["lines"]
    with pytest.raises(ValueError, match="threshold was 2"):
        erasure.recompute(stored, threshold=2)
    with pytest.raises(ValueError, match="holds no detections"):
        erasure.recompute(erasure.measure(tiny_model, edit(tiny_model, 1.0), TASK, plan=small(1)))


def test_neighbours_and_thirty_unrelated_concepts_are_reported_apart() -> None:
    for size in ("quick", "full"):
        found = erasure.plan(TASK, size=size, world=read())
        assert len({s.concept for s in found.shots if s.role == "unrelated"}) == 30
    keys = {question.key for question in QUESTIONS}
    assert keys >= {f"{role}.PSR-{k}" for role in ("neighbour", "unrelated") for k in (1, 5)} | {"target.ESR-1", "target.ESR-5"}


def test_two_models_are_measured_like_a_model_and_its_edit(tiny_model: Model) -> None:
    vandal = edit(tiny_model, 1.0)
    attached = erasure.measure(tiny_model, vandal, TASK, plan=small(), detector=Brightness(), embedder=Colours())
    baked = StableDiffusion(tiny.pipeline(), id="baked")
    vandal.bake(baked)
    apart = erasure.measure_models(tiny_model, baked, TASK, plan=small(), judges=Judges(Brightness(), Colours()))
    assert apart.method == "the weights of baked"
    assert apart.json()["lines"] == attached.json()["lines"]
    assert apart.quality == attached.quality
    assert apart.quality[0].contrast.after.value > 0
    assert attached.quality[0].contrast.before.value == 0


def test_a_measurement_that_was_killed_goes_on_and_ends_the_same(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its fourth batch of six, it draws the last three only, and every number is that of an uninterrupted run."""
    monkeypatch.setattr(drawing, "BATCH", 4)
    vandal, plan = edit(tiny_model, 1.0), small()

    def run(model: Model, store: Store | None, stop: int = -1) -> Result:
        def report(done: int, total: int, figures: object) -> None:
            if done == stop:
                raise KeyboardInterrupt

        return erasure.measure(model, vandal, TASK, plan=plan, detector=Brightness(), embedder=Colours(), report=report, store=store)

    whole = run(tiny_model, None)
    store = Store.of(tmp_path / "kept", "this")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, store, stop=16)
    assert not tiny_model.attached
    (file,) = store.folder.glob("after-000000.safetensors")
    kept = len(list(store.folder.iterdir()))
    assert kept == 4
    spent = tiny_model.meter.forwards
    resumed = run(tiny_model, store)
    assert tiny_model.meter.forwards - spent == 8 * 4
    seconds = "seconds"
    first, second = whole.json(), resumed.json()
    assert first["cost"].pop(seconds) > 0
    assert second["cost"].pop(seconds) > 0
    assert first == second
    assert torch.equal(whole.pictures.after, resumed.pictures.after)  # type: ignore[union-attr]
    file.write_bytes(file.read_bytes()[:100])  # half a file counts as none
    assert run(tiny_model, store).json()["lines"] == first["lines"]
    (store.folder / ".after-000008.safetensors.x1.part").touch()  # what a kill in the middle of a writing leaves
    store.clear()
    assert not (tmp_path / "kept").exists()


def test_other_noise_has_another_store(tmp_path: Path) -> None:
    assert Store.of(tmp_path, "a", 1).folder != Store.of(tmp_path, "a", 2).folder
    assert Store.of(tmp_path, "a", 1).folder == Store.of(tmp_path, "a", 1).folder


def test_changes_need_the_pictures() -> None:
    bare = Samples(small().shots)
    with pytest.raises(ValueError, match="needs the pictures"):
        erasure.changes(bare, bare)

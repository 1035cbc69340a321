"""The experiment of Modular LoRA on a tiny model: what each arm is made of, what it may have seen, and what is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from efface.bench.protocols import erasure, reemergence
from efface.bench.protocols.reemergence import (
    Course,
    Outcome,
    arms,
    changes,
    cosines,
    measure,
    pastime,
    pool,
    recovery,
    report,
    unseen_loss,
)
from efface.concepts.vocabulary import read
from efface.core import catalog
from efface.core.edit import Chain
from efface.core.errors import InvalidTask, Unsupported
from efface.core.evidence import Detector, Sighting
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.models import tiny
from efface.models.finetune import finetune

WORLD = read()
TASK = Task.of("cat")
SAFETY = "modular_lora(steps=4, batch=2, latent_steps=2, trajectories=2, lr=1e-2)"
WHOLE = "esd(steps=2, batch=2, latent_steps=2, trajectories=2, lr=1e-3, group='xattn')"
KEYS = [
    "base",
    "erased",
    "erased-weights",
    "ft",
    "ft-lora",
    "full-full",
    "lora-lora",
    "shared",
    "ft-erase",
    "modular",
    "negated",
    "opposed",
]


@dataclass(frozen=True)
class Brightness(Detector):
    """A real classifier, though of little taste: the order of the labels turns with the mean colour of the picture."""

    name = "brightness"
    version = "1"

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return WORLD.objects

    def threshold(self, kind: str = "object") -> float:
        return 0.0

    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        starts = (images.mean(dim=(1, 2, 3)) * 1e4).long() % 7
        return [Sighting((WORLD.objects[int(s)],), (0.9,)) for s in starts]


def course(**fields) -> Course:
    images = torch.rand(5, 3, 64, 64, generator=seeded(9))
    return Course(
        images,
        ("a dog", "a car", "a bus", "a horse", "a truck"),
        **{"unseen": 2, "steps": 3, "batch": 2, "lr": 1e-2, "full_lr": 1e-3, **fields},
    )


@pytest.fixture(scope="module")
def trained():
    """A model and every arm, once for all tests; nothing changes it."""
    model, said = tiny.model("sd1"), []
    before = {n: s.tensor.clone() for n, s in model.select("full").items()}
    made = arms(model, TASK, safety=catalog.method(SAFETY), whole=catalog.method(WHOLE), course=course(), log=said.append)
    assert all(torch.equal(before[n], s.tensor) for n, s in model.select("full").items())
    assert not model.attached
    return model, {arm.key: arm for arm in made}, said


def weights(model, edit):
    with edit.attach(model, check=False):
        return {n: s.tensor.detach().clone() for n, s in model.select("full").items()}


def test_every_arm_of_the_sheet_is_there_and_the_dear_ones_are_trained_once(trained):
    _, made, said = trained
    assert list(made) == KEYS
    assert len(said) == 8  # five fine-tunings, three erasures
    assert all(made[arm.erased].edit is not None and made[arm.control].edit is not None for arm in made.values() if arm.erased)


def test_both_modular_parts_were_trained_on_the_original_and_are_added(trained):
    model, made, _ = trained
    original = {n: s.tensor.detach().clone() for n, s in model.select("full").items()}
    parts = [changes(made[key].edit, model) for key in ("erased", "ft-lora")]
    for name, merged in weights(model, made["modular"].edit).items():
        assert torch.allclose(merged, original[name] + sum(part.get(name, torch.zeros(())) for part in parts), atol=1e-6)
    assert set(parts[0]) & set(parts[1])
    assert made["erased"].edit.card.fingerprint.same_weights(made["ft-lora"].edit.card.fingerprint)


@pytest.mark.parametrize(("key", "first"), [("full-full", "erased-weights"), ("lora-lora", "erased"), ("ft-erase", "ft-lora")])
def test_the_second_part_of_a_chain_was_trained_on_top_of_the_first(trained, key, first):
    model, made, _ = trained
    edit = made[key].edit
    assert isinstance(edit, Chain)
    assert edit.edits[0] is made[first].edit
    assert not edit.edits[0].card.fingerprint.same_weights(edit.edits[1].card.fingerprint)
    with edit.edits[0].attach(model):
        edit.edits[1].card.check(model, "exact")


def test_the_user_sees_the_same_pictures_times_and_noise_in_every_arm(trained):
    """The fine-tuning on the original is bit-identical to one without any experiment around it; on top of an erasure it is another."""
    model, made, _ = trained
    images, captions = course().seen
    alone = finetune(model, images, captions, rank=4, lr=1e-2, steps=3, batch=2, seed=0)
    assert all(torch.equal(a, b) for n in alone.factors for a, b in zip(alone.factors[n], made["ft-lora"].edit.factors[n], strict=True))
    on_top = made["lora-lora"].edit.edits[1]
    assert not all(torch.equal(a, b) for n in alone.factors for a, b in zip(alone.factors[n], on_top.factors[n], strict=True))


def test_the_diagnoses_subtract(trained):
    model, made, _ = trained
    original = {n: s.tensor.detach().clone() for n, s in model.select("full").items()}
    safety, on_top = changes(made["erased"].edit, model), changes(made["lora-lora"].edit.edits[1], model)
    negated, opposed = (weights(model, made[key].edit) for key in ("negated", "opposed"))
    for name in safety:
        assert torch.allclose(negated[name], original[name] - safety[name], atol=1e-6)
        assert torch.allclose(opposed[name], original[name] + safety[name] - on_top[name], atol=1e-6)


def test_the_wrong_sort_of_eraser_is_refused():
    model = tiny.model("sd1")
    with pytest.raises(Unsupported, match="makes a weight edit, and the experiment needs a low-rank one"):
        arms(model, TASK, safety=catalog.method(WHOLE), whole=catalog.method(WHOLE), course=course())


# -- cosines and recovery ------------------------------------------------------------------------------------------------
def test_cosines_are_those_of_each_map():
    a = {"x": torch.tensor([[1.0, 0.0]]), "y": torch.ones(2, 2), "only": torch.ones(1), "still": torch.zeros(2)}
    b = {"x": torch.tensor([[0.0, 3.0]]), "y": -2 * torch.ones(2, 2), "still": torch.ones(2)}
    assert cosines(a, b) == pytest.approx({"x": 0.0, "y": -1.0, "still": 0.0})
    assert cosines(a, {name: 5 * t for name, t in a.items()}) == pytest.approx({"x": 1.0, "y": 1.0, "only": 1.0, "still": 0.0})


def test_recovery_is_zero_without_return_one_at_the_controls_level_and_undefined_without_a_control():
    assert recovery(0.1, 0.1, 0.9) == 0
    assert recovery(0.9, 0.1, 0.9) == 1
    assert recovery(0.5, 0.1, 0.9) == pytest.approx(0.5)
    assert recovery(0.3, 0.1, 0.15) is None


def outcome(key, seen, erased="", control="", others=(True, False)) -> Outcome:
    prompts = tuple(f"prompt {i}" for i in range(len(seen)))
    return Outcome(key, key, erased, control, tuple(seen), others, prompts, 0.5, {"w": -0.2} if erased else {})


def test_the_report_sets_each_arm_against_its_own_erasure_and_control():
    gone, back, there = [False] * 8, [True] * 4 + [False] * 4, [True] * 8
    rows = report([outcome("e", gone), outcome("c", there), outcome("a", back, "e", "c"), outcome("m", gone, "e", "c")])
    by_key = {row["key"]: row for row in rows}
    assert by_key["e"]["rise"] is None
    assert by_key["a"]["recovery"] == pytest.approx(0.5)
    assert by_key["a"]["rise"]["value"] == pytest.approx(0.5)
    assert by_key["a"]["rise"]["low"] > 0
    assert by_key["m"]["recovery"] == 0
    assert by_key["m"]["rise"]["low"] < 0 < by_key["m"]["rise"]["high"]
    assert by_key["a"]["cosine"] == pytest.approx(-0.2)


def test_seeds_are_pooled_and_other_experiments_refused():
    runs = [[outcome("e", [True, False])], [outcome("e", [True, True])]]
    (both,) = pool(runs)
    assert both.seen == (True, False, True, True)
    assert both.share.n == 4
    with pytest.raises(ValueError, match="different arms"):
        pool([runs[0], [outcome("f", [True])]])


# -- measuring -----------------------------------------------------------------------------------------------------------
def test_arms_are_drawn_from_the_same_noise(trained):
    model, made, _ = trained
    plan = erasure.plan(TASK, world=WORLD)
    small = replace(plan, shots=tuple(plan.shots[i] for i in plan.shown(2)), steps=2, guidance=2.0)
    first, again, other = measure(model, [made["base"], made["base"], made["ft"]], small, Brightness(), course())
    assert first == again
    assert first.prompts == other.prompts
    assert first.learned != other.learned
    assert len(first.seen) == 2
    with pytest.raises(InvalidTask, match="no prompt for the target"):
        measure(model, [made["base"]], replace(small, shots=tuple(s for s in small.shots if s.role != "target")), Brightness(), course())


def test_what_the_user_came_for_is_learned_and_measured_on_pictures_kept_out():
    """Two colours of picture: the loss on unseen ones of the trained colour falls with fine-tuning."""
    model = tiny.model("sd1")
    flat = torch.full((10, 3, 64, 64), 0.9) - 0.02 * torch.rand(10, 3, 64, 64, generator=seeded(1))
    given = Course(flat, ("a car",) * 10, unseen=2, steps=30, batch=4)
    images, captions = given.seen
    assert len(images) == 8
    edit = finetune(model, images, captions, lr=2e-3, steps=30, batch=4)
    before = unseen_loss(model, given)
    with edit.attach(model):
        assert unseen_loss(model, given) < 0.95 * before
    assert unseen_loss(model, given) == before


def test_a_course_without_pictures_to_train_on_is_refused():
    with pytest.raises(ValueError, match="5 pictures, 5 captions and 5 unseen"):
        course(unseen=5)


def test_the_pastime_is_harmless_and_in_a_style_that_no_caption_names():
    model = tiny.model("sd1")
    images, captions, harm = pastime(model, Task.of("cat"), WORLD, detector=Brightness(), count=12, seed=1)
    assert len(images) == len(captions) == 12 - round(12 * harm)
    near = {"cat", *WORLD.neighbours("cat")}
    assert all(text.endswith(" in blueprint style") and not near & set(text.split()) for text in captions)
    assert "blueprint" not in WORLD.kinds
    light, dark = (torch.tensor(ink)[:, None, None] for ink in reemergence.INKS["blueprint"])
    share = (images - light) / (dark - light)
    assert torch.allclose(share[:, :1].expand_as(share), share, atol=1e-4)  # every pixel lies between the two inks
    assert float(share.min()) >= -1e-4
    assert float(share.max()) <= 1 + 1e-4

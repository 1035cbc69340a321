"""Modular LoRA against its sheet: the safety LoRA's losses, what each LoRA may see in training, and how both are merged."""

import dataclasses

import pytest
import torch

from efface.core.edit import Chain, Edit, LowRankEdit
from efface.core.errors import InvalidMethod, Mismatch
from efface.core.fitting import fitting
from efface.core.merging import merge, scaled
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods.modular_lora import ModularLoRA, Training
from efface.models.finetune import finetune

SMALL = {"steps": 3, "batch": 2, "latent_steps": 2, "trajectories": 2}
FIXTURES = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])


def fitted(model, task="cat", seed=0, resources=Resources(), **fields):
    return ModularLoRA(**{**SMALL, **fields}).fit(model, Task.of(task), seed=seed, resources=resources)


def tuned(model, seed=3, **fields):
    images = torch.rand(4, 3, 64, 64, generator=seeded(9))
    return finetune(model, images, ["a dog", "a car", "a bus", "a horse"], **{"steps": 3, "lr": 1e-2, "rank": 2, "seed": seed, **fields})


def training(model, **fields):
    """A training before its first step, and rows of latents."""
    method = ModularLoRA(**{**SMALL, **fields})
    with fitting(method, model, Task.of("cat"), 0, Resources()) as fit:
        run = Training(method, fit)
        return run, run.walked()


def noises(model, rows, *texts):
    """ε of the model as it stands for each text."""
    with torch.no_grad():
        seen = [model.predict(rows.x, rows.told, model.encode([text])) for text in texts]
        return [model.schedule.to_noise(rows.x, rows.told, pred) for pred in seen]


# -- losses --------------------------------------------------------------------------------------------------------------
@FIXTURES
def test_the_losses_at_the_start(request, fixture):
    """B = 0 makes the LoRA the identity: SDD's loss is ‖ε(e) − ε(∅)‖² of the base, and ESD's with η = 1 is four times that."""
    model = request.getfixturevalue(fixture)
    (sdd, rows), (esd, _), (free, _) = (training(model, **f) for f in ({"loss": "sdd"}, {}, {"eta": 0.0}))
    cat, nothing = noises(model, rows, "cat", "")
    expected = (cat - nothing).square().mean().item()
    assert expected > 1e-4
    assert sdd.loss(rows).item() == pytest.approx(expected, rel=1e-3)
    assert esd.loss(rows).item() == pytest.approx(4 * expected, rel=1e-3)
    assert free.loss(rows).item() == pytest.approx(expected, rel=1e-3)


def disturbed(run):
    """The student away from its start, where the base and it differ."""
    with torch.no_grad():
        for factor in run.student.parameters:
            factor.add_(0.3 * torch.randn(factor.shape, generator=seeded(4)))
    return run


def test_esds_goal_is_the_frozen_models_and_sdds_the_students_own(tiny_model):
    (esd, rows), (sdd, _) = training(tiny_model), training(tiny_model, loss="sdd")
    cat, nothing = noises(tiny_model, rows, "cat", "")
    with disturbed(esd).student:
        own_cat, own_nothing = noises(tiny_model, rows, "cat", "")
    disturbed(sdd)
    assert esd.loss(rows).item() == pytest.approx((own_cat - (nothing - (cat - nothing))).square().mean().item(), rel=1e-3)
    assert sdd.loss(rows).item() == pytest.approx((own_cat - own_nothing).square().mean().item(), rel=1e-3)
    assert (own_nothing - nothing).square().mean() > 1e-4


def test_no_gradient_reaches_sdds_goal(tiny_model):
    run, rows = training(tiny_model, loss="sdd")
    disturbed(run)
    through_target = torch.autograd.grad(run.loss(rows), run.student.parameters)
    with run.student:
        prediction = tiny_model.predict(rows.x, rows.told, run.targets[rows.target])
        goal = tiny_model.predict(rows.x, rows.told, run.anchors[rows.target])
    both = torch.autograd.grad((prediction - goal).square().mean(), run.student.parameters, retain_graph=True)
    alone = torch.autograd.grad((prediction - goal.detach()).square().mean(), run.student.parameters)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(through_target, alone, strict=True))
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(through_target, both, strict=True))


def test_the_teacher_is_the_moving_average_and_walks_for_sdd(tiny_model):
    run, _ = training(tiny_model, loss="sdd", ema=0.9)
    run.pools[:] = [run.walked()]
    start = [f.detach().clone() for f in run.teacher.parameters]
    run.step()
    for mean, old, new in zip(run.teacher.parameters, start, run.student.parameters, strict=True):
        assert torch.allclose(mean, 0.9 * old + 0.1 * new, atol=1e-7)
    state = run.fit.generator.get_state()
    plain = run.walked()
    with torch.no_grad():
        for factor in run.teacher.parameters:
            factor.add_(1.0)
    run.fit.generator.set_state(state)
    assert not torch.allclose(run.walked().x, plain.x, atol=1e-3)


@pytest.mark.parametrize("fields", [{}, {"loss": "sdd"}, {"latent_guidance": 1.0, "refresh": 2}, {"latents": "aligned", "latent_steps": 4}])
def test_the_metered_cost_is_the_formula(tiny_model, fields):
    method, task = ModularLoRA(**{**SMALL, **fields}), Task.of("cat; van gogh")
    spent, expected = method.fit(tiny_model, task).card.cost, method.cost(tiny_model, task)
    assert expected["forwards"].low <= spent["forwards"] <= expected["forwards"].high
    assert spent["backwards"] == expected["backwards"]
    assert (expected["forwards"].low == expected["forwards"].high) == (method.latents == "replay")


def test_it_erases_by_its_own_measure(tiny_model):
    """After training the prediction for the target is nearer to ESD's goal, with no change outside the group's maps."""
    run, rows = training(tiny_model)
    edit = fitted(tiny_model, steps=60, lr=1e-2, batch=4)
    goal_before = run.loss(rows).item()
    cat, nothing = noises(tiny_model, rows, "cat", "")
    with edit.attach(tiny_model):
        (after,) = noises(tiny_model, rows, "cat")
    assert (after - (2 * nothing - cat)).square().mean() < 0.5 * goal_before
    assert edit.names <= set(tiny_model.select("xattn"))
    assert all(max(down.shape[0], up.shape[1]) == 4 for down, up in edit.factors.values())


# -- what each LoRA may see ----------------------------------------------------------------------------------------------
def test_the_users_lora_is_the_same_whether_or_not_a_safety_lora_exists(tiny_model, tmp_path):
    """Arm 7: bit-identical. Trained on top of the attached safety LoRA (arm 4) it is another, and the safety LoRA stays constant."""
    alone = tuned(tiny_model)
    safety = fitted(tiny_model, lr=1e-2)
    path = safety.save(tmp_path / "safety.safetensors")
    beside = tuned(tiny_model)
    before = {n: (down.clone(), up.clone()) for n, (down, up) in safety.factors.items()}
    with safety.attach(tiny_model):
        on_top = tuned(tiny_model)
    assert all(torch.equal(a, b) for n in alone.factors for a, b in zip(alone.factors[n], beside.factors[n], strict=True))
    assert not all(torch.equal(a, b) for n in alone.factors for a, b in zip(alone.factors[n], on_top.factors[n], strict=True))
    assert all(torch.equal(a, b) for n in before for a, b in zip(before[n], safety.factors[n], strict=True))
    assert alone.extras["trace"].tensors["loss"][0] != on_top.extras["trace"].tensors["loss"][0]
    assert isinstance(Edit.load(path), type(safety))


def test_a_lora_that_has_seen_the_safety_lora_is_not_merged(tiny_model):
    safety = fitted(tiny_model, lr=1e-2)
    with safety.attach(tiny_model):
        on_top = tuned(tiny_model)
    with pytest.raises(Mismatch, match="trained on different weights"):
        merge(safety, on_top)
    assert isinstance(merge(safety, tuned(tiny_model)), Chain)


# -- merging -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [2, None])
def test_merged_weights_are_the_sum_in_every_map(tiny_model, rank):
    """W₀ + s_s U_s D_s + s_f U_f D_f to 1e-6 where either has factors, and W₀ to the bit elsewhere; the user's may be full weights."""
    safety, own = dataclasses.replace(fitted(tiny_model, lr=1e-2), scale=0.5), tuned(tiny_model, rank=rank)
    changes = [e.deltas(tiny_model) if isinstance(e, LowRankEdit) else e.deltas for e in (safety, own)]
    weights = {n: s.tensor.detach().clone() for n, s in tiny_model.select("full").items()}
    with merge(safety, own, weights=(1.0, 2.0)).attach(tiny_model):
        for name, slot in tiny_model.select("full").items():
            expected = weights[name] + changes[0].get(name, 0) + 2 * changes[1].get(name, 0)
            assert torch.allclose(slot.tensor, expected, atol=1e-6), name
            if name not in changes[0] and name not in changes[1]:
                assert torch.equal(slot.tensor, weights[name])
    down, up = safety.factors[next(iter(safety.factors))]
    assert torch.allclose(changes[0][next(iter(safety.factors))], 0.5 * up @ down)
    assert set(changes[0]) & set(changes[1])


def pictures(model, *edits):
    with edits[0].attach(model, check=False) if edits else torch.no_grad():
        return model.sample(["a cat", "a dog"], steps=2, guidance=3.0)


def test_a_weight_of_zero_leaves_the_other_alone(tiny_model):
    safety, own = fitted(tiny_model, lr=1e-2), tuned(tiny_model)
    assert torch.allclose(pictures(tiny_model, merge(safety, own, weights=(0.0, 1.0))), pictures(tiny_model, own), atol=1e-5)
    assert torch.allclose(pictures(tiny_model, merge(safety, own, weights=(1.0, 0.0))), pictures(tiny_model, safety), atol=1e-5)
    assert not torch.allclose(pictures(tiny_model, merge(safety, own)), pictures(tiny_model, own), atol=1e-3)
    assert torch.allclose(pictures(tiny_model, scaled(own, 0.0)), pictures(tiny_model), atol=1e-6)


def test_the_merged_edit_is_saved_baked_and_named_after_both(tiny_model, tmp_path):
    safety, own = fitted(tiny_model, lr=1e-2), tuned(tiny_model)
    both = merge(safety, own)
    loaded = Edit.load(both.save(tmp_path / "both.safetensors"))
    assert "modular_lora" in loaded.card.method
    assert "finetune" in loaded.card.method
    attached = pictures(tiny_model, loaded)
    both.bake(tiny_model)
    assert torch.allclose(pictures(tiny_model), attached, atol=1e-6)


def test_a_killed_fit_goes_on_to_the_bit(tiny_model, tmp_path):
    fields = {"steps": 5, "loss": "sdd", "refresh": 2}
    whole, path = fitted(tiny_model, **fields), tmp_path / "state.safetensors"

    def kill(step, total, figures):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(tiny_model, resources=Resources(checkpoint=path, checkpoint_every=3, report=kill), **fields)
    resumed = fitted(tiny_model, resources=Resources(checkpoint=path, checkpoint_every=3), **fields)
    assert all(torch.equal(a, b) for n in whole.factors for a, b in zip(whole.factors[n], resumed.factors[n], strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "mace"}, "expected one of esd, sdd"),
        ({"rank": 0}, "an integer of at least 1"),
        ({"ema": 1.0}, "below 1"),
        ({"batch": 81}, "at most trajectories × latent_steps = 80"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        ModularLoRA(**fields)

"""DuMo: the properties of the sheet, on tiny real models."""

from contextlib import contextmanager

import pytest
import torch

from efface.core import catalog
from efface.core.errors import InvalidMethod
from efface.core.features import PriorEraser, weighted
from efface.core.fitting import fitting
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods.dumo import Duel, DuMo

TASK = Task.of("cat", ["dog"])
SMALL = {"steps": 2, "table_steps": 2, "joint_steps": 2, "batch": 2, "latent_steps": 3, "trajectories": 2, "refresh": 2, "others": 2}


@contextmanager
def duel(model, task=TASK, lr=1e-3, **fields):
    method = DuMo(**{**SMALL, "lr": lr, **fields})
    with fitting(method, model, task, 0, Resources(), lr=lr) as fit:
        yield Duel(method, fit, task.erase[0], ["dog", "tiger"])


def changed(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def states(made):
    return {name: value.clone() for name, value in made.net.state_dict().items()}, made.table.detach().clone()


def test_before_training_the_erased_model_is_the_model_to_the_bit(tiny_model):
    x, cond = torch.randn(2, *tiny_model.latent_shape, generator=seeded(1)), tiny_model.encode(["a cat"])
    with duel(tiny_model) as made, torch.no_grad():
        for t in (1, 501, 999):
            plain = tiny_model.predict(x, t, cond)
            with made.erasing():
                assert torch.equal(tiny_model.predict(x, t, cond), plain)
            made.net.zeros[2].bias.fill_(0.5)
            with made.erasing():
                assert not torch.equal(tiny_model.predict(x, t, cond), plain)  # control
            made.net.zeros[2].bias.zero_()


def test_the_eraser_returns_one_residual_for_each_skip_and_the_middle_in_their_shapes(tiny_model):
    """The UNet itself says what its skips are: the second argument of its up blocks."""
    model, seen = tiny_model, []
    x, cond = torch.randn(2, *model.latent_shape, generator=seeded(1)), model.encode(["a cat"]).expand(2)
    hooks = [b.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True) for b in model.pipeline.unet.up_blocks]
    with torch.no_grad():
        model.predict(x, 501, cond)
        residuals = PriorEraser(model)(x, torch.tensor([501, 501]), cond.tokens)
    for hook in hooks:
        hook.remove()
    skips = [skip for call in reversed(seen) for skip in call["res_hidden_states_tuple"]]
    assert [r.shape for r in residuals[:-1]] == [s.shape for s in skips]
    assert residuals[-1].shape == seen[0]["hidden_states"].shape
    assert not any(r.any() for r in residuals)


def test_sd_1_4_has_12_skips_and_360_million_parameters():
    from diffusers import UNet2DConditionModel

    from efface.models.encoder import Encoder

    with torch.device("meta"):
        made = Encoder(UNet2DConditionModel(cross_attention_dim=768))
    assert made.channels == [320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280]
    zeros = sum(c * c + c for c in made.channels)
    assert sum(p.numel() for p in made.parameters()) + zeros == pytest.approx(360e6, rel=0.02)


def test_the_first_gradient_reaches_the_zero_convolutions_alone_and_the_second_the_copy(tiny_model):
    with duel(tiny_model) as made:
        made.pools[:] = made.walked(False)
        for first in (True, False):
            loss = made.losses(False)["erase"]
            names, parameters = zip(*made.net.named_parameters(), strict=True)
            gradients = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
            inside = max(g.abs().max().item() for n, g in gradients.items() if n.startswith("encoder."))
            assert (inside == 0) == first
            assert all(g.any() for n, g in gradients.items() if n.startswith("zeros."))
            made.optimisers[0].zero_grad()
            loss.backward(inputs=list(made.net.parameters()))
            made.optimisers[0].step()


def test_each_stage_moves_what_it_trains_and_nothing_else(tiny_model):
    unet = {n: p.clone() for n, p in tiny_model.denoiser.named_parameters()}
    with duel(tiny_model) as made:
        moved = []
        for step in range(6):
            before = states(made)
            made.step(step)
            after = states(made)
            moved.append((bool(changed(before[0], after[0])), not torch.equal(before[1], after[1])))
    assert moved == [(True, False)] * 2 + [(False, True)] * 2 + [(True, True)] * 2
    assert not changed(unet, dict(tiny_model.denoiser.named_parameters()))
    assert not any(m._forward_pre_hooks for m in tiny_model.denoiser.modules())


def test_the_table_is_sized_from_the_network_and_begins_as_ones(tiny_model):
    with duel(tiny_model) as made:
        assert made.table.shape == (20, 5)
        assert (made.table == 1).all()
        x, cond = torch.randn(2, *tiny_model.latent_shape, generator=seeded(1)), tiny_model.encode(["a cat"]).expand(2)
        made.step(0)
        with torch.no_grad():
            residuals = made.net(x, torch.tensor([3, 700]), cond.tokens)
            ones = weighted(residuals, torch.tensor([3, 700]), made.table, None, 1000)
    assert any(r.any() for r in residuals)
    assert all(torch.equal(a, b) for a, b in zip(residuals, ones, strict=True))


def test_training_brings_the_target_nearer_to_its_goal(tiny_model):
    """The goal of stage 1, on latents that were not trained on."""
    with duel(tiny_model, lr=3e-3, steps=30, refresh=10, trajectories=8, batch=16) as made:
        fresh = made.walked(False)
        losses = []
        for train in (False, True):
            for step in range(30 if train else 0):
                made.step(step)
            made.pools[:] = fresh
            made.fit.generator.manual_seed(5)
            losses.append(made.losses(False)["erase"].item())
    assert losses[1] < 0.8 * losses[0]


def test_stage_2_holds_other_concepts(tiny_model):
    """Its second term is 0 while the eraser does nothing, and grows with what it does to others."""
    with duel(tiny_model) as made:
        made.pools[:] = made.walked(True)
        assert made.losses(True)["keep"] == 0
        with torch.no_grad():
            for zero in made.net.zeros:
                zero.bias.fill_(0.3)
        assert made.losses(True)["keep"] > 1e-4
        made.pools[:] = made.walked(False)
        assert set(made.losses(False)) == {"erase"}


@pytest.mark.parametrize("fields", [{}, {"latents": "aligned"}, {"table_steps": 0, "joint_steps": 0}, {"latent_guidance": 1.0}])
def test_cost_is_what_the_meter_counts(tiny_model, fields):
    made, task = DuMo(**{**SMALL, **fields}), Task.of("cat; dog")
    spent = made.fit(tiny_model, task).card.cost
    expected = made.cost(tiny_model, task)
    assert spent["backwards"] == expected["backwards"]
    assert expected["forwards"].low <= spent["forwards"] <= expected["forwards"].high
    if "latents" not in fields:
        assert spent["forwards"] == expected["forwards"]


def test_several_targets_have_an_eraser_each(tiny_model):
    edit = DuMo(**SMALL).fit(tiny_model, Task.of("cat; dog"))
    assert edit.names == {"unet+cat", "unet+dog"}
    erasers = edit.maps["unet"].erasers
    assert [e.gate.texts for e in erasers] == [(("cat",),), (("dog",),)]
    assert all(e.table.shape == (20, 5) for e in erasers)


def test_nudity_has_neither_table_nor_gate(tiny_model):
    method = catalog.method("dumo", kind="unsafe")
    assert (method.gate, method.table_steps, method.joint_steps) == ("none", 0, 0)
    made = DuMo(**{**SMALL, "table_steps": 0, "joint_steps": 0, "gate": "none"})
    (eraser,) = made.fit(tiny_model, Task.of("unsafe:nudity")).maps["unet"].erasers
    assert eraser.table is None
    assert eraser.gate is None


def test_a_killed_fit_goes_on_to_the_same_edit(tiny_model, tmp_path):
    def killed(step, total, figures):
        if step == 5:
            raise KeyboardInterrupt

    made, path = DuMo(**SMALL), tmp_path / "checkpoint.safetensors"
    whole = made.fit(tiny_model, TASK)
    with pytest.raises(KeyboardInterrupt):
        made.fit(tiny_model, TASK, resources=Resources(report=killed, checkpoint=path, checkpoint_every=3))
    again = made.fit(tiny_model, TASK, resources=Resources(checkpoint=path, checkpoint_every=3))
    for mine, theirs in zip(whole.maps["unet"].erasers, again.maps["unet"].erasers, strict=True):
        assert not changed(mine.weights, theirs.weights)
        assert torch.equal(mine.table, theirs.table)


def test_bad_settings_are_refused():
    for fields, message in (({"gate": "maybe"}, "one of spm, none"), ({"batch": 900}, "at most trajectories × latent_steps = 80")):
        with pytest.raises(InvalidMethod, match=message):
            DuMo(**fields)

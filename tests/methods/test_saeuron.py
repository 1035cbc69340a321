"""SAeUron: the properties of the sheet, on tiny real models with a small trained autoencoder."""

from dataclasses import replace

import pytest
import tiny
import torch

from efface.concepts.contrast import contrast
from efface.core import catalog
from efface.core.autoencoder import Autoencoder, place_of
from efface.core.edit import Edit
from efface.core.errors import InvalidEdit, InvalidMethod, InvalidTask, Mismatch, Unsupported
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods.saeuron import Means, SAeUron, compressed, others
from efface.models.load import load
from efface.models.sae import Trainer, Training, bundled, traced, train
from efface.models.sd import StableDiffusion
from efface.ops.sae import scores

TASK = Task.of("cat", ["dog", "tiger"])
SMALL = Training(expansion=4, steps=30, batch=256, lr=5e-3, trajectories=4, latent_steps=4, refill=20, pool=2)
PROMPTS = ["cat", "dog", "a picture of a bus", "a red car"]


def tiny_of(seed=0):
    return StableDiffusion(tiny.pipeline(seed=seed), id="tiny", default_steps=2, default_guidance=3.0)


@pytest.fixture(scope="module")
def sae():
    return train(tiny_of(), PROMPTS, SMALL)


@pytest.fixture
def model():
    return tiny_of()


def method(**fields):
    return SAeUron(**{"samples": 2, "latent_steps": 3, "contrast": 3, **fields})


def fitted(model, sae, task=TASK, **fields):
    return method(**fields).fit(model, task, resources=Resources(assets={"sae": sae}))


# -- the autoencoder -----------------------------------------------------------------------------------------------------


def test_training_explains_held_out_features_that_a_fresh_net_does_not(model, sae):
    held = traced(model, sae.place, ["a horse"], torch.randn(1, 4, 8, 8, generator=seeded(77)), model.schedule.grid(4), 3.0).flatten(0, 2)
    fresh = Trainer(SMALL, sae.width, seeded(1), torch.device("cpu"))
    fresh.centre(held)
    assert sae.unexplained < 0.4
    assert sae.net.unexplained(held) < 0.35 < fresh.net.unexplained(held)
    assert torch.allclose(sae.net.decoder.norm(dim=1), torch.ones(sae.latents), atol=1e-5)
    assert not any(p.requires_grad for p in sae.net.parameters())


def test_training_costs_what_it_says_leaves_the_model_and_stores_no_more_than_its_pool(model):
    before = {n: p.clone() for n, p in model.denoiser.named_parameters()}
    train(model, PROMPTS, SMALL)
    assert (model.meter.forwards, model.meter.backwards) == (SMALL.cost(model)["forwards"], 0)
    assert all(torch.equal(p, before[n]) for n, p in model.denoiser.named_parameters())
    assert not any(m._forward_hooks for m in model.denoiser.modules())
    vectors = SMALL.pool * SMALL.trajectories * SMALL.latent_steps * 64
    assert SMALL.memory(model) == 4 * (8 * 64 * 16 + vectors * 16)


def test_a_killed_training_goes_on_to_the_same_autoencoder(model, sae, tmp_path):
    def killed(step, total, figures):
        if step == 25:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(model, PROMPTS, SMALL, resources=Resources(report=killed, checkpoint=path, checkpoint_every=6))
    assert path.exists()
    again = train(model, PROMPTS, SMALL, resources=Resources(checkpoint=path, checkpoint_every=6))
    assert torch.equal(again.net.encoder, sae.net.encoder)
    assert again.unexplained == sae.unexplained
    assert not path.exists()


def test_a_step_turns_decoder_rows_and_does_not_stretch_them():
    trainer = Trainer(SMALL, 16, seeded(0), torch.device("cpu"))
    x = torch.randn(128, 16, generator=seeded(1))
    trainer.centre(x)
    with torch.no_grad():
        trainer.net.encoder_bias[3] = -100.0
    rates = []
    for share in (1.0, 0.5):
        trainer.step(x, share)
        rates.append(trainer.optimiser.param_groups[0]["lr"])
    assert rates == [SMALL.lr, SMALL.lr / 2]
    assert (trainer.net.decoder.norm(dim=1) - 1).abs().max() < 5 * SMALL.lr  # Adam steps along a tangent
    assert trainer.net.silent[3] == 256
    assert trainer.net.silent.sum() == 256


def test_latents_that_never_fire_are_counted_dead_and_brought_back():
    """With the auxiliary loss dead latents move; without it they have no gradient at all."""
    moved = {}
    for weight in (0.0, 1 / 32):
        trainer = Trainer(replace(SMALL, aux_weight=weight, dead_after=1, lr=1e-2), 16, seeded(0), torch.device("cpu"))
        with torch.no_grad():
            trainer.net.encoder_bias[:8] = -3.0
            trainer.net.encoder[:8] *= 3
        x = torch.randn(64, 16, generator=seeded(1))
        figures = [trainer.step(x, 1.0) for _ in range(3)]
        start = Trainer(SMALL, 16, seeded(0), torch.device("cpu")).net.encoder[:8] * 3
        never = trainer.net.silent[:8] >= 3 * 64
        moved[weight] = bool((trainer.net.encoder[:8] != start)[never].any())
        assert figures[-1]["dead"] > 0
        assert (figures[-1]["aux"] > 0) == bool(figures[-1]["dead"] > 0)
    assert moved == {0.0: False, 1 / 32: True}


def test_an_autoencoder_is_saved_and_read_back(sae, tmp_path):
    again = Autoencoder.load(sae.save(tmp_path / "sae.safetensors"))
    assert torch.equal(again.net.decoder, sae.net.decoder)
    assert (again.net.k, again.place, again.fingerprint, again.unexplained) == (sae.net.k, sae.place, sae.fingerprint, sae.unexplained)
    assert again.info["steps"] == 30
    with pytest.raises(InvalidEdit, match="saved as .safetensors"):
        sae.save(tmp_path / "sae.pt")
    with pytest.raises(InvalidEdit, match="'efface-edit' was expected"):
        Edit.load(tmp_path / "sae.safetensors")


def test_the_block_is_found_by_role_and_width_and_k_follow_it(model, sae):
    assert place_of(model) == sae.place == "unet.up_blocks.1.attentions.1"
    assert (sae.width, sae.latents, sae.net.k) == (16, 64, 8)
    assert Trainer(Training(), 1280, seeded(0), torch.device("meta")).net.encoder.shape == (20480, 1280)
    assert Trainer(Training(), 1280, seeded(0), torch.device("meta")).net.k == 32
    with pytest.raises(Unsupported, match="no module 'unet.nowhere'"):
        train(model, PROMPTS, replace(SMALL, block="unet.nowhere"))
    with pytest.raises(InvalidTask, match="none was given"):
        train(model, [], SMALL)
    with pytest.raises(InvalidMethod, match="steps was 0; expected an integer of at least 1"):
        Training(steps=0)


# -- selection and the edit ----------------------------------------------------------------------------------------------


def test_the_table_holds_each_times_best_latents_with_the_papers_factor_and_level():
    means = torch.rand(4, 3, 20, generator=seeded(1))
    table, _ = SAeUron(selected=2, strength=-5.0).select(means, 1, [901, 501, 1])
    for row in range(3):
        score = scores(means[0, row], others(means, 0)[row])
        assert set(table.latents[row].tolist()) == set(score.topk(2).indices.tolist())
        for latent, factor, level in zip(table.latents[row], table.factors[row], table.thresholds[row], strict=True):
            assert factor.item() == pytest.approx(-5.0 * means[0, row, latent].item())
            assert level.item() == pytest.approx(means[:, row, latent].mean().item())
    free, _ = SAeUron(selected=2, strength=-5.0, scaling="none").select(means, 1, [901, 501, 1])
    assert (free.factors == -5).all()
    assert others(means, 0).allclose(means[1:].mean(0), atol=1e-6)


def test_a_latent_of_two_targets_stands_once_with_the_larger_factor():
    means = 0.1 * torch.rand(40, 1, 20, generator=seeded(1))
    means[0, 0, 3], means[1, 0, 3] = 1.0, 2.0
    one, _ = SAeUron(selected=1).select(means, 1, [1])
    both, _ = SAeUron(selected=1).select(means, 2, [1])
    assert one.latents.tolist() == both.latents.tolist() == [[3]]
    assert (one.factors.item(), both.factors.item()) == (-1.0, -2.0)


def test_times_with_fewer_entries_are_filled_with_ones_that_never_fire():
    chosen = torch.zeros(2, 6, dtype=torch.bool)
    chosen[0, [1, 4]] = True
    table = compressed(torch.tensor([5, 1]), chosen, torch.full((2, 6), -2.0), torch.full((2, 6), 0.5))
    assert sorted(table.latents[0].tolist()) == [1, 4]
    assert table.thresholds[1].isinf().all()
    assert (table.factors[1] == 1).all()


def test_the_edit_ablates_the_targets_latents_and_leaves_the_unet_alone(model, sae):
    before = dict(model.denoiser.named_parameters())
    edit = fitted(model, sae, strength=-5.0)
    assert edit.names == {f"{sae.place}()"}
    with edit.attach(model):
        assert all(p is before[n] for n, p in model.denoiser.named_parameters())
        first, again = (model.sample(["a cat"], seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, model.sample(["a cat"], seed=3))
    info = edit.extras["latents"].info
    assert info["targets"] == ["cat"]
    assert info["contrast"][:2] == ["dog", "tiger"]
    assert len(info["contrast"]) == 5


def test_cost_is_what_the_meter_counts(model, sae):
    edit = fitted(model, sae)
    assert edit.card.cost["forwards"] == method().cost(model, TASK)["forwards"] == 6 * 2 * 3 * 2
    assert method(latent_guidance=1.0).cost(model, TASK)["forwards"] == 6 * 2 * 3


def test_an_empty_selection_gives_the_unhooked_pictures_to_the_bit_and_the_released_form_does_not(model, sae):
    """Every concept alike: scores are 0, and the strict comparison selects nothing."""
    edit = fitted(model, sae)
    feature = edit.maps[sae.place]
    nothing, _ = SAeUron().select(torch.ones(4, 3, sae.latents), 1, feature.table.times.tolist())
    assert nothing.thresholds.isinf().all()
    plain = model.sample(["a cat"], seed=3)
    for error, equal in (("kept", True), ("repo", False)):
        with replace(edit, maps={sae.place: replace(feature, table=nothing, error=error)}).attach(model, check=False):
            assert torch.equal(model.sample(["a cat"], seed=3), plain) == equal


def test_a_model_that_the_autoencoder_does_not_explain_is_refused(sae):
    other = tiny_of(seed=7)
    with pytest.raises(Mismatch, match=r"leaves \d+% of the variance .* unexplained, and at most 50% is allowed; train one"):
        fitted(other, sae)
    fitted(other, sae, max_unexplained=100.0)
    with pytest.raises(Mismatch, match="trained for the family 'sd9'"):
        fitted(other, replace(sae, family="sd9"))
    with pytest.raises(Unsupported, match="needs the asset 'sae'"):
        method().fit(other, TASK)


def test_contrast_concepts_are_the_neighbours_first_and_never_the_target():
    names = [c.name for c in contrast(TASK, 5)]
    assert names[:4] == ["dog", "tiger", "lion", "leopard"]
    assert len(names) == 7
    assert "cat" not in [c.name for c in contrast(TASK, 500)]
    group = [c.name for c in contrast(Task.of("fruit"), 500)]
    assert "apple" not in group
    assert "cat" in group
    styles = contrast(Task.of("style:modern"), 50)
    assert {c.kind for c in styles} == {"style"}
    assert [c.name for c in contrast(TASK, 2, ["Cat", "bus", "dog", "car", "taxi"])] == ["dog", "tiger", "bus", "car"]


def test_styles_are_asked_for_in_style_prompts():
    made = SAeUron(samples=5)
    assert made.prompts(Task.of("style:modern").targets[0])[0] == "a picture in modern style"
    assert made.prompts(Task.of("cat").targets[0]) == ["cat", "a picture of cat", "an image of cat", "a drawing of cat", "cat"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 1.0}, "a number below 1"),
        ({"percentile": 100.0}, "above 0 and below 100"),
        ({"templates": ("cat",)}, "texts with one {} each"),
        ({"error": "lost"}, "one of kept, repo"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        SAeUron(**fields)


def test_the_authors_presets_and_the_text_form():
    built = catalog.method("saeuron(preset='authors-style')")
    assert (built.percentile, built.strength, built.error, built.latent_steps) == (99.999, -1.0, "repo", 100)
    assert catalog.method(str(built)) == built


def test_statistics_can_be_kept_in_a_checkpoint():
    means = Means([torch.rand(2, 3)])
    again = Means()
    again.load_state_dict(means.state_dict())
    assert torch.equal(again.tensor(), means.tensor())


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="the bundled autoencoder was trained for 1500 steps only, and leaves about a third unexplained")
def test_the_bundled_autoencoder_explains_held_out_features_of_the_bundled_model():
    model = load("emoji")
    found = bundled(model)
    assert found is not None
    z = torch.randn(32, *model.latent_shape, generator=seeded(4242))
    features = traced(
        model, found.place, ["a cat", "a bus on a blue background", "an owl", "a drawing of a pizza"] * 8, z, model.schedule.grid(20), 4.0
    )
    assert found.net.unexplained(features.flatten(0, 2)) <= 0.25

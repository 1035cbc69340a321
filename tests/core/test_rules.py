"""Sampling rules: the arithmetic of safe latent guidance, trajectories, and what the bare denoiser does not show."""

import pytest
import torch

from efface.core.card import Card
from efface.core.edit import Edit, SamplingEdit
from efface.core.errors import InvalidTask, Unsupported
from efface.core.evidence import Attack
from efface.core.method import Paper
from efface.core.rules import NegativePrompt, SafeLatent, away_from, safety_guidance
from efface.core.sampling import noise_for, seeded
from efface.core.task import Task

MODELS = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])
TIMES = (900, 600, 300)


@pytest.fixture
def model(request, fixture):
    return request.getfixturevalue(fixture)


def rule(*texts, **settings):
    given = {"warmup": 0, "warmup_of": 50, "strength": 1000.0, "threshold": 0.01, "momentum": 0.3, "momentum_decay": 0.4, **settings}
    return SafeLatent(texts or ("cat",), **given)


def attached(model, *rules):
    """The rules in place, without the edit's checks; the model is fresh for each test."""
    model.rules[:] = rules
    return model


@torch.no_grad()
def guided(model, prompt="dog", scale=3.0, times=TIMES, rows=2):
    """One guided prediction for each of the times along one trajectory's conditioning, all on the same latents."""
    x, cond, null = noise_for(0, rows, model.latent_shape), model.encode([prompt]), model.encode([""])
    return torch.stack([model.guided(x, t, cond, null, scale) for t in times])


@torch.no_grad()
def halves(model, *prompts, times=TIMES, rows=2):
    """Predictions (prompts, times, b c h w), one call each, in noise."""
    x = noise_for(0, rows, model.latent_shape)
    found = [[model.schedule.to_noise(x, t, model.predict(x, t, model.encode([p]))) for t in times] for p in prompts]
    return torch.stack([torch.stack(row) for row in found])


def in_noise(model, predictions, times=TIMES):
    x = noise_for(0, predictions.shape[1], model.latent_shape)
    return torch.stack([model.schedule.to_noise(x, t, p) for t, p in zip(times, predictions, strict=True)])


# -- formula -------------------------------------------------------------------------------------------------------------


def test_the_threshold_is_signed_and_the_scale_saturates_at_one():
    gap = torch.tensor([-2.0, -0.2, -0.05, 0.0, 0.05, 0.2, 2.0])
    got = safety_guidance(gap, torch.full((7,), 3.0), strength=2.0, threshold=0.1)
    assert torch.allclose(got, 3.0 * torch.tensor([1.0, 0.4, 0.1, 0.0, 0.1, 0.0, 0.0]))
    absolute = torch.where(gap.abs() < 0.1, (2 * gap).abs().clamp(max=1), 0.0) * 3
    assert not torch.allclose(got, absolute)


@MODELS
@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_it_is_the_paper_s_formula_at_every_guidance_scale(model, scale):
    """ε = ε_u + s (ε_p − ε_u − g_s), g_s and ν written out as in the sheet, in noise whatever the network predicts."""
    settings = {"strength": 5.0, "threshold": 0.05, "momentum": 0.5, "momentum_decay": 0.7}
    null, prompt, safety = halves(model, "", "dog", "cat")
    nu, expected, without_momentum = torch.zeros_like(null[0]), [], []
    for u, p, s in zip(null, prompt, safety, strict=True):
        mu = torch.where(p - s < 0.05, (5.0 * (p - s)).abs().clamp(max=1), 0.0)
        g = mu * (s - u) + 0.5 * nu
        nu = 0.7 * nu + 0.3 * g
        expected.append(u + scale * (p - u - g))
        without_momentum.append(u + scale * (p - u - mu * (s - u)))
    got = in_noise(model, guided(attached(model, rule(**settings)), scale=scale))
    assert torch.allclose(got, torch.stack(expected), atol=1e-4)
    assert not torch.allclose(got[1:], torch.stack(without_momentum)[1:], atol=1e-4)


@MODELS
def test_a_strength_below_one_is_plain_guidance_to_the_bit(model):
    plain = guided(model)
    assert torch.equal(guided(attached(model, rule(strength=0.0))), plain)
    assert not torch.allclose(guided(attached(model, rule())), plain, atol=1e-3)


def test_a_safety_text_that_is_the_prompt_changes_nothing(tiny_model):
    plain = guided(tiny_model)
    assert torch.allclose(guided(attached(tiny_model, rule("dog", threshold=1.0))), plain, atol=1e-4)
    assert not torch.allclose(guided(attached(tiny_model, rule("cat", threshold=1.0))), plain, atol=1e-2)


def test_the_strongest_limit_is_guidance_away_from_the_text(tiny_model):
    """λ and s_S large, s_m = 0: g = ε_p − ε_s."""
    null, prompt, safety = halves(tiny_model, "", "dog", "cat")
    got = guided(attached(tiny_model, rule(strength=1e9, threshold=1e9, momentum=0.0)), scale=3.0)
    assert torch.allclose(got, null + 3.0 * (prompt - safety), atol=1e-3)


def test_the_warm_up_is_plain_but_its_momentum_counts(tiny_model):
    plain = guided(tiny_model)
    warm = guided(attached(tiny_model, rule(warmup=25)))
    assert torch.allclose(warm[:2], plain[:2], atol=1e-5)
    whole = guided(attached(tiny_model, rule(warmup=0)))
    assert torch.allclose(warm[2], whole[2], atol=1e-5)
    short = guided(attached(tiny_model, rule(warmup=0)), times=TIMES[2:])
    assert not torch.allclose(warm[2], short[0], atol=1e-4)


@pytest.mark.parametrize("delta", [0, 7, 10, 15, 50])
def test_with_fifty_ddim_steps_the_warm_up_is_the_authors_step_for_step(tiny_model, delta):
    times = tiny_model.schedule.grid(50)
    plain, got = guided(tiny_model, times=times, rows=1), guided(attached(tiny_model, rule(warmup=delta)), times=times, rows=1)
    changed = [not torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, got, strict=True)]
    assert changed == [i >= delta for i in range(50)]


# -- trajectories --------------------------------------------------------------------------------------------------------


def test_the_momentum_is_reset_with_each_trajectory(tiny_model):
    attached(tiny_model, rule())
    first, second = guided(tiny_model), guided(tiny_model)
    assert torch.equal(first, second)
    x, cond, null = noise_for(0, 2, tiny_model.latent_shape), tiny_model.encode(["dog"]), tiny_model.encode([""])
    with torch.no_grad():
        walked, again = ([tiny_model.guided(x, t, cond, null, 3.0) for t in TIMES] for _ in range(2))
        going_on = tiny_model.guided(x, TIMES[-1], cond, null, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(walked, again, strict=True))
    assert not torch.allclose(going_on, walked[-1], atol=1e-4)


def test_pictures_do_not_depend_on_what_was_drawn_before_or_beside(tiny_model):
    attached(tiny_model, rule())
    pair = tiny_model.sample(["dog", "car"], seeds=[3, 4], steps=4, guidance=3.0)
    tiny_model.sample(["cat"], seed=9, steps=3, guidance=3.0)
    one = torch.cat([tiny_model.sample([p], seeds=[s], steps=4, guidance=3.0) for p, s in (("dog", 3), ("car", 4))])
    assert torch.allclose(pair, one, atol=1e-5)


def test_several_texts_add_their_guidances(tiny_model):
    settings = {"momentum": 0.0}
    plain = guided(tiny_model)
    cat, car, both = (guided(attached(tiny_model, rule(*texts, **settings))) - plain for texts in (("cat",), ("car",), ("cat", "car")))
    assert torch.allclose(both, cat + car, atol=1e-4)
    assert not torch.allclose(both, cat, atol=1e-2)


@pytest.mark.parametrize("texts", [("cat",), ("cat", "car")])
def test_a_step_costs_two_forwards_and_one_for_each_text(tiny_model, texts):
    attached(tiny_model, rule(*texts))
    tiny_model.meter.reset()
    guided(tiny_model, rows=2)
    assert (tiny_model.meter.calls, tiny_model.meter.forwards) == (3, 3 * 2 * (2 + len(texts)))


def test_an_attack_s_gradient_passes_but_the_momentum_holds_no_graph(tiny_model):
    safe = rule()
    attached(tiny_model, safe)
    x, null = noise_for(0, 1, tiny_model.latent_shape), tiny_model.encode([""])
    embeds = torch.randn(1, 16, 32, generator=seeded(0), requires_grad=True)
    cond = tiny_model.encode_tokens(embeds=embeds)
    for t in TIMES:
        (gradient,) = torch.autograd.grad(tiny_model.guided(x, t, cond, null, 3.0).square().sum(), embeds, retain_graph=True)
        assert gradient.abs().max() > 0
    assert not any(nu.requires_grad for nu in safe._walk.momentum)


# -- in company ----------------------------------------------------------------------------------------------------------


def test_a_negative_prompt_can_stand_around_it_but_not_inside(tiny_model):
    null, prompt, safety = halves(tiny_model, "car", "dog", "cat")
    free = {"strength": 1e9, "threshold": 1e9, "momentum": 0.0}
    got = guided(attached(tiny_model, rule("cat", **free), NegativePrompt("car")))
    assert torch.allclose(got, null + 3.0 * (prompt - safety), atol=1e-3)
    with pytest.raises(Unsupported, match="from which 'negative_prompt' has already gone on; attach safe"):
        guided(attached(tiny_model, NegativePrompt("car"), rule("cat", **free)))


class OnPredict(Attack):
    """The smallest attack on the bare denoiser."""

    access = "embeddings"
    paper = Paper("none", "none", "none")
    bare = True

    def search(self, before, after, concept, detector, *, budget, seed):
        self.require(after)
        raise AssertionError("the attack ran")


class OnPictures(OnPredict):
    bare = False


@pytest.mark.parametrize("make", [lambda: NegativePrompt("cat"), rule])
def test_an_attack_on_the_bare_denoiser_is_refused_while_a_rule_is_attached(tiny_model, make):
    edit = SamplingEdit(make(), Card.of(tiny_model, method="x", task=Task.of("dog"), seed=0))
    asked = (tiny_model, tiny_model, Task.of("cat").targets[0], None)
    with edit.attach(tiny_model):
        assert tiny_model.unseen == (edit.rule.name,)
        with pytest.raises(Unsupported, match=f"attacks the bare denoiser, which {edit.rule.name} leaves as it was"):
            OnPredict().search(*asked, budget=1, seed=0)
        with pytest.raises(AssertionError, match="the attack ran"):
            OnPictures().search(*asked, budget=1, seed=0)
    assert tiny_model.unseen == ()
    with pytest.raises(AssertionError, match="the attack ran"):
        OnPredict().search(*asked, budget=1, seed=0)


def test_the_bare_denoiser_really_is_the_un_erased_one_under_a_rule(tiny_model):
    before = halves(tiny_model, "cat")
    attached(tiny_model, rule())
    assert torch.equal(halves(tiny_model, "cat"), before)


def test_a_negative_prompt_without_guidance_is_refused(tiny_model):
    attached(tiny_model, NegativePrompt("cat"))
    with pytest.raises(Unsupported, match="give more than 1"):
        guided(tiny_model, scale=1.0)
    with pytest.raises(Unsupported, match="give more than 1"):
        tiny_model.sample(["dog"], steps=1, guidance=1.0)


def test_a_rule_survives_its_file(tiny_model, tmp_path):
    edit = SamplingEdit(rule("cat", "van gogh", warmup=3), Card.of(tiny_model, method="x", task=Task.of("dog"), seed=0))
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert again.rule.settings() == edit.rule.settings()
    with edit.attach(tiny_model):
        expected = guided(tiny_model)
    with again.attach(tiny_model):
        assert torch.equal(guided(tiny_model), expected)


def test_the_texts_of_a_task(tiny_model):
    task = Task.of(["cat", "style:van gogh"])
    assert away_from(tiny_model, task, joined=True) == ["cat, van gogh"]
    assert away_from(tiny_model, task, joined=False) == ["cat", "van gogh"]
    assert away_from(tiny_model, task, joined=True, prefix="a photo of") == ["a photo of cat, van gogh"]
    with pytest.raises(InvalidTask, match="leave out '-> dog'"):
        away_from(tiny_model, Task.of("cat -> dog"), joined=True)


def test_a_list_that_the_encoder_would_cut_is_refused(tiny_model):
    many = Task.of(["cat", "dog", "lion", "tiger", "bear", "horse", "wolf", "fox", "apple"])
    with pytest.raises(InvalidTask, match="cut off unseen; give fewer, or erase them one by one"):
        away_from(tiny_model, many, joined=True)
    assert len(away_from(tiny_model, many, joined=False)) == 9
    with pytest.raises(InvalidTask, match="shorten it"):
        away_from(tiny_model, Task.of("cat " * 20), joined=False)

"""Fine-tuning: it learns what it is shown, costs what it says, and leaves the model to the bit."""

import pytest
import tiny
import torch

from efface.core.card import Card
from efface.core.edit import Chain, Edit, LowRankEdit, WeightEdit
from efface.core.errors import Diverged, Unsupported
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.models.finetune import _deck, finetune, loss
from efface.models.sd import StableDiffusion

CAPTIONS = ["a cat", "a dog", "a cat on the beach"]
HOW = {"lora": {"rank": 4, "lr": 1e-2}, "weights": {"group": "xattn", "lr": 1e-2}}


def images(count=3, seed=0):
    return torch.rand(count, 3, 64, 64, generator=seeded(seed))


def held(model, pictures, count=32):
    """The mean loss over fixed times and noise."""
    g = seeded(99)
    with torch.no_grad():
        latents = model.encode_images(pictures)
        rows = torch.arange(count) % len(pictures)
        t = torch.randint(1000, (count,), generator=g)
        noise = torch.randn(count, *latents.shape[1:], generator=g)
        cond = model.encode([CAPTIONS[i % len(CAPTIONS)] for i in rows.tolist()])
        return float(loss(model, latents[rows], cond, t, noise))


def state(model):
    parameters = [(n, p) for c in model.components.values() for n, p in c.named_parameters()]
    hooks = [(n, len(m._forward_hooks), m.training) for c in model.components.values() for n, m in c.named_modules()]
    return [(n, id(p), p.requires_grad, p.grad is None) for n, p in parameters], hooks, [p.detach().clone() for _, p in parameters]


def tensors(edit: Edit):
    return edit._pack()[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("make", ["tiny_model", "tiny_v_model"])
@pytest.mark.parametrize("how", HOW)
def test_the_loss_falls_on_what_was_shown(request, make, how):
    model = request.getfixturevalue(make)
    before = held(model, images())
    idle = finetune(model, images(), CAPTIONS, steps=12, **{**HOW[how], "lr": 1e-9})
    edit = finetune(model, images(), CAPTIONS, steps=12, **HOW[how])
    assert type(edit) is (LowRankEdit if how == "lora" else WeightEdit)
    with edit.attach(model):
        after = held(model, images())
    with idle.attach(model, check=False):
        unmoved = held(model, images())
    assert after < 0.98 * before
    assert unmoved == pytest.approx(before, rel=1e-4)  # the control: as many steps that lead nowhere


@pytest.mark.parametrize("how", HOW)
def test_the_model_is_left_as_it_was_and_the_same_seed_gives_the_same_edit(tiny_model, how):
    was, generator = state(tiny_model), torch.get_rng_state()
    first, again, other = (finetune(tiny_model, images(), CAPTIONS, steps=3, seed=s, **HOW[how]) for s in (0, 0, 1))
    now = state(tiny_model)
    assert now[:2] == was[:2]
    assert all(torch.equal(a, b) for a, b in zip(now[2], was[2], strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert same(tensors(first), tensors(again))
    assert not same(tensors(first), tensors(other))


def test_only_the_group_is_trained_and_the_cost_is_metered(tiny_model):
    steps = []
    edit = finetune(tiny_model, images(), CAPTIONS, steps=5, batch=2, group="text_kv", report=lambda *told: steps.append(told))
    assert edit.names == frozenset(tiny_model.select("text_kv"))
    cost = edit.card.cost
    assert (cost["forwards"], cost["calls"], cost["backwards"]) == (10, 5, 10)
    assert [(step, total) for step, total, _ in steps] == [(i, 5) for i in range(1, 6)]
    assert edit.extras["trace"].tensors["loss"].tolist() == pytest.approx([figures["loss"] for *_, figures in steps])
    assert (edit.card.task, edit.card.probes) == ("", ("a cat",))
    lora = finetune(tiny_model, images(), CAPTIONS, steps=1, rank=2)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in lora.names} == {"to_q", "to_k", "to_v", "0"}
    assert all((len(down), up.shape[1]) == (2, 2) for down, up in lora.factors.values())


def test_every_picture_is_seen_before_any_is_seen_again():
    deck = _deck(5, seeded(0))
    rounds = [[next(deck) for _ in range(5)] for _ in range(4)]
    assert all(sorted(seen) == [0, 1, 2, 3, 4] for seen in rounds)
    assert len({tuple(seen) for seen in rounds}) > 1


@pytest.mark.parametrize("make", ["tiny_model", "tiny_v_model"])
def test_the_loss_weighs_the_error_of_the_clean_latent(request, make):
    """‖ε̂ − ε‖² = ᾱ/(1−ᾱ) ‖x̂_0 − x_0‖² and ‖v̂ − v‖² = ‖x̂_0 − x_0‖²/(1−ᾱ)."""
    model, t = request.getfixturevalue(make), torch.tensor([400, 400])
    x0, noise = (torch.randn(2, *model.latent_shape, generator=seeded(s)) for s in (1, 2))
    cond = model.encode(["a cat", "a dog"])
    with torch.no_grad():
        x = model.schedule.add_noise(x0, noise, t)
        guess = model.schedule.to_x0(x, t, model.predict(x, t, cond))
        found = float(loss(model, x0, cond, t, noise))
    a = float(model.schedule.alpha_bar[400])
    weights = {"tiny": a / (1 - a), "tiny-v": 1 / (1 - a)}
    square = float((guess - x0).square().mean())
    assert found == pytest.approx(weights[model.id] * square, rel=1e-3)
    assert all(name == model.id or found != pytest.approx(weight * square, rel=0.1) for name, weight in weights.items())


def test_a_lora_is_gone_on_from(tiny_model):
    first = finetune(tiny_model, images(), CAPTIONS, steps=10, **HOW["lora"])
    half = LowRankEdit({n: (2 * down, up) for n, (down, up) in first.factors.items()}, first.card, scale=0.5)
    on = finetune(tiny_model, images(), CAPTIONS, steps=1, lr=1e-9, start=half)
    fresh = finetune(tiny_model, images(), CAPTIONS, steps=1, lr=1e-9, rank=4)
    expected = first.deltas(tiny_model)
    assert on.names == first.names
    assert all(torch.allclose(delta, expected[n], atol=1e-6) for n, delta in on.deltas(tiny_model).items())
    assert not all(torch.allclose(delta, expected[n], atol=1e-6) for n, delta in fresh.deltas(tiny_model).items())  # the control


@pytest.mark.parametrize("how", HOW)
def test_it_trains_on_top_of_an_attached_edit_which_stays_as_it_is(tiny_model, how):
    g = seeded(5)
    slots = tiny_model.select("text_kv")
    deltas = {n: 0.05 * torch.randn(s.tensor.shape, generator=g) for n, s in slots.items()}
    safety = WeightEdit(deltas, Card.of(tiny_model, method="noop", task=Task.of("cat"), seed=0))
    alone = finetune(tiny_model, images(), CAPTIONS, steps=12, **HOW[how])
    with safety.attach(tiny_model):
        erased = held(tiny_model, images())
        weights = {n: s.tensor.detach().clone() for n, s in slots.items()}
        on_top = finetune(tiny_model, images(), CAPTIONS, steps=12, **HOW[how])
        assert all(torch.equal(s.tensor, weights[n]) for n, s in slots.items())
    assert not same(tensors(alone), tensors(on_top))
    both = Chain((safety, on_top), safety.card)
    with both.attach(tiny_model):
        assert held(tiny_model, images()) < 0.98 * erased


@pytest.mark.parametrize("how", HOW)
def test_half_precision_models_are_trained_in_float32_factors(how):
    model = StableDiffusion(tiny.pipeline().to(dtype=torch.bfloat16), id="half")
    edit = finetune(model, images(), CAPTIONS, steps=3, **HOW[how])
    assert {t.dtype for t in tensors(edit).values()} == {torch.float32}
    assert all(p.dtype == torch.bfloat16 for p in model.pipeline.unet.parameters())
    with edit.attach(model):
        assert model.sample(["a cat"], steps=2).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": ["a cat"]}, "3 images and 1 captions"),
        ({"captions": "a cat"}, "3 images and 5 captions"),
        ({"images": 2 * images()}, r"values in \[0, 1\]"),
        ({"images": images()[:, :1]}, r"\(3, 1, 64, 64\); expected"),
        ({"steps": 0}, "steps was 0"),
        ({"batch": 0}, "batch was 0"),
        ({"rank": 0}, "rank was 0"),
        ({"lr": 0.0}, "lr above 0"),
    ],
)
def test_wrong_input_is_named(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(tiny_model, **{"images": images(), "captions": CAPTIONS, "steps": 1, **options})


def test_groups_that_are_not_the_denoisers(tiny_model):
    with pytest.raises(Unsupported, match="not of the denoiser"):
        finetune(tiny_model, images(), CAPTIONS, steps=1, group="text_encoder")
    with pytest.raises(Unsupported, match="no parameter group 'xatn'"):
        finetune(tiny_model, images(), CAPTIONS, steps=1, group="xatn")


def test_a_loss_that_is_not_finite_stops_and_leaves_the_model(tiny_model):
    was = state(tiny_model)
    with pytest.raises(Diverged, match=r"at step \d+ of 50, with lr 1e\+20; the model is as it was"):
        finetune(tiny_model, images(), CAPTIONS, steps=50, rank=2, lr=1e20)
    now = state(tiny_model)
    assert now[:2] == was[:2]
    assert all(torch.equal(a, b) for a, b in zip(now[2], was[2], strict=True))


def test_a_live_pipeline_will_do(tiny_model):
    of_model, of_pipeline = (finetune(m, images(), CAPTIONS, steps=1, group="xattn") for m in (tiny_model, tiny.pipeline()))
    assert same(tensors(of_model), tensors(of_pipeline))

"""UnlearnDiffAtk, P4D and concept inversion: their losses."""

from __future__ import annotations

from typing import Literal

import attackparts as parts
import pytest
import tiny
import torch
from attackparts import CAT
from torch.optim.optimizer import register_optimizer_step_pre_hook

from efface.core import search, tokens
from efface.core.errors import InvalidAttack
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.evals.attacks import concept_inversion, p4d, unlearndiffatk
from efface.models.sd import StableDiffusion
from efface.ops.hardprompt import Layout, interleaved, prefixed


def latents(model: Model, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *model.latent_shape, generator=seeded(seed), dtype=model.dtype)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_gradient_of_the_soft_tokens_is_that_of_finite_differences(kind: Literal["epsilon", "v_prediction"]) -> None:
    model = StableDiffusion(tiny.pipeline(kind).to(torch.float64), id="tiny")
    table = tokens.table(model).double()
    layout = Layout.of([prefixed(body, 1) for body in tokens.bodies(model, ["a cat", "a dog"])], tokens.frame(model))
    clean, noise = latents(model, 2), latents(model, 2, 1)

    def loss(words: torch.Tensor) -> torch.Tensor:
        return unlearndiffatk.denoising(model, clean, 500, noise, model.encode_tokens(embeds=layout.with_embeds(table, words)))

    words = table[[300, 310]].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(words), words)
    way = torch.randn(words.shape, generator=seeded(2)).double()
    step = 1e-4
    with torch.no_grad():
        slope = (loss(words + step * way) - loss(words - step * way)) / (2 * step)
    assert float(slope) == pytest.approx(float((gradient * way).sum()), rel=2e-3)
    assert abs(float(slope)) > 1e-6


def test_prompts_in_one_batch_do_not_touch_each_other(before: Model) -> None:
    table = tokens.table(before)
    layout = Layout.of([prefixed(body, 1) for body in tokens.bodies(before, ["a cat", "a dog"])], tokens.frame(before))
    clean, noise = latents(before, 2), latents(before, 2, 1)
    words = table[[300, 310]].clone().requires_grad_()

    def slope(rows: list[int]) -> torch.Tensor:
        chosen, free = layout.take(rows)
        cond = before.encode_tokens(embeds=chosen.with_embeds(table, words[free]))
        return torch.autograd.grad(unlearndiffatk.denoising(before, clean[rows], 500, noise[rows], cond), words)[0]

    both, first = slope([0, 1]), slope([0])
    assert (both[0] - first[0]).abs().max() < 1e-4 * float(both[0].abs().max())
    assert first[1].abs().max() == 0
    assert both[1].abs().max() > 0


def test_the_loss_of_a_velocity_is_that_of_its_noise(tiny_v_model: Model) -> None:
    clean, noise = latents(tiny_v_model, 2), latents(tiny_v_model, 2, 1)
    cond = tiny_v_model.encode(["a cat", "a dog"])
    schedule, t = tiny_v_model.schedule, 700
    with torch.no_grad():
        x = schedule.add_noise(clean, noise, t)
        predicted = schedule.to_noise(x, t, tiny_v_model.predict(x, t, cond))
        loss = unlearndiffatk.denoising(tiny_v_model, clean, t, noise, cond)
    assert float(loss) == pytest.approx(float((predicted - noise).square().flatten(1).mean(1).sum()), rel=1e-4)


def test_what_reaches_the_optimiser_is_cut_at_one(before: Model, after: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    largest, own = [], unlearndiffatk.denoising
    handle = register_optimizer_step_pre_hook(
        lambda optimiser, *rest: largest.append(optimiser.param_groups[0]["params"][0].grad.abs().max())
    )
    for scale in (1.0, 1e6):
        monkeypatch.setattr(unlearndiffatk, "denoising", lambda *given, scale=scale: scale * own(*given))
        search.attack("unlearndiffatk(times=1, iterations=2)").search(before, after, CAT, parts.Bright(2), budget=10**6)
    handle.remove()
    small, large = largest[:2], largest[2:]
    assert max(small) < 1
    assert [float(value) for value in large] == [1.0, 1.0]


def test_more_times_than_the_schedule_has_are_refused(before: Model, after: Model) -> None:
    with pytest.raises(InvalidAttack, match="times was 2000; expected at most 1000"):
        search.attack("unlearndiffatk(times=2000)").search(before, after, CAT, parts.Bright(2), budget=10**6)


# -- P4D ---------------------------------------------------------------------------------------------------------------------
def test_the_same_model_and_prompt_do_not_differ_at_all(before: Model, after: Model) -> None:
    x, t = latents(before, 2), torch.tensor([100, 800])
    texts = ["a cat", "a picture of a cat"]
    prompts = before.encode(texts)
    with torch.no_grad():
        assert float(p4d.mismatch(before, before, x, t, prompts, prompts)) == 0
        assert float(p4d.mismatch(before, before, x, t, prompts, before.encode(["a dog", "a bus"]))) > 0
        assert float(p4d.mismatch(before, after, x, t, prompts, after.encode(texts))) > 0


def test_in_mode_k_the_prompts_own_tokens_stay(before: Model) -> None:
    (body,) = tokens.bodies(before, ["a picture of a cat"])
    layout, table = Layout.of([interleaved(body, 3)], tokens.frame(before)), tokens.table(before).clone().requires_grad_()
    points = torch.randn(len(layout.rows), table.shape[1], generator=seeded(0), requires_grad=True)
    embeds = layout.with_embeds(table, points)
    fixed = [i for i in range(layout.ids.shape[1]) if i not in layout.places.tolist()]
    assert torch.equal(embeds[0, fixed], table[layout.ids[0, fixed]])
    (gradient,) = torch.autograd.grad(embeds[0, fixed].square().sum(), points, retain_graph=True)
    assert gradient.abs().max() == 0, "what stands at the prompt's own positions gives the free ones no gradient"
    (gradient,) = torch.autograd.grad(embeds.square().sum(), points)
    assert gradient.abs().min() > 0
    others = [token for place, token in enumerate(layout.with_ids(torch.full((len(points),), 7))[0].tolist()) if place in fixed]
    assert others[1 : 1 + len(body)] == body


def test_mode_n_replaces_the_prompt() -> None:
    assert p4d.P4D(tokens=5).pieces([1, 2, 3]) == [None] * 5
    assert p4d.P4D(mode="K").pieces([1, 2, 3]) == [1, 2, 3, None]


# -- concept inversion -------------------------------------------------------------------------------------------------------
def test_at_the_concepts_own_token_the_loss_is_the_plain_one(before: Model) -> None:
    prompts = ["a cat", "a picture of a cat on a red car"]
    layout, table = concept_inversion.placed(before, "cat", prompts), tokens.table(before)
    clean, noise, t = latents(before, 2), latents(before, 2, 1), torch.tensor([300, 600])
    with torch.no_grad():
        plain = (before.predict(before.schedule.add_noise(clean, noise, t), t, before.encode(prompts)) - noise).square().mean()
        own, other = (
            concept_inversion.denoising(before, clean, t, noise, layout, table, concept_inversion.started(before, word))
            for word in ("cat", "bus")
        )
    assert float(own) == pytest.approx(float(plain), rel=1e-5)
    assert abs(float(other) - float(plain)) > 1e-5


def test_the_free_position_replaces_the_name_or_stands_before_the_prompt(before: Model) -> None:
    layout = concept_inversion.placed(before, "cat", CAT.texts)
    assert layout.places.tolist() == [2, 5, 1]
    assert layout.rows.tolist() == [0, 1, 2]


def test_the_authors_run_sees_as_many_pictures_as_theirs() -> None:
    """Each of 5000 steps is of four batches of 4."""
    attack = search.attack("concept_inversion(preset='authors')")
    assert isinstance(attack, concept_inversion.ConceptInversion)
    assert attack.steps * attack.batch == 5000 * 4 * 4


def test_only_the_new_embedding_is_learned_and_it_lowers_the_loss(before: Model, after: Model) -> None:
    attack = concept_inversion.ConceptInversion(steps=40, batch=4, images=4, lr=0.3, never=False)
    table = tokens.table(after).clone()
    found = attack.search(before, after, CAT, parts.Bright(-1), budget=10**6)
    vector = found.parts["embedding"].tensors["v"]
    assert vector.shape == (1, table.shape[1])
    assert torch.equal(tokens.table(after), table)
    start = concept_inversion.started(after, "")
    assert (vector - start).abs().max() > 0.1
    layout = concept_inversion.placed(after, "cat", CAT.texts)
    with torch.no_grad():
        images = before.sample(CAT.texts, seeds=[search.FIRST_SEED + search.TRAINING + i for i in range(3)])
        clean = before.encode_images(images).repeat(40, 1, 1, 1)
        t, noise = torch.randint(1000, (len(clean),), generator=seeded(5)), latents(after, len(clean), 6)
        told = layout.take([i % 3 for i in range(len(clean))])[0]
        first, last = (float(concept_inversion.denoising(after, clean, t, noise, told, table, v)) for v in (start, vector))
    assert last < first

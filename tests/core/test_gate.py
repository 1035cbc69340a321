"""The prompt gate: how strong a membrane is for each prompt, how that reaches the denoiser, and what is refused."""

import dataclasses

import pytest
import torch

from efface.core.card import Card
from efface.core.edit import Chain, Edit, LowRankEdit
from efface.core.errors import InvalidEdit, Overlap, Unsupported
from efface.core.gate import PromptGate
from efface.core.model import Cond
from efface.core.sampling import noise_for, seeded
from efface.core.task import Task
from efface.ops.gate import Memory, UnknownRow, cosines, overlaps
from efface.ops.lowrank import can_adapt

TEXTS = (("cat",), ("van gogh", "picasso"))


def edit(model, texts=TEXTS, *, size=0.3, seed=0, **gate):
    """Random membranes beside every map of the transformer blocks."""
    g, factors = seeded(seed), {}
    for block, network in model.hook_points("transformer").items():
        for path, module in network.named_modules():
            if can_adapt(module):
                down = torch.randn(len(texts), *module.weight.shape[1:], generator=g)
                up = torch.randn(len(module.weight), len(texts), *(1,) * (module.weight.ndim - 2), generator=g)
                factors[f"{block}.{path}.weight"] = (size * down / down[0].numel() ** 0.5, size * up)
    card = Card.of(model, method="x", task=Task.of("cat"), seed=0)
    return LowRankEdit(factors, card, gate=PromptGate(texts, **gate))


def only(gated, membrane):
    """The plain adapter of one membrane."""
    parts = {n: (d[membrane : membrane + 1], u[:, membrane : membrane + 1]) for n, (d, u) in gated.factors.items()}
    return LowRankEdit(parts, gated.card)


def times(gated, *factors):
    """Plain factors with each membrane's up multiplied."""
    weight = torch.tensor(factors)
    return LowRankEdit({n: (d, u * weight.reshape(1, -1, *[1] * (u.ndim - 2))) for n, (d, u) in gated.factors.items()}, gated.card)


@torch.no_grad()
def predicted(model, *prompts):
    x = noise_for(0, len(prompts), model.latent_shape)
    return model.predict(x, 400, model.encode(list(prompts)))


def strengths(model, *prompts, **gate):
    with torch.no_grad():
        return PromptGate(TEXTS, **gate).strengths(model, model.encode(list(prompts)))


# -- how strong ----------------------------------------------------------------------------------------------------------


def test_a_prompt_with_all_of_a_concept_s_tokens_opens_the_gate(tiny_model):
    whole = strengths(tiny_model, "a photo of the cat", "a painting in the style of van gogh", "picasso", "a dog")
    assert [float(whole[i, j]) for i, j in ((0, 0), (1, 1), (2, 1))] == pytest.approx([1, 1, 1], abs=1e-6)
    assert torch.all(whole[[0, 1, 2, 3], [1, 0, 0, 0]] < 0.99)
    shared = strengths(tiny_model, "a van", "gogh van", "a dog", transport="tokenuni")
    assert shared[:, 1].tolist() == [0.5, 1.0, 0.0]


def test_the_default_is_the_larger_of_cosine_and_shared_tokens(tiny_model):
    prompts = ("a van", "a photo of the cat", "a dog", "picasso")
    each = [strengths(tiny_model, *prompts, transport=t) for t in ("clipcos", "tokenuni", "clipcos_tokenuni")]
    assert torch.equal(each[2], torch.maximum(each[0], each[1]))
    assert not torch.allclose(each[2], each[1])
    assert torch.equal(strengths(tiny_model, *prompts, transport="allone"), torch.ones(4, 2))


def test_the_cosine_is_of_whole_encodings(tiny_model):
    a, b = (tiny_model.encode([t]).tokens.detach() for t in ("a dog", "cat"))
    assert cosines(a, b).item() == pytest.approx(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)), abs=1e-6)
    assert cosines(3 * a, a).item() == pytest.approx(1, abs=1e-6)


def test_rows_that_are_no_prompt_share_no_tokens():
    special, concept = frozenset({7, 8}), [frozenset({1, 2})]
    assert overlaps(torch.tensor([[7, 1, 2, 8], [7, 1, 5, 8], [1, 2, 1, 2]]), concept, special).tolist() == [[1.0], [0.5], [0.0]]


# -- how it reaches the denoiser -----------------------------------------------------------------------------------------


def test_a_gate_of_ones_is_the_plain_adapter_and_a_gate_of_zero_the_plain_network(tiny_model):
    gated, before = edit(tiny_model, transport="allone"), predicted(tiny_model, "a cat", "dog")
    with gated.ungated().attach(tiny_model):
        plain = predicted(tiny_model, "a cat", "dog")
    with gated.attach(tiny_model):
        assert torch.allclose(predicted(tiny_model, "a cat", "dog"), plain, atol=1e-4)
    closed = dataclasses.replace(gated, gate=PromptGate(TEXTS, transport="tokenuni"))
    with closed.attach(tiny_model, check=False):
        assert torch.equal(predicted(tiny_model, "dog", "bus"), predicted(tiny_model, "dog", "bus"))
        got = predicted(tiny_model, "a cat", "dog")
    assert torch.equal(got[1], before[1])
    assert not torch.allclose(got[0], before[0], atol=1e-3)
    assert torch.equal(predicted(tiny_model, "a cat", "dog"), before)


def test_each_row_has_the_strength_of_its_own_prompt(tiny_model):
    """Several membranes add up, each with its γ: Σ_c γ_c U_c D_c, row by row."""
    gated, prompts = edit(tiny_model), ("a cat", "van dog", "", "picasso")
    gammas = strengths(tiny_model, *prompts)
    with gated.attach(tiny_model):
        together = predicted(tiny_model, *prompts)
    for i, prompt in enumerate(prompts):
        x = noise_for(0, len(prompts), tiny_model.latent_shape)[i : i + 1]
        with times(gated, *gammas[i].tolist()).attach(tiny_model, check=False), torch.no_grad():
            alone = tiny_model.predict(x, 400, tiny_model.encode([prompt]))
        assert torch.allclose(together[i], alone[0], atol=1e-4)
    with gated.ungated().attach(tiny_model):
        assert not torch.allclose(together, predicted(tiny_model, *prompts), atol=1e-2)


def test_membranes_fitted_apart_add_up_in_any_order(tiny_model):
    one, two = edit(tiny_model, (("cat",),), seed=1), edit(tiny_model, (("van gogh",),), seed=2)
    with one.attach(tiny_model), two.attach(tiny_model):
        stacked = predicted(tiny_model, "a cat", "van dog")
    with two.attach(tiny_model), one.attach(tiny_model):
        assert torch.allclose(predicted(tiny_model, "a cat", "van dog"), stacked, atol=1e-5)
    parts = {
        n: tuple(torch.cat(pair, axis) for axis, pair in enumerate(zip(one.factors[n], two.factors[n], strict=True))) for n in one.factors
    }
    merged = LowRankEdit(parts, one.card, gate=PromptGate((("cat",), ("van gogh",))))
    with merged.attach(tiny_model):
        assert torch.allclose(predicted(tiny_model, "a cat", "van dog"), stacked, atol=1e-5)
    with one.attach(tiny_model), pytest.raises(Overlap), one.attach(tiny_model):
        pass


def test_the_released_merge_squares_the_strength_and_has_cross_terms(tiny_model):
    single = edit(tiny_model, (("van gogh",),), merge="repo", transport="tokenuni")
    with single.attach(tiny_model, check=False):
        got = predicted(tiny_model, "a van")
    for factor, equal in ((0.25, True), (0.5, False)):
        with times(single, factor).attach(tiny_model, check=False):
            assert torch.allclose(predicted(tiny_model, "a van"), got, atol=1e-4) is equal
    both = edit(tiny_model, merge="repo", transport="allone")
    crossed = {n: (d.sum(0, keepdim=True), u.sum(1, keepdim=True)) for n, (d, u) in both.factors.items()}
    with LowRankEdit(crossed, both.card).attach(tiny_model):
        expected = predicted(tiny_model, "a dog")
    with both.attach(tiny_model):
        assert torch.allclose(predicted(tiny_model, "a dog"), expected, atol=1e-3)
    with both.ungated().attach(tiny_model):
        assert not torch.allclose(predicted(tiny_model, "a dog"), expected, atol=1e-2)


def test_guidance_and_the_pipeline_itself_gate_each_half(tiny_model):
    gated = edit(tiny_model)
    pipeline = tiny_model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    with gated.attach(tiny_model):
        ours = tiny_model.sample(["a cat", "a dog"], seeds=[3, 4], steps=2, guidance=3.0)
        noise = [torch.Generator().manual_seed(s) for s in (3, 4)]
        theirs = pipeline(["a cat", "a dog"], num_inference_steps=2, guidance_scale=3.0, generator=noise, output_type="pt").images
        assert torch.allclose(ours, theirs, atol=1e-5)
        alone = tiny_model.sample(["a dog"], seed=4, steps=2, guidance=3.0)
        assert torch.allclose(ours[1], alone[0], atol=1e-4)
    with gated.ungated().attach(tiny_model):
        assert not torch.allclose(tiny_model.sample(["a dog"], seed=4, steps=2, guidance=3.0), alone, atol=1e-3)


# -- what is refused, and the file ---------------------------------------------------------------------------------------


def test_an_embedding_whose_prompt_is_unknown_is_refused(tiny_model):
    early, gated = tiny_model.encode(["a cat"]), edit(tiny_model)
    x = noise_for(0, 1, tiny_model.latent_shape)
    pipeline = tiny_model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    with gated.attach(tiny_model), torch.no_grad():
        for cond in (Cond(early.tokens + 1), Cond(torch.zeros_like(early.tokens))):
            with pytest.raises(Unsupported, match="did not make while the gated edit was attached"):
                tiny_model.predict(x, 400, cond)
        with pytest.raises(Unsupported, match="give prompts and no `prompt_embeds`"):
            pipeline(prompt_embeds=early.tokens + 1, num_inference_steps=1, guidance_scale=1.0)
        tiny_model.predict(x, 400, tiny_model.encode(["a cat"]))


def test_embeddings_through_the_encoder_are_gated_by_their_cosine_and_differentiable(tiny_model):
    words = tiny_model.components["text_encoder"].get_input_embeddings()
    embeds = words(tiny_model.encode(["a cat"]).ids).detach().requires_grad_()
    x = noise_for(0, 1, tiny_model.latent_shape)
    gated = edit(tiny_model)
    with gated.attach(tiny_model):
        by_cosine = tiny_model.predict(x, 400, tiny_model.encode_tokens(embeds=embeds))
        (gradient,) = torch.autograd.grad(by_cosine.square().sum(), embeds)
        by_prompt = predicted(tiny_model, "a cat")
    assert gradient.abs().max() > 0
    assert not torch.allclose(by_cosine, by_prompt, atol=1e-4)
    cosine = dataclasses.replace(gated, gate=PromptGate(TEXTS, transport="clipcos"))
    with cosine.attach(tiny_model):
        assert torch.allclose(predicted(tiny_model, "a cat"), by_cosine, atol=1e-4)


def test_the_memory_is_exact_bounded_and_holds_no_old_graph(monkeypatch):
    monkeypatch.setattr("efface.ops.gate._KEPT", 3)
    memory, g = Memory(torch.float32), seeded(0)
    rows = [torch.randn(2, 4, 5, generator=g) for _ in range(2)]
    weight = torch.ones(2, 1, requires_grad=True)
    memory.learn(rows[0], 2 * weight)
    assert memory.recall(rows[0]).requires_grad
    memory.learn(rows[1], torch.tensor([[5.0], [6.0]]))
    assert not any(v.requires_grad for v in memory.values.values())
    assert torch.equal(memory.recall(torch.stack([rows[1][1], rows[0][1], rows[1][0]])), torch.tensor([[6.0], [2.0], [5.0]]))
    for unknown in (rows[0][:1], rows[1] + 1e-6):
        with pytest.raises(UnknownRow):
            memory.recall(unknown)


def test_weights_cannot_hold_a_gate_and_say_what_is_lost(tiny_model):
    gated = edit(tiny_model)
    assert "the prompt gate (clipcos_tokenuni) of the membranes for 'cat', 'van gogh', 'picasso'" in gated.lost_in_weights
    assert gated.ungated().lost_in_weights == ""
    with pytest.raises(Unsupported, match=r"weights cannot hold the prompt gate .* or bake `edit.ungated\(\)` if that is meant"):
        gated.bake(tiny_model)
    before = predicted(tiny_model, "dog")
    with pytest.raises(Unsupported, match="a chain cannot be baked in where weights cannot hold the prompt gate"):
        Chain((times(gated, 1.0, 1.0), gated), gated.card).bake(tiny_model)
    assert torch.equal(predicted(tiny_model, "dog"), before)
    gated.ungated().bake(tiny_model)
    assert not torch.allclose(predicted(tiny_model, "dog"), before, atol=1e-3)


@pytest.mark.parametrize("merge", ["sum", "repo"])
def test_a_gated_edit_survives_its_file_and_leaves_no_hook(tiny_model, tmp_path, merge):
    gated = edit(tiny_model, merge=merge)
    again = Edit.load(gated.save(tmp_path / "edit.safetensors"))
    assert again.gate == gated.gate
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for n in tiny_model.components.values() for m in n.modules()]
    with gated.attach(tiny_model):
        expected = predicted(tiny_model, "a cat")
    with again.attach(tiny_model):
        assert torch.equal(predicted(tiny_model, "a cat"), expected)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for n in tiny_model.components.values() for m in n.modules()] == hooks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transport": "clip"}, "did you mean 'clipcos'"),
        ({"merge": "mean"}, "a prompt gate's merge was 'mean'"),
        ({"texts": ((),)}, "a text for each of its membranes"),
    ],
)
def test_a_gate_that_means_nothing_is_refused(fields, message):
    with pytest.raises(InvalidEdit, match=message):
        PromptGate(**{"texts": TEXTS, **fields})


def test_a_concept_without_a_token_is_refused(tiny_model):
    with pytest.raises(Unsupported, match="cannot recognise ' ', which has no token of its own"):
        PromptGate(((" ",),)).concepts(tiny_model)

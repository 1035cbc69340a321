"""Keys: where extra tokens enter the attention, that they leave nothing behind, and what is refused."""

import pytest
import torch

from efface.core.edit import Part
from efface.core.errors import InvalidEdit, NoEffect, Unsupported
from efface.core.key import make_key, places, random_key, unlock
from efface.core.sampling import noise_for, seeded
from efface.ops.keyed import keyed


def key(m=3, width=32, texts=("cat",), mode="mid", seed=0):
    g = seeded(seed)
    return make_key({t: (torch.randn(m, width, generator=g), torch.randn(m, width, generator=g)) for t in texts}, mode)


def layer(model):
    """The middle block's cross-attention."""
    return next(m for n, m in model.hook_points("cross_attn").items() if ".mid_block." in n)


@torch.no_grad()
def predicted(model, prompt="a cat"):
    return model.predict(noise_for(0, 2, model.latent_shape), 400, model.encode([prompt]))


def run(attn, x, c, p_key=None, p_value=None):
    """The layer with extra tokens."""
    with torch.no_grad():
        if p_key is None:
            return attn(x, encoder_hidden_states=c)
        with keyed([attn.to_k], [attn.to_v], p_key, p_value):
            return attn(x, encoder_hidden_states=c)


def by_hand(attn, x, c, p_key, p_value):
    """(softmax(Q Kᵀ/√d) V before W_O (b h n d), the scores' sums Σ e^s over the text (b h n 1)), K = [c; p_K] W_K and V = [c; p_V] W_V."""
    k, v = (torch.cat([c, p.expand(len(c), -1, -1)], 1) for p in (p_key, p_value))
    q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (attn.to_q(x), attn.to_k(k), attn.to_v(v)))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v, scores[..., : c.shape[1]].exp().sum(-1, keepdim=True)


def out(attn, mixed):
    return attn.to_out[0](mixed.transpose(1, 2).flatten(2)).detach()


@pytest.fixture
def parts(tiny_model):
    attn, g = layer(tiny_model), seeded(1)
    x, c = torch.randn(2, 16, 32, generator=g), torch.randn(2, 16, 32, generator=g)
    return attn, x, c, torch.randn(1, 4, 32, generator=g), torch.randn(1, 4, 32, generator=g)


# -- attention -----------------------------------------------------------------------------------------------------------


def test_a_keyed_layer_is_attention_over_text_and_tokens(parts):
    attn, x, c, p_key, p_value = parts
    got = run(attn, x, c, p_key, p_value)
    assert torch.allclose(got, out(attn, by_hand(attn, x, c, p_key, p_value)[0]), atol=1e-5)
    for wrong in ((p_value, p_key), (p_key, p_key)):
        assert not torch.allclose(got, out(attn, by_hand(attn, x, c, *wrong)[0]), atol=1e-3)


def test_zero_tokens_damp_the_output_by_their_share_of_the_attention(parts):
    """Σ e^s / (Σ e^s + m) for each query and head: no neutral key."""
    attn, x, c, p_key, _ = parts
    zero = torch.zeros_like(p_key)
    plain, total = by_hand(attn, x, c, zero[:, :0], zero[:, :0])
    assert torch.allclose(run(attn, x, c, zero, zero), out(attn, plain * total / (total + 4)), atol=1e-5)
    assert not torch.allclose(run(attn, x, c, zero, zero), run(attn, x, c), atol=1e-3)


def test_the_order_of_tokens_does_not_matter_but_their_pairing_does(parts):
    attn, x, c, p_key, p_value = parts
    order = torch.tensor([2, 0, 3, 1])
    got = run(attn, x, c, p_key, p_value)
    assert torch.allclose(run(attn, x, c, p_key[:, order], p_value[:, order]), got, atol=1e-5)
    assert not torch.allclose(run(attn, x, c, p_key[:, order], p_value), got, atol=1e-3)


def test_values_alone_leave_the_attention_weights(tiny_model):
    keys, values = places(tiny_model, "mid")
    one, two = torch.randn(2, 1, 3, 32, generator=seeded(0))
    x, cond = noise_for(0, 1, tiny_model.latent_shape), tiny_model.encode(["a cat"])
    maps = []
    for p_key, p_value in ((one, one), (one, two), (two, one)):
        with keyed(keys, values, p_key, p_value), tiny_model.attention(resolution=4) as seen, torch.no_grad():
            tiny_model.predict(x, 400, cond)
        maps.append(seen.mean())
    assert maps[0].shape[-1] == 16 + 3
    assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2], atol=1e-4)


@pytest.mark.parametrize(("mode", "tiny_layers", "sd_layers"), [("mid", 1, 1), ("midout", 3, 10), ("inmidout", 4, 16)])
def test_each_mode_touches_its_layers(tiny_model, mode, tiny_layers, sd_layers):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    from skeleton import skeleton

    for model, count in ((tiny_model, tiny_layers), (skeleton("sd1"), sd_layers)):
        keys, values = places(model, mode)
        assert len(keys) == len(values) == count
        cross = list(model.hook_points("cross_attn").values())
        assert all(any(k is c.to_k for c in cross) for k in keys)


# -- a key in place ------------------------------------------------------------------------------------------------------


def test_taken_away_a_key_leaves_nothing(tiny_model):
    before, names = predicted(tiny_model), list(tiny_model.denoiser.state_dict())
    hooks = [len(m._forward_pre_hooks) for m in tiny_model.denoiser.modules()]
    processors = dict(tiny_model.denoiser.attn_processors)
    with unlock(tiny_model, key()):
        assert not torch.allclose(predicted(tiny_model), before, atol=1e-4)
        assert list(tiny_model.denoiser.state_dict()) == names
        assert tiny_model.denoiser.attn_processors == processors
        assert [len(m._forward_pre_hooks) for m in tiny_model.denoiser.modules()] != hooks
    assert torch.equal(predicted(tiny_model), before)
    assert [len(m._forward_pre_hooks) for m in tiny_model.denoiser.modules()] == hooks


def test_both_halves_of_guidance_get_the_key(tiny_model):
    x, cond, null = noise_for(0, 1, tiny_model.latent_shape), tiny_model.encode(["a cat"]), tiny_model.encode([""])
    with torch.no_grad():
        plain = tiny_model.predict(x, 400, null)
        with unlock(tiny_model, key()):
            u, c = (tiny_model.predict(x, 400, part) for part in (null, cond))
            guided = tiny_model.guided(x, 400, cond, null, 3.0)
    assert torch.allclose(guided, u + 3.0 * (c - u), atol=1e-4)
    assert not torch.allclose(u, plain, atol=1e-4)


def test_a_key_for_several_concepts_opens_the_one_that_is_named(tiny_model):
    both = key(texts=("cat", "car"))
    alone = Part({n: t for n, t in both.tensors.items() if n.startswith("car/")}, {**both.info, "concepts": ["car"]})
    with unlock(tiny_model, both, "car"):
        got = predicted(tiny_model)
    with unlock(tiny_model, alone):
        assert torch.equal(predicted(tiny_model), got)
    with unlock(tiny_model, both, "cat"):
        assert not torch.allclose(predicted(tiny_model), got, atol=1e-4)
    with pytest.raises(InvalidEdit, match="one at a time; name one of cat, car"), unlock(tiny_model, both):
        pass
    with pytest.raises(InvalidEdit, match="does not open 'cta'; did you mean 'cat'"), unlock(tiny_model, both, "cta"):
        pass


def test_a_random_key_has_the_shape_and_lengths_of_the_right_one():
    right = key(m=5, seed=3)
    wrong = random_key(right, 0)
    assert wrong.info == right.info
    for name, tokens in right.tensors.items():
        assert torch.allclose(wrong.tensors[name].norm(dim=1), tokens.norm(dim=1), rtol=1e-4)
        assert torch.cosine_similarity(wrong.tensors[name], tokens).abs().max() < 0.8
    assert not torch.equal(random_key(right, 1).tensors["cat/key"], wrong.tensors["cat/key"])


def test_what_is_no_key_or_does_not_fit_is_refused(tiny_model):
    from efface.models import tiny

    with pytest.raises(InvalidEdit, match="this part is no key"), unlock(tiny_model, Part(info={"words": []})):
        pass
    with pytest.raises(Unsupported, match="tokens of width 8, and tiny reads text of width 32"), unlock(tiny_model, key(width=8)):
        pass
    with pytest.raises(Unsupported, match="in the mode 'mid' needs cross-attention there"), unlock(tiny.model(tiny.BARE), key()):
        pass


def test_a_key_that_the_attention_would_not_see_is_refused(tiny_model):
    tiny_model.denoiser.fuse_qkv_projections()
    before = predicted(tiny_model)
    with pytest.raises(NoEffect, match="unfuse their projections"), unlock(tiny_model, key()):
        pass
    assert torch.equal(predicted(tiny_model), before)

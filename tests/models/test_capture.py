"""What is seen inside the UNet while it runs, and that nothing of the looking remains."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from torch import Tensor

from efface.core.errors import Unsupported
from efface.core.model import Cond
from efface.models.sd import StableDiffusion


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cond(tiny_model: StableDiffusion) -> Cond:
    return tiny_model.encode(["a cat", "a photo of a dog"])


def test_the_written_out_softmax_agrees_with_the_fused_one(tiny_model: StableDiffusion, x: Tensor, cond: Cond) -> None:
    with torch.no_grad():
        plain = tiny_model.predict(x, 300, cond)
        with tiny_model.attention():
            captured = tiny_model.predict(x, 300, cond)
    assert torch.allclose(plain, captured, atol=1e-5)


def test_maps_are_probabilities_over_the_tokens(tiny_model: StableDiffusion, x: Tensor, cond: Cond) -> None:
    with torch.no_grad(), tiny_model.attention() as maps:
        tiny_model.predict(x, 300, cond)
        tiny_model.predict(x, 100, cond)
    mean = maps.mean()
    assert mean.shape == (2, 8, 8, tiny_model.length)
    assert torch.allclose(mean.sum(-1), torch.ones(2, 8, 8), atol=1e-5)
    assert mean.min() >= 0
    assert maps.counts == {(8, 8): 6, (4, 4): 2}  # two calls of three layers at 8×8 and one in the middle


def test_the_maps_are_those_of_queries_and_keys(tiny_model: StableDiffusion, x: Tensor, cond: Cond) -> None:
    with torch.no_grad(), tiny_model.attention(resolution=4) as maps:
        tiny_model.predict(x, 300, cond)
    ((name, layer),) = ((n, m) for n, m in tiny_model.hook_points("cross_attn").items() if "mid_block" in n)
    entering = tiny_model.inputs("xattn", cond, x=x, t=300)
    with torch.no_grad():
        q, k = layer.to_q(entering[f"{name}.to_q.weight"]), layer.to_k(cond.tokens)
        q, k = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, k))
        expected = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    assert torch.allclose(maps.mean().flatten(1, 2), expected, atol=1e-5)


def test_maps_are_differentiable(tiny_model: StableDiffusion, x: Tensor, cond: Cond) -> None:
    with tiny_model.frozen():
        tokens = cond.tokens.detach().requires_grad_()
        with tiny_model.attention() as maps:
            tiny_model.predict(x, 300, cond.with_tokens(tokens))
        maps.mean()[..., 2].sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().max() > 0


def test_capturing_restores_the_very_processors(tiny_model: StableDiffusion, x: Tensor, cond: Cond) -> None:
    layers = tiny_model.hook_points("attn")
    before = {name: layer.processor for name, layer in layers.items()}
    keys, hooks = list(tiny_model.denoiser.state_dict()), dict(tiny_model.denoiser._forward_pre_hooks)
    with pytest.raises(KeyboardInterrupt), tiny_model.attention():
        assert any(layer.processor is not before[name] for name, layer in layers.items())
        raise KeyboardInterrupt
    assert all(layer.processor is before[name] for name, layer in layers.items())
    assert list(tiny_model.denoiser.state_dict()) == keys
    assert dict(tiny_model.denoiser._forward_pre_hooks) == hooks


def test_somebody_elses_processor_is_refused_and_left(tiny_model: StableDiffusion) -> None:
    tiny_model.denoiser.set_attn_processor(SlicedAttnProcessor(1))
    with pytest.raises(Unsupported, match="SlicedAttnProcessor"), tiny_model.attention():
        pass
    tiny_model.denoiser.set_attn_processor(AttnProcessor())
    with tiny_model.attention():
        pass


def test_what_cannot_be_added_or_was_not_captured_is_said(tiny_model: StableDiffusion, x: Tensor, cond: Cond) -> None:
    with torch.no_grad(), tiny_model.attention(resolution=5) as maps:
        tiny_model.predict(x, 300, cond)
    with pytest.raises(ValueError, match="layers of height 5"):
        maps.mean()
    with torch.no_grad(), tiny_model.attention(), pytest.raises(ValueError, match="maps of 1 rows cannot be added to maps of 2"):
        tiny_model.predict(x, 300, cond)
        tiny_model.predict(x[:1], 300, cond[:1])


def test_text_maps_read_the_text_alone(tiny_model: StableDiffusion, cond: Cond) -> None:
    found = tiny_model.inputs("text_kv", cond)
    assert set(found) == set(tiny_model.select("text_kv"))
    assert all(tokens is cond.tokens for tokens in found.values())
    assert tiny_model.meter.calls == 0


def test_other_maps_are_captured_as_they_are_called(tiny_model: StableDiffusion, x: Tensor, cond: Cond) -> None:
    """Each linear map, applied to what is said to enter it, gives what the network gets from it."""
    slots = {name: slot for name, slot in tiny_model.select("full").items() if isinstance(slot.owner, torch.nn.Linear)}
    outputs: dict[torch.nn.Module, Tensor] = {}
    handles = [slot.owner.register_forward_hook(lambda m, args, out: outputs.__setitem__(m, out)) for slot in slots.values()]
    found = tiny_model.inputs("full", cond, x=x, t=300)
    for handle in handles:
        handle.remove()
    assert set(found) == {name for name, slot in slots.items() if slot.attribute == "weight"}
    with torch.no_grad():
        assert all(torch.allclose(slots[name].owner(entered), outputs[slots[name].owner], atol=1e-5) for name, entered in found.items())
    assert not any(slot.owner._forward_pre_hooks for slot in slots.values())


def test_the_text_encoders_maps_are_captured_from_ids(tiny_model: StableDiffusion, cond: Cond) -> None:
    found = tiny_model.inputs("text_encoder", cond)
    assert len(found) == 12  # two layers of q, k, v, out and two maps
    with pytest.raises(Unsupported, match="need token ids"):
        tiny_model.inputs("text_encoder", cond.with_tokens(cond.tokens))


def test_image_maps_need_latents(tiny_model: StableDiffusion, cond: Cond) -> None:
    with pytest.raises(Unsupported, match=r"'xattn' read image features too: give `x` and `t`, or use 'text_kv'"):
        tiny_model.inputs("xattn", cond)

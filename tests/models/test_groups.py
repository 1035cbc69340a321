"""Which parameters a group holds, counted on Stable Diffusion's true configuration."""

from __future__ import annotations

import pytest
import torch
from models.skeleton import skeleton

from efface.core.errors import Unsupported
from efface.models.sd import StableDiffusion


@pytest.fixture(scope="module")
def sd1() -> StableDiffusion:
    return skeleton("sd1")


@pytest.fixture(scope="module")
def sd2() -> StableDiffusion:
    return skeleton("sd2-v")


def size(model: StableDiffusion, group: str) -> tuple[int, int]:
    """(tensors, parameters)"""
    slots = model.select(group)
    return len(slots), sum(slot.tensor.numel() for slot in slots.values())


def test_the_shipped_configurations_have_the_published_sizes(sd1: StableDiffusion, sd2: StableDiffusion) -> None:
    sizes = {
        name: [sum(p.numel() for p in network.parameters()) for network in model.components.values()]
        for name, model in (("sd1", sd1), ("sd2", sd2))
    }
    assert sizes == {"sd1": [859_520_964, 123_060_480, 83_653_863], "sd2": [865_910_724, 340_387_840, 83_653_863]}
    assert (sd1.family, sd2.family) == ("sd1", "sd2")
    assert (sd1.schedule.prediction, sd2.schedule.prediction) == ("epsilon", "v_prediction")
    assert (sd1.latent_shape, sd2.latent_shape) == ((4, 64, 64), (4, 96, 96))


@pytest.mark.parametrize(
    ("group", "tensors", "parameters"),
    [
        ("xattn", 80, 43_962_560),  # the papers' "ESD-x" and AP's xattn
        ("text_kv", 32, 19_169_280),  # ESD's "strict"
        ("full", 686, 859_520_964),
        ("text_encoder", 196, 123_060_480),
    ],
)
def test_the_groups_of_stable_diffusion_1_have_the_papers_sizes(sd1: StableDiffusion, group: str, tensors: int, parameters: int) -> None:
    assert size(sd1, group) == (tensors, parameters)


def test_groups_are_built_from_each_other(sd1: StableDiffusion) -> None:
    count = {group: size(sd1, group)[1] for group in sd1.groups}
    outputs = count["full"] - count["notime"]
    time_embedding = 320 * 1280 + 1280 + 1280 * 1280 + 1280
    assert outputs == time_embedding + 2 * 320 + (320 * 4 * 9 + 4)
    assert count["noxattn"] == count["notime"] - count["xattn"]
    assert round(count["noxattn"] / 1e6, 1) == 813.5
    assert count["xattn_matching"] == count["xattn"] - sum(
        slot.tensor.numel() for name, slot in sd1.select("xattn").items() if ".to_out." in name
    )
    assert len(sd1.select("xlayer")) == len(sd1.select("selflayer")) == 10
    assert set(sd1.select("xlayer")) < set(sd1.select("xattn"))
    assert set(sd1.select("selflayer")) < set(sd1.select("selfattn"))


def test_esd_u_differs_between_paper_and_newer_scripts(sd1: StableDiffusion) -> None:
    paper, newer, blocks = (set(sd1.select(g)) for g in ("noxattn", "esd_u", "esd_u_blocks"))
    assert "unet.conv_out.weight" in newer - paper
    assert "unet.time_embedding.linear_1.weight" in newer - paper
    assert any(".norm1." in name for name in paper - newer)
    assert "unet.conv_in.weight" in newer - blocks
    assert not any(".attn2." in name for name in paper | newer | blocks)
    assert any(".norm2." in name for name in paper)  # the norm in front of attn2 is not part of it


def test_a_small_network_has_only_the_groups_that_hold_something(tiny_model: StableDiffusion) -> None:
    assert "xlayer" not in tiny_model.groups
    with pytest.raises(Unsupported, match=r"'xlayer'.*text_kv"):
        tiny_model.select("xlayer")
    with pytest.raises(Unsupported, match="did you mean 'xattn'"):
        tiny_model.select("xatn")


def test_a_slot_is_the_parameter_itself(tiny_model: StableDiffusion) -> None:
    for name, slot in tiny_model.select("full").items():
        assert slot.tensor is tiny_model.denoiser.get_parameter(name.removeprefix("unet."))


def test_roles_are_found_from_the_network(sd1: StableDiffusion) -> None:
    count = {role: len(sd1.hook_points(role)) for role in ("cross_attn", "self_attn", "attn", "transformer", "feed_forward", "block")}
    assert count == {"cross_attn": 16, "self_attn": 16, "attn": 32, "transformer": 16, "feed_forward": 16, "block": 9}
    assert len(sd1.hook_points("resnet")) == 22
    assert list(sd1.hook_points("text_layer"))[-1] == "text_encoder.encoder.layers.11"
    with pytest.raises(Unsupported, match="did you mean 'resnet'"):
        sd1.hook_points("resnets")


def test_clip_knows_its_words(sd1: StableDiffusion) -> None:
    ids = sd1.pipeline.tokenizer("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]  # as published for CLIP
    words = sd1.words()
    assert {"cat", "garbage", "café"} <= set(words)
    assert "nudity" not in words  # CLIP spells it in pieces
    assert all(word.isalpha() and word == word.lower() for word in words)
    assert words.index("photo") < words.index("cat")
    assert 30_000 < len(words) < 40_000


@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (1, 4, 32, 48)])
def test_the_true_network_takes_the_true_shapes(sd1: StableDiffusion, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device="meta")
    cond = sd1.encode_tokens(embeds=torch.empty(1, 77, 768, device="meta"))
    with sd1.attention() as maps, torch.no_grad():
        assert sd1.predict(x, 1, cond).shape == shape
    assert set(maps.totals) == {(shape[2] // k, shape[3] // k) for k in (1, 2, 4, 8)}
    assert sum(maps.counts.values()) == 16

"""Edits: exact attach and detach, the stack, the file, and the refusals. On a tiny real Stable Diffusion."""

import errno
import json
import os

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from efface.core import file
from efface.core.card import Card, Fingerprint
from efface.core.edit import Chain, Edit, FeatureEdit, FeatureMap, LowRankEdit, Part, SamplingEdit, WeightEdit
from efface.core.errors import EffaceError, InvalidEdit, Mismatch, NoEffect, Overlap, Unsupported
from efface.core.rules import NegativePrompt
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.models.sd import StableDiffusion

TASK = Task.of("cat", ["dog"])


def card(model, seed=0):
    return Card.of(model, method="noop", task=TASK, seed=seed)


def deltas(model, scale=0.1, part="to_k"):
    names = sorted(n for n in model.select("xattn") if f"{part}.weight" in n)[:2]
    g = seeded(3)
    return {n: scale * torch.randn(s.tensor.shape, generator=g) for n, s in model.slots(names).items()}


def weight_edit(model, **how):
    return WeightEdit(deltas(model, **how), card(model), {"trace": Part({"loss": torch.arange(3.0)}, {"words": ["dog"]})})


def low_rank_edit(model):
    g = seeded(4)
    slots = model.slots(deltas(model, part="to_v"))
    return LowRankEdit(
        {n: (torch.randn(2, s.tensor.shape[1], generator=g), torch.randn(s.tensor.shape[0], 2, generator=g)) for n, s in slots.items()},
        card(model),
        scale=0.2,
    )


def feature_edit(model):
    down = torch.linalg.qr(torch.randn(32, 3, generator=seeded(5)))[0].T
    return FeatureEdit({"unet.mid_block.resnets.0": FeatureMap(torch.zeros(32), down, -down)}, card(model))


def sampling_edit(model):
    return SamplingEdit(NegativePrompt("cat"), card(model))


def chain(model):
    return Chain((weight_edit(model), low_rank_edit(model)), card(model))


KINDS = [weight_edit, low_rank_edit, feature_edit, sampling_edit, chain]


def state(model):
    """Everything that an edit could leave behind: names, tensors by identity and value, flags, hooks, rules."""
    found = []
    for component, network in model.components.items():
        for name, p in network.named_parameters():
            found.append((component, name, id(p), p.requires_grad, p.detach().clone()))
        found += [(component, name, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in network.named_modules()]
    return found, list(model.rules), list(model.attached), torch.get_rng_state()


def same(a, b):
    return all(
        all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(row, other, strict=True))
        for row, other in zip(a[0], b[0], strict=True)
    ) and (a[1], a[2]) == (b[1], b[2])


def images(model):
    return model.sample(["a cat"], seed=1, steps=2, guidance=3.0)


@pytest.mark.parametrize("make", KINDS)
def test_attached_it_acts_and_detached_all_is_as_before_to_the_bit(tiny_model, make):
    edit, before, was = make(tiny_model), images(tiny_model), state(tiny_model)
    with edit.attach(tiny_model) as model:
        assert model is tiny_model
        assert not torch.equal(images(tiny_model), before)
        assert not same(state(tiny_model), was)
    assert same(state(tiny_model), was)
    assert torch.equal(images(tiny_model), before)


@pytest.mark.parametrize("make", KINDS)
def test_a_saved_edit_acts_as_the_one_in_memory(tiny_model, make, tmp_path):
    edit = make(tiny_model)
    with edit.attach(tiny_model):
        expected = images(tiny_model)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert type(again) is type(edit)
    assert again.card == edit.card
    assert again.names == edit.names
    with again.attach(tiny_model):
        assert torch.equal(images(tiny_model), expected)


def test_the_original_returns_when_the_body_fails(tiny_model):
    was = state(tiny_model)
    with pytest.raises(KeyboardInterrupt), weight_edit(tiny_model).attach(tiny_model):
        raise KeyboardInterrupt
    assert same(state(tiny_model), was)


def test_extras_are_files_of_their_own(tiny_model, tmp_path):
    path = weight_edit(tiny_model).save(tmp_path / "no-cat.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["no-cat.safetensors", "no-cat.trace.safetensors"]
    trace = Edit.load(path).extras["trace"]
    assert torch.equal(trace.tensors["loss"], torch.arange(3.0))
    assert trace.info == {"words": ["dog"]}
    (tmp_path / "no-cat.trace.safetensors").unlink()
    assert Edit.load(path).extras == {}


def test_edits_stack_and_detach_in_reverse_only(tiny_model):
    first, second = weight_edit(tiny_model), low_rank_edit(tiny_model)
    was = state(tiny_model)
    with first.attach(tiny_model), second.attach(tiny_model):
        assert len(tiny_model.attached) == 2
    assert same(state(tiny_model), was)
    outer, inner = first.attach(tiny_model), second.attach(tiny_model)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(Overlap, match="reverse order"):
        outer.__exit__(None, None, None)


def test_two_edits_of_one_tensor_are_refused(tiny_model):
    edit = weight_edit(tiny_model)
    with (
        edit.attach(tiny_model),
        pytest.raises(Overlap, match="already changes"),
        weight_edit(tiny_model).attach(tiny_model, match="force"),
    ):
        pass


@pytest.mark.parametrize("make", [weight_edit, low_rank_edit, chain])
def test_baking_equals_attaching(tiny_model, make):
    edit = make(tiny_model)
    with edit.attach(tiny_model):
        expected = images(tiny_model)
    edit.bake(tiny_model)
    assert torch.equal(images(tiny_model), expected)
    with pytest.raises(Mismatch, match="other weights"):
        edit.bake(tiny_model)


@pytest.mark.parametrize("make", [feature_edit, sampling_edit])
def test_hooks_cannot_be_baked(tiny_model, make):
    with pytest.raises(Unsupported, match="removable hook"):
        make(tiny_model).bake(tiny_model)
    with pytest.raises(Unsupported, match="removable hook"):
        Chain((make(tiny_model),), card(tiny_model)).bake(tiny_model)


def test_another_models_edit_is_refused_unless_told_otherwise(tiny_model):
    other = StableDiffusion(tiny.pipeline(seed=5))
    edit = weight_edit(tiny_model)
    with pytest.raises(Mismatch, match=r"fitted on other weights.*match='family'"), edit.attach(other):
        pass
    with edit.attach(other, match="family"):
        pass
    with pytest.raises(ValueError, match="expected 'exact'"), edit.attach(other, match="exactly"):
        pass


def test_the_fingerprint_knows_the_weights_in_other_number_formats(tiny_model):
    print_ = Fingerprint.of(tiny_model)
    half = StableDiffusion(tiny.pipeline().to(torch.bfloat16))
    assert print_.digest != Fingerprint.of(half).digest
    assert print_.same_weights(Fingerprint.of(half))
    assert not print_.same_weights(Fingerprint.of(StableDiffusion(tiny.pipeline(seed=5).to(torch.bfloat16))))
    with weight_edit(tiny_model).attach(half):
        pass


def test_an_edit_that_does_nothing_is_announced(tiny_model):
    nothing = WeightEdit({n: torch.zeros_like(d) for n, d in deltas(tiny_model).items()}, card(tiny_model))
    was = state(tiny_model)
    with pytest.raises(NoEffect, match="changes nothing for 'cat'"), nothing.attach(tiny_model):
        pass
    assert same(state(tiny_model), was)
    with nothing.attach(tiny_model, check=False):
        pass


def test_the_probe_is_not_metered(tiny_model):
    tiny_model.meter.reset()
    with weight_edit(tiny_model).attach(tiny_model):
        pass
    assert (tiny_model.meter.forwards, tiny_model.meter.calls) == (0, 0)


def test_a_chain_that_fails_half_way_leaves_nothing(tiny_model):
    bad = FeatureEdit({"unet.no_such_block": FeatureMap(torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 1))}, card(tiny_model))
    was = state(tiny_model)
    with (
        pytest.raises(Unsupported, match="no module 'unet.no_such_block'"),
        Chain((weight_edit(tiny_model), bad), card(tiny_model)).attach(tiny_model),
    ):
        pass
    assert same(state(tiny_model), was)


def test_bad_files_are_refused(tiny_model, tmp_path):
    path = weight_edit(tiny_model).save(tmp_path / "e.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidEdit, match="corrupt or truncated"):
        Edit.load(path)
    path.write_bytes(b"not tensors at all")
    with pytest.raises(InvalidEdit, match="corrupt or truncated"):
        Edit.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InvalidEdit, match="without efface's card"):
        Edit.load(path)
    with pytest.raises(InvalidEdit, match="no edit file at"):
        Edit.load(tmp_path / "absent.safetensors")
    with pytest.raises(InvalidEdit, match=r"saved as \.safetensors"):
        weight_edit(tiny_model).save(tmp_path / "e.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "file version 99.*upgrade"),
        ({"format": "lora"}, "'efface-edit' was expected"),
        ({"kind": "magic"}, "unknown kind of edit 'magic'"),
        ({"card": {}}, "card cannot be read"),
    ],
)
def test_bad_headers_are_refused(tiny_model, tmp_path, change, message):
    path = weight_edit(tiny_model).save(tmp_path / "e.safetensors")
    tensors, header = file.read(path)
    file.write(path, tensors, header | change)
    with pytest.raises(InvalidEdit, match=message):
        Edit.load(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tiny_model, tmp_path, monkeypatch):
    path = weight_edit(tiny_model).save(tmp_path / "e.safetensors")
    whole = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EffaceError, match="no space is left.*Nothing was written"):
        file.write(path, {"a": torch.zeros(3)}, {})
    assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2


def test_the_file_is_plain_safetensors_with_a_json_card(tiny_model, tmp_path):
    path = weight_edit(tiny_model).save(tmp_path / "e.safetensors")
    assert set(load_file(path)) == set(deltas(tiny_model))
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["efface"]
    stored = json.loads(header)
    assert stored["card"]["task"] == "cat | keep dog"
    assert "change of weights" in stored["threat"]

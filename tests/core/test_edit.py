"""Edits: exact attach and detach, the stack, the file, and the refusals. On a tiny real Stable Diffusion."""

import errno
import json
import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from efface.core import file
from efface.core.card import Card, Fingerprint
from efface.core.edit import Chain, Edit, FeatureEdit, FeatureMap, LowRankEdit, Part, SamplingEdit, WeightEdit
from efface.core.errors import EffaceError, InvalidEdit, InvalidModel, Mismatch, NoEffect, Overlap, Unsupported
from efface.core.features import Eraser, LatentAblation, LatentTable, PriorEraser, Residuals, weighted
from efface.core.gate import PromptGate
from efface.core.model import Cond
from efface.core.rules import NegativePrompt
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.models.sd import StableDiffusion
from efface.ops.sae import SparseAutoencoder

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


def gated_low_rank_edit(model):
    return replace(low_rank_edit(model), gate=PromptGate((("cat",), ("dog",))))


def feature_edit(model):
    down = torch.linalg.qr(torch.randn(32, 3, generator=seeded(5)))[0].T
    return FeatureEdit({"unet.mid_block.resnets.0": FeatureMap(torch.zeros(32), down, -down)}, card(model))


BLOCK = "unet.up_blocks.1.attentions.1"


def ablation_edit(model, **how):
    """Half of the latents of a random autoencoder, differently at two times."""
    net = SparseAutoencoder.fresh(16, 64, 8, seeded(6))
    latents = torch.stack([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    table = LatentTable(torch.tensor([901, 1]), latents, torch.full((2, 32), -2.0), torch.zeros(2, 32))
    return FeatureEdit({BLOCK: LatentAblation(net, table, **how)}, card(model))


def eraser(model, label="cat", seed=7, **how):
    net = PriorEraser(model)
    with torch.no_grad():
        for parameter in net.zeros.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=seeded(seed)))
    return Eraser(label, {name: weight.detach() for name, weight in net.state_dict().items()}, **how)


def residual_edit(model, label="cat", seed=7, **how):
    return FeatureEdit({"unet": Residuals((eraser(model, label, seed, **how),))}, card(model))


def gated_residual_edit(model):
    table = torch.rand(20, 5, generator=seeded(8))
    return residual_edit(model, table=table, gate=PromptGate((("cat",),)))


def sampling_edit(model):
    return SamplingEdit(NegativePrompt("cat"), card(model))


def chain(model):
    return Chain((weight_edit(model), low_rank_edit(model)), card(model))


FEATURES = [feature_edit, ablation_edit, residual_edit, gated_residual_edit]
KINDS = [weight_edit, low_rank_edit, *FEATURES, sampling_edit, chain]


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


def test_a_kind_is_read_by_its_own_class_and_not_by_a_subclass():
    class Ours(WeightEdit):
        """Somebody's weight edit."""

    assert Ours.kind == "weight"
    assert Edit.kinds["weight"] is WeightEdit
    assert list(Edit.kinds) == ["weight", "low-rank", "feature", "sampling", "chain"]


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


@pytest.mark.parametrize("make", [*FEATURES, sampling_edit])
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


def test_an_edit_that_acts_at_some_times_only_is_no_edit_that_does_nothing(tiny_model):
    """The one prediction that is looked at first is the same; the picture is not. The meter counts neither."""
    model, cond, x = tiny_model, tiny_model.encode(["cat"]), latent(tiny_model)
    edit = ablation_edit(model)
    feature = edit.maps[BLOCK]
    table = replace(feature.table, thresholds=torch.stack([torch.full((32,), torch.inf), torch.zeros(32)]))
    late = replace(edit, maps={BLOCK: replace(feature, table=table)})
    was, spent = state(model), model.meter.forwards
    with torch.no_grad():
        plain = [model.predict(x, t, cond) for t in (501, 1)]
        with late.attach(model, check=False):
            assert [torch.equal(model.predict(x, t, cond), p) for t, p in zip((501, 1), plain, strict=True)] == [True, False]
    spent = model.meter.forwards
    with late.attach(model):
        assert model.meter.forwards == spent
        assert len(model.attached) == 1
    assert same(state(model), was)
    never = replace(table, thresholds=torch.full((2, 32), torch.inf))
    with pytest.raises(NoEffect), replace(edit, maps={BLOCK: replace(feature, table=never)}).attach(model):
        pass
    assert model.attached == []


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


def unfit(model, how):
    """A weight edit whose last tensor cannot be computed: another width, or no memory behind it."""
    found = deltas(model)
    last = list(found)[-1]
    found[last] = torch.zeros(3, 3) if how == "width" else found[last].to("meta")
    return WeightEdit(found, card(model))


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(("how", "error"), [("width", Unsupported), ("memory", NotImplementedError)])
def test_an_edit_that_fails_half_way_changes_nothing(tiny_model, how, error, chained):
    was, edit = state(tiny_model), unfit(tiny_model, how)
    if chained:
        edit = Chain((low_rank_edit(tiny_model), edit), card(tiny_model))
    with pytest.raises(error), edit.attach(tiny_model, match="force", check=False):
        pass
    assert same(state(tiny_model), was)
    with pytest.raises(error):
        edit.bake(tiny_model, match="force")
    assert same(state(tiny_model), was)


def twice(model):
    """A chain whose two parts change the same tensors."""
    return Chain((weight_edit(model), weight_edit(model, scale=0.2)), card(model))


def test_another_edit_nests_in_a_chain_that_changes_a_tensor_twice(tiny_model):
    was, inner = state(tiny_model), low_rank_edit(tiny_model)
    with twice(tiny_model).attach(tiny_model):
        assert not inner.card.fingerprint.same_weights(Fingerprint.of(tiny_model))
        assert inner.card.fingerprint.same_weights(Fingerprint.of(tiny_model, original=True))
        with inner.attach(tiny_model):
            pass
    assert same(state(tiny_model), was)


def test_a_chain_that_changes_a_tensor_twice_is_baked_as_attached(tiny_model):
    edit = twice(tiny_model)
    with edit.attach(tiny_model):
        expected = images(tiny_model)
    edit.bake(tiny_model)
    assert torch.equal(images(tiny_model), expected)


def test_a_chain_in_a_chain_with_a_hook_is_not_baked(tiny_model):
    was = state(tiny_model)
    for make, message in ((sampling_edit, "removable hook"), (gated_low_rank_edit, "prompt gate")):
        inner = Chain((weight_edit(tiny_model), make(tiny_model)), card(tiny_model))
        with pytest.raises(Unsupported, match=message):
            Chain((inner,), card(tiny_model)).bake(tiny_model)
    assert same(state(tiny_model), was)


def test_a_chain_keeps_the_extras_of_its_parts(tiny_model, tmp_path):
    key = Part({"cat/key": torch.ones(2)}, {"mode": "mid"})
    parts = weight_edit(tiny_model), replace(low_rank_edit(tiny_model), extras={"key": key})
    inner = Chain(parts, card(tiny_model), {"trace": Part({"loss": torch.zeros(1)})})
    path = Chain((sampling_edit(tiny_model), inner), card(tiny_model)).save(tmp_path / "both.safetensors")
    names = ["both.1.0.trace.safetensors", "both.1.1.key.safetensors", "both.1.trace.safetensors", "both.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    again = Edit.load(path)
    assert again.extras == {} == again.edits[0].extras
    assert torch.equal(again.edits[1].extras["trace"].tensors["loss"], torch.zeros(1))
    first, second = again.edits[1].edits
    assert torch.equal(first.extras["trace"].tensors["loss"], torch.arange(3.0))
    assert torch.equal(second.extras["key"].tensors["cat/key"], torch.ones(2))
    assert second.extras["key"].info == {"mode": "mid"}
    (tmp_path / "both.1.1.key.safetensors").unlink()
    assert Edit.load(path).edits[1].edits[1].extras == {}


@pytest.mark.parametrize("make", [weight_edit, low_rank_edit, twice])
def test_originals_follow_a_model_that_is_cast_meanwhile(tiny_model, make):
    cast, was = tiny.pipeline().to(torch.bfloat16), state(tiny_model)
    with make(tiny_model).attach(tiny_model):
        tiny_model.pipeline.to(torch.bfloat16)
    for (*_, now), (*_, before) in zip(state(tiny_model)[0], was[0], strict=True):
        if isinstance(now, torch.Tensor):
            assert torch.equal(now, before.to(torch.bfloat16))
    assert [row[2] for row in state(tiny_model)[0]] == [row[2] for row in was[0]]  # the very parameters
    assert torch.equal(images(tiny_model), images(StableDiffusion(cast)))


def test_a_pipeline_is_to_be_loaded_first(tiny_model):
    edit, was = weight_edit(tiny_model), state(tiny_model)
    for match in ("exact", "force"):
        with pytest.raises(InvalidModel, match=r"StableDiffusionPipeline was given; give efface\.load\(pipe\)"):
            edit.bake(tiny_model.pipeline, match=match)
        with pytest.raises(InvalidModel, match=r"give efface\.load\(pipe\)"), edit.attach(tiny_model.pipeline, match=match):
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


# -- features ------------------------------------------------------------------------------------------------------------


def latent(model, rows=2, seed=0):
    return torch.randn(rows, *model.latent_shape, generator=seeded(seed))


@pytest.mark.parametrize("make", FEATURES)
def test_features_act_in_the_users_own_pipeline(tiny_model, make):
    def drawn():
        generator = seeded(3)
        return tiny_model.pipeline("a cat", num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt").images

    before = drawn()
    with make(tiny_model).attach(tiny_model):
        during = drawn()
        assert torch.equal(during, drawn())  # no counter is left over from the first picture
        # the pipeline's own loop and ours are the same denoiser: both are changed alike
        ours = tiny_model.sample(["a cat"], seed=3, steps=2, guidance=3.0)
    assert not torch.equal(before, during)
    assert torch.allclose(ours, during.float().cpu(), atol=1e-5)
    assert torch.equal(drawn(), before)


@pytest.mark.parametrize("make", FEATURES)
def test_features_cut_no_gradient(tiny_model, make):
    """The derivative along a direction, of the prediction by the text and by the latent, is that of finite differences."""
    model, edit = tiny_model, make(tiny_model)
    model.pipeline.unet.double(), model.pipeline.text_encoder.double()
    size, tolerance = (1e-3, 1e-2) if make is gated_residual_edit else (1e-6, 1e-4)  # the gate computes its cosine in float32
    with edit.attach(model, match="force"):
        cond = model.encode(["a cat"])
        x = latent(model, 1).double()
        for vary in ("text", "latent"):
            step = torch.randn((cond.tokens if vary == "text" else x).shape, generator=seeded(9)).double()

            def f(a, vary=vary, step=step):
                if vary == "text":  # the gate knows only rows of the text encoder: go through its input embeddings
                    table = model.pipeline.text_encoder.get_input_embeddings()
                    return model.predict(x, 501, model.encode_tokens(embeds=table(cond.ids) + a * step)).sum()
                return model.predict(x + a * step, 501, cond).sum()

            a = torch.zeros((), dtype=torch.float64, requires_grad=True)
            exact = torch.autograd.grad(f(a), a)[0]
            with torch.no_grad():
                finite = (f(torch.tensor(size)) - f(torch.tensor(-size))) / (2 * size)
            assert exact.abs() > 1e-3
            assert torch.allclose(exact, finite, rtol=tolerance, atol=1e-5)


def test_control_a_hidden_no_grad_leaves_no_derivative(tiny_model):
    """What the test above would see if the hook detached, as the released SAeUron does."""
    model, edit = tiny_model, ablation_edit(tiny_model)
    x = latent(model, 1).requires_grad_()
    cond = model.encode(["a cat"])
    with edit.attach(model):
        assert torch.autograd.grad(model.predict(x, 501, cond).sum(), x)[0].any()
        handle = model.module(BLOCK).register_forward_hook(lambda m, i, o: (o[0].detach(),))
        with pytest.raises(RuntimeError, match="not require grad|to not have been used"):
            torch.autograd.grad(model.predict(x, 501, cond).sum(), x)
        handle.remove()


@pytest.mark.parametrize("make", FEATURES)
def test_the_meter_counts_the_same_with_features_and_no_parameter_asks_for_a_gradient(tiny_model, make):
    spent, flags = {}, {n: p.requires_grad for n, p in tiny_model.denoiser.named_parameters()}
    for attached in (False, True):
        with make(tiny_model).attach(tiny_model, check=False) if attached else nullcontext():
            tiny_model.meter.reset()
            images(tiny_model)
            spent[attached] = (tiny_model.meter.forwards, tiny_model.meter.calls)
            assert flags == {n: p.requires_grad for n, p in tiny_model.denoiser.named_parameters()}
    assert spent[True] == spent[False] == (4, 2)


@pytest.mark.parametrize("make", FEATURES)
def test_features_work_in_half_precision(make):
    half = StableDiffusion(tiny.pipeline().to(torch.bfloat16))
    with make(half).attach(half):
        assert half.predict(latent(half).bfloat16(), 500, half.encode(["a cat"])).isfinite().all()


def test_the_table_of_latents_is_read_at_the_nearest_training_time_row_by_row(tiny_model):
    model, edit = tiny_model, ablation_edit(tiny_model)
    x, cond = latent(model, 1), model.encode(["a cat"])
    with edit.attach(model), torch.no_grad():
        early, late, near = (model.predict(x, t, cond) for t in (901, 1, 890))
        both = model.predict(torch.cat([x, x]), torch.tensor([901, 1]), cond)
    with torch.no_grad():
        plain = model.predict(x, 890, cond)
    assert torch.allclose(both, torch.cat([early, late]), atol=1e-5)
    table = edit.maps[BLOCK].table
    assert torch.equal(table.at(torch.tensor([890, 3]))[0], table.latents)
    assert not torch.allclose(near, plain, atol=1e-3)


def test_the_conditional_half_alone_can_be_changed(tiny_model):
    model, null = tiny_model, tiny_model.encode([""])
    x, cond = latent(model), Cond.cat([null, model.encode(["a cat"])])
    with torch.no_grad():
        plain = model.predict(x, 501, cond)
        with ablation_edit(model, halves="conditional").attach(model):
            half = model.predict(x, 501, cond)
        with ablation_edit(model).attach(model):
            whole = model.predict(x, 501, cond)
    assert torch.allclose(half[0], plain[0], atol=1e-6)
    assert torch.allclose(half[1], whole[1], atol=1e-5)
    assert not torch.allclose(whole[0], plain[0], atol=1e-3)


def test_an_autoencoder_of_another_width_is_refused(tiny_model):
    net = SparseAutoencoder.fresh(8, 16, 2, seeded(0))
    table = LatentTable(torch.tensor([1]), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), torch.zeros(1, 1))
    edit = FeatureEdit({BLOCK: LatentAblation(net, table)}, card(tiny_model))
    with edit.attach(tiny_model, check=False), pytest.raises(Unsupported, match="width 16, and the autoencoder's is 8"):
        images(tiny_model)
    with pytest.raises(InvalidEdit, match="error was 'lost'; expected kept or repo"):
        LatentAblation(net, table, error="lost")


def test_residuals_of_two_edits_and_of_a_controlnet_are_summed(tiny_model):
    model, cond, x = tiny_model, tiny_model.encode(["a cat"]), latent(tiny_model)
    tokens, t = cond.expand(2).tokens, torch.tensor([501, 501])
    first, second = (eraser(model, label, seed) for label, seed in (("cat", 7), ("dog", 8)))
    with torch.no_grad():
        parts = [e.module(model)(x, t, tokens) for e in (first, second)]
        control = [torch.full_like(r, 0.3) for r in parts[0]]

        def predicted(residuals):
            given = {"down_block_additional_residuals": list(residuals[:-1]), "mid_block_additional_residual": residuals[-1]}
            return model.pipeline.unet(x, t, tokens, **given).sample

        expected = predicted([a + b + c for a, b, c in zip(*parts, control, strict=True)])
        alone = predicted(control)
        with residual_edit(model, "cat", 7).attach(model), residual_edit(model, "dog", 8).attach(model):
            assert torch.allclose(predicted(control), expected, atol=1e-5)
        assert not torch.allclose(alone, expected, atol=1e-2)
        with residual_edit(model, "cat", 7).attach(model):
            with pytest.raises(Unsupported, match="only one of"):
                model.pipeline.unet(x, t, tokens, mid_block_additional_residual=control[-1])
            with pytest.raises(Overlap), residual_edit(model, "cat", 9).attach(model):
                pass


def test_a_table_of_ones_is_no_table_and_a_row_of_zeros_turns_its_times_off():
    t = torch.tensor([0, 49, 50, 999, 1000])
    residuals = [torch.randn(5, 3, 2, 2, generator=seeded(i)) for i in range(4)]
    ones, off = torch.ones(20, 4), torch.ones(20, 4)
    off[0] = 0
    off[19, 3] = 0.5
    assert all(torch.equal(a, b) for a, b in zip(weighted(residuals, t, ones, None, 1000), residuals, strict=True))
    found = weighted(residuals, t, off, None, 1000)
    for j, (a, b) in enumerate(zip(found, residuals, strict=True)):
        assert not a[:2].any()
        assert torch.equal(a[2], b[2])
        assert torch.equal(a[3:], (0.5 if j == 3 else 1.0) * b[3:])


def test_the_gate_opens_for_the_word_in_both_halves_of_guidance_and_less_for_other_prompts(tiny_model):
    """m of a prompt multiplies the residuals of its unconditional row, too."""
    model, x = tiny_model, latent(tiny_model, 2)
    edits = {gated: residual_edit(model, gate=PromptGate((("cat",),)) if gated else None) for gated in (True, False)}

    def predicted(text, gated):
        with edits[gated].attach(model, check=False), torch.no_grad():
            null, cond = model.encode([""]), model.encode([text])
            return model.predict(x, 501, Cond.cat([null, cond]))

    assert torch.allclose(predicted("a cat beside a car", True), predicted("a cat beside a car", False), atol=1e-5)
    dog = predicted("dog", True), predicted("dog", False)
    assert not torch.allclose(dog[0][0], dog[1][0], atol=1e-4)
    assert not torch.allclose(dog[0][1], dog[1][1], atol=1e-4)


def test_an_eraser_of_another_shape_is_refused(tiny_model):
    weights = dict(list(eraser(tiny_model).weights.items())[:-1])
    edit = FeatureEdit({"unet": Residuals((Eraser("cat", weights),))}, card(tiny_model))
    was = state(tiny_model)
    with pytest.raises(Unsupported, match="made for a denoiser of another shape"), edit.attach(tiny_model, check=False):
        pass
    assert same(state(tiny_model), was)


def test_the_copied_encoder_gives_the_unets_own_skips_and_none_of_its_hooks(tiny_model):
    model, x = tiny_model, latent(tiny_model)
    cond = model.encode(["a cat"]).expand(2)
    seen = []
    block = model.pipeline.unet.mid_block
    handle = block.register_forward_hook(lambda m, i, o: seen.append(o))
    copied, channels = model.encoder_copy()
    with torch.no_grad():
        outputs = copied(x, torch.tensor([7, 900]), cond.tokens)
        assert not seen
        model.predict(x, torch.tensor([7, 900]), cond)
    handle.remove()
    assert torch.equal(outputs[-1], seen[0])
    assert [o.shape[1] for o in outputs] == channels
    assert {id(p) for p in copied.parameters()}.isdisjoint({id(p) for p in model.denoiser.parameters()})

"""Exports: what plain diffusers draws from a written file or folder is what the attached edit draws, and the error is the stated one."""

import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from efface.core.card import Card
from efface.core.edit import Chain, FeatureEdit, LowRankEdit, Patch, SamplingEdit, WeightEdit
from efface.core.errors import EffaceError, InvalidEdit, Mismatch, NoEffect, Overlap, Unsupported
from efface.core.features import FeatureMap
from efface.core.gate import PromptGate
from efface.core.rules import NegativePrompt
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.models import names
from efface.models.export import RECORD, export
from efface.models.load import load
from efface.models.prove import prove
from efface.models.sd import StableDiffusion
from efface.ops.ridge import RightFactor

FILES = ("lora", "kohya", "delta")
KINDS = ("diffusers", *FILES)
SAME = 1e-4
"""Of pictures with values in 0 to 1: other orders of the same sums, over four steps and a decoder."""
BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


def card(model):
    return Card.of(model, method="noop", task=Task.of("cat"), seed=0)


def noise(model, wanted, scale=0.2, seed=0):
    g = seeded(seed)
    slots = model.slots(wanted)
    return {n: scale * s.tensor.detach().std() * torch.randn(s.tensor.shape, generator=g) for n, s in slots.items()}


def every_map(model):
    """A change of every linear map and convolution of both networks."""
    return WeightEdit(noise(model, [f"{name}.weight" for name in names.maps(model)]), card(model))


def keys_and_values(model):
    return WeightEdit(noise(model, model.select("text_kv"), scale=0.5), card(model))


def low_rank(model):
    wanted = [f"{BLOCK}.attn2.to_k", "unet.down_blocks.0.resnets.0.conv1", "unet.conv_in", "text_encoder.encoder.layers.0.self_attn.q_proj"]
    g, factors = seeded(4), {}
    for rank, name in enumerate(wanted, 2):
        shape = model.slots([f"{name}.weight"])[f"{name}.weight"].tensor.shape
        factors[f"{name}.weight"] = torch.randn(rank, *shape[1:], generator=g), torch.randn(shape[0], rank, generator=g)
    return LowRankEdit(factors, card(model), scale=0.05)


def text_maps(model):
    """A text encoder's queries and first layer of the MLP, without the output projection by which diffusers recognises kohya's spelling."""
    return WeightEdit(noise(model, [n for n in model.select("text_encoder") if n.endswith(("q_proj.weight", "fc1.weight"))]), card(model))


def chain(model):
    """Parts that build on each other: one map in two of them, and a right factor on what the others have made."""
    first, second = keys_and_values(model), low_rank(model)
    factor = RightFactor(0.1 * torch.randn(tiny.WIDTH, 3, generator=seeded(7)), torch.randn(3, tiny.WIDTH, generator=seeded(8)))
    patch = WeightEdit({}, card(model), {}, (Patch((f"{BLOCK}.attn2.to_k.weight", f"{BLOCK}.attn2.to_v.weight"), factor),))
    return Chain((first, second, patch), card(model))


EDITS = (every_map, keys_and_values, text_maps, low_rank, chain)


def drawn(pipeline):
    generators = [seeded(i) for i in (3, 4)]
    return pipeline(["a cat", "a dog"], num_inference_steps=3, guidance_scale=4.0, generator=generators, output_type="pt").images


def reloaded(kind, path):
    """A user of diffusers without efface."""
    if kind == "diffusers":
        pipeline = StableDiffusionPipeline.from_pretrained(path)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    pipeline = tiny.pipeline()
    if kind == "delta":
        for name, delta in load_file(path).items():
            network, _, parameter = name.partition(".")
            getattr(pipeline, network).get_parameter(parameter).data.add_(delta)
    else:
        pipeline.load_lora_weights(str(path))
    return pipeline


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["efface"])


def whole(kind):
    return {"energy": 1.0} if kind in ("lora", "kohya") else {}


def target(kind, folder):
    return folder / ("out" if kind == "diffusers" else "out.safetensors")


def apart(a, b):
    return float((a - b).abs().max())


# -- the proof -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", EDITS)
def test_plain_diffusers_draws_what_the_attached_edit_draws(tiny_model, make, kind, tmp_path):
    edit, before = make(tiny_model), drawn(tiny_model.pipeline)
    with edit.attach(tiny_model):
        expected = drawn(tiny_model.pipeline)
    assert apart(before, expected) > 0.02  # the control: the edit is seen
    options = {} if make is low_rank else whole(kind)
    made = export(tiny_model, edit, kind, target(kind, tmp_path), **options)
    assert apart(drawn(reloaded(kind, made.path)), expected) < SAME
    assert made.error < 1e-5
    assert (made.lost, made.warnings) == ((), ())
    assert [path.name for path in tmp_path.iterdir()] == [made.path.name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(tiny_model, kind, tmp_path):
    def state():
        parameters = [(n, p) for c in tiny_model.components.values() for n, p in c.named_parameters()]
        rows = [(n, id(p), p.requires_grad, p.dtype, p.detach().clone()) for n, p in parameters]
        return rows, repr(tiny_model.pipeline.text_encoder.config)

    edit, was, before = keys_and_values(tiny_model), state(), torch.get_rng_state()
    export(tiny_model, edit, kind, target(kind, tmp_path))
    now = state()
    assert now[1] == was[1]
    assert all(a[:4] == b[:4] and torch.equal(a[4], b[4]) for a, b in zip(now[0], was[0], strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not tiny_model.attached


# -- the error -----------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:what was written differs")
@pytest.mark.parametrize("kind", ["lora", "kohya"])
@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.7}])
def test_the_stated_error_is_that_of_the_singular_values_left_out(tiny_model, kind, how, tmp_path):
    edit = keys_and_values(tiny_model)
    made = export(tiny_model, edit, kind, tmp_path / "out.safetensors", **how)
    for name, delta in edit.deltas.items():
        square = torch.linalg.svdvals(delta.double()).square()
        rank = made.ranks[name.removesuffix(".weight")]
        assert rank == 2 or "energy" in how
        assert made.errors[name] == pytest.approx(math.sqrt(square[rank:].sum() / square.sum()), abs=1e-5)
        assert made.errors[name] <= math.sqrt(1 - how.get("energy", 0))
    assert metadata(made.path)["errors"] == made.errors
    total = math.hypot(*(made.errors[n] * float(d.norm()) for n, d in edit.deltas.items()))
    assert made.error == pytest.approx(total / math.hypot(*(float(d.norm()) for d in edit.deltas.values())), rel=1e-4)


@pytest.mark.filterwarnings("ignore:what was written differs")
def test_a_higher_rank_comes_nearer_in_weights_and_in_pictures(tiny_model, tmp_path):
    edit = every_map(tiny_model)
    with edit.attach(tiny_model):
        expected = drawn(tiny_model.pipeline)
    errors, distances = [], []
    for rank in (1, 8, 144):
        made = export(tiny_model, edit, "lora", tmp_path / f"{rank}.safetensors", rank=rank)
        errors.append(made.error)
        distances.append(apart(drawn(reloaded("lora", made.path)), expected))
    assert errors[0] > errors[1] > 0.3 > 1e-5 > errors[2]
    assert distances[0] > 10 * SAME > SAME > distances[2]


def test_by_default_each_map_keeps_all_but_one_percent(tiny_model, tmp_path):
    made = export(tiny_model, every_map(tiny_model), "lora", tmp_path / "out.safetensors")
    assert 0 < max(made.errors.values()) <= 0.01


def test_stored_in_half_precision_the_error_says_so(tiny_model, tmp_path):
    edit = low_rank(tiny_model)
    exact, half = (export(tiny_model, edit, "lora", tmp_path / f"{d}.safetensors", dtype=d) for d in (torch.float32, torch.float16))
    assert exact.error < 1e-6 < 1e-5 < half.error < 1e-3
    assert {t.dtype for t in load_file(half.path).values()} == {torch.float16}


def test_what_a_lora_cannot_hold_is_warned_of_and_counted(tiny_model, tmp_path):
    edit = WeightEdit(noise(tiny_model, tiny_model.select("xattn")), card(tiny_model))
    biases = {name for name in edit.deltas if name.endswith("bias")}
    with pytest.warns(UserWarning, match=rf"cannot hold {len(biases)} of the parameters .*'diffusers' and 'delta' hold all"):
        made = export(tiny_model, edit, "lora", tmp_path / "lora.safetensors", energy=1.0)
    assert set(made.lost) == biases == set(metadata(made.path)["lost"])
    lost, total = (math.hypot(*(float(d.norm()) for n, d in edit.deltas.items() if n in chosen)) for chosen in (biases, edit.deltas))
    assert made.error == pytest.approx(lost / total, rel=1e-4)
    with warnings.catch_warnings():  # the control: the other formats hold biases, and nothing is said
        warnings.simplefilter("error")
        assert export(tiny_model, edit, "delta", tmp_path / "delta.safetensors").error == 0


def test_an_edit_without_any_map_is_no_lora(tiny_model, tmp_path):
    edit = WeightEdit(noise(tiny_model, ["unet.conv_norm_out.weight", "unet.conv_in.bias"]), card(tiny_model))
    with pytest.raises(Unsupported, match="linear maps and convolutions only"):
        export(tiny_model, edit, "lora", tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chained", [False, True])
def test_a_prompt_gate_is_lost_with_a_warning(tiny_model, kind, chained, tmp_path):
    gated = replace(low_rank(tiny_model), gate=PromptGate((("cat",), ("lemon",))))
    gated = replace(gated, factors={n: (down[:2], up[:, :2]) for n, (down, up) in gated.factors.items() if "attn2" in n})
    edit = Chain((keys_and_values(tiny_model), gated), card(tiny_model)) if chained else gated
    plain = Chain((keys_and_values(tiny_model), gated.ungated()), card(tiny_model)) if chained else gated.ungated()
    options = whole(kind) if chained else {}
    with pytest.warns(UserWarning, match=r"weights cannot hold the prompt gate .* 'cat', 'lemon'.* full strength on every prompt"):
        made = export(tiny_model, edit, kind, target(kind, tmp_path), **options)
    with plain.attach(tiny_model):
        expected = drawn(tiny_model.pipeline)
    assert apart(drawn(reloaded(kind, made.path)), expected) < SAME
    with edit.attach(tiny_model):
        assert apart(drawn(tiny_model.pipeline), expected) > SAME  # the control: with the gate it acts otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(tiny_model, plain, kind, target(kind, tmp_path), overwrite=True, **options)


# -- the formats ---------------------------------------------------------------------------------------------------------
def test_names_in_a_lora_file(tiny_model, tmp_path):
    made = export(tiny_model, low_rank(tiny_model), "lora", tmp_path / "out.safetensors")
    modules = {key.rpartition(".lora_")[0] for key in load_file(made.path)}
    assert f"{BLOCK}.attn2.to_k" in modules
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in modules
    assert metadata(made.path)["card"]["task"] == "cat"


def test_kohya_files_have_one_alpha_since_diffusers_ignores_an_attention_maps_own(tiny_model, tmp_path):
    ranks = {"to_q": 1, "to_k": 2, "to_v": 2}
    factors = {f"{BLOCK}.attn1.{name}.weight": (torch.ones(r, 16), 1e-3 * torch.ones(16, r)) for name, r in ranks.items()}
    edit = LowRankEdit(factors, card(tiny_model))
    made = export(tiny_model, edit, "kohya", tmp_path / "out.safetensors")
    stored = load_file(made.path)
    assert {float(t) for name, t in stored.items() if name.endswith(".alpha")} == {2.0}
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert torch.allclose(stored[f"{name}.lora_up.weight"], torch.full((16, 1), 0.5e-3))  # alpha / rank = 2
    stored[f"{name}.alpha"].fill_(1.0)
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):  # the control: with an alpha of its own it is misread
        tiny.pipeline().load_lora_weights(stored)


def test_an_exported_folder_keeps_the_models_defaults_and_says_where_it_comes_from(tmp_path):
    model = StableDiffusion(tiny.pipeline(), id="tiny", lr_scale=7.0, default_steps=3, default_guidance=2.0)
    made = export(model, keys_and_values(model), "diffusers", tmp_path / "out")
    again = load(made.path)
    assert (again.lr_scale, again.default_steps, again.default_guidance) == (7.0, 3, 2.0)
    record = json.loads((made.path / RECORD).read_text())
    assert (record["format"], record["card"]["model"], record["error"]) == ("efface-diffusers", "tiny", made.error)
    stored = load_file(made.path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in stored)


# -- other number formats ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [keys_and_values, low_rank])
def test_an_edit_fitted_in_float32_serves_a_half_precision_pipeline(tiny_model, make, dtype):
    edit = make(tiny_model)
    with edit.attach(tiny_model):
        exact = {n: s.tensor.detach().clone() for n, s in tiny_model.slots(edit.names).items()}
    half = StableDiffusion(tiny.pipeline().to(dtype=dtype), id="tiny-half")
    before = {n: s.tensor.detach().clone() for n, s in half.slots(edit.names).items()}
    with edit.attach(half):
        attached = {n: s.tensor.detach().clone() for n, s in half.slots(edit.names).items()}
        half.sample(["a cat"], seed=1, steps=2)
    edit.bake(half)
    unit = torch.finfo(dtype).eps / 2
    for name, slot in half.slots(edit.names).items():
        assert torch.equal(slot.tensor, attached[name])
        bound = unit * (tiny_model.slots([name])[name].tensor.abs() + exact[name].abs()) * (1 + 2 * unit) + 1e-7
        assert ((attached[name].float() - exact[name]).abs() <= bound).all()  # W rounded once, W + Δ rounded once
        assert not ((before[name].float() - exact[name]).abs() <= bound).all()  # the control: the edit is more than rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_folder_runs_in_plain_diffusers_and_states_what_rounding_took(tiny_model, dtype, tmp_path):
    edit = keys_and_values(tiny_model)
    half = StableDiffusion(tiny.pipeline().to(dtype=dtype), id="tiny-half")
    made = export(half, edit, "diffusers", tmp_path / "out")
    with edit.attach(half):
        weights = {n: s.tensor.detach().float() for n, s in half.slots(edit.names).items()}
    for name, slot in half.slots(edit.names).items():
        kept = weights[name] - slot.tensor.detach().float()
        assert made.errors[name] == pytest.approx(float((kept - edit.deltas[name]).norm() / edit.deltas[name].norm()), rel=1e-3)
    pipeline = StableDiffusionPipeline.from_pretrained(made.path)
    pipeline.set_progress_bar_config(disable=True)
    with edit.attach(tiny_model):
        assert apart(drawn(pipeline), drawn(tiny_model.pipeline)) < 0.1
    half.pipeline.save_pretrained(tmp_path / "raw")  # the control: what save_pretrained writes does not run when loaded plainly
    with pytest.raises(RuntimeError, match="dtype"):
        drawn(StableDiffusionPipeline.from_pretrained(tmp_path / "raw"))


def test_a_change_below_the_rounding_of_the_weights_is_warned_of(tiny_model, tmp_path):
    edit = WeightEdit(noise(tiny_model, tiny_model.select("text_kv"), scale=1e-3), card(tiny_model))
    half = StableDiffusion(tiny.pipeline().to(dtype=torch.bfloat16), id="tiny-half")
    with pytest.warns(UserWarning, match=r"rounds away \d+\.\d% of this change; load the model in float32"):
        made = export(half, edit, "diffusers", tmp_path / "half")
    assert made.error > 0.3
    assert export(tiny_model, edit, "diffusers", tmp_path / "full").error < 1e-3  # the control: silent in float32


def test_a_lora_of_a_float32_fit_serves_a_bfloat16_pipeline(tiny_model, tmp_path):
    edit = every_map(tiny_model)
    with edit.attach(tiny_model):
        expected = drawn(tiny_model.pipeline)
    made = export(tiny_model, edit, "lora", tmp_path / "out.safetensors", energy=1.0)
    pipeline = tiny.pipeline().to(dtype=torch.bfloat16)
    plain = apart(drawn(pipeline).float(), drawn(tiny.pipeline()))
    pipeline.load_lora_weights(str(made.path))
    assert apart(drawn(pipeline).float(), expected) < max(3 * plain, 0.02) < apart(expected, drawn(tiny.pipeline()))


# -- refusals ------------------------------------------------------------------------------------------------------------
def feature(model):
    down = torch.linalg.qr(torch.randn(32, 3, generator=seeded(5)))[0].T
    return FeatureEdit({"unet.mid_block.resnets.0": FeatureMap(torch.zeros(32), down, -down)}, card(model))


def sampling(model):
    return SamplingEdit(NegativePrompt("cat"), card(model))


def mixed(model):
    return Chain((keys_and_values(model), feature(model)), card(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [feature, sampling, mixed])
def test_what_is_no_change_of_weights_says_what_to_do(tiny_model, make, kind, tmp_path):
    with pytest.raises(Unsupported, match=r"no change of weights.*save it with `edit\.save`, and attach it"):
        export(tiny_model, make(tiny_model), kind, target(kind, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lorra", {}, "did you mean 'lora'"),
        ("lora", {"rank": 0}, "rank was 0"),
        ("kohya", {"energy": 1.5}, "energy was 1.5"),
        ("delta", {"rank": 4}, "belong to the kinds lora and kohya"),
        ("diffusers", {"dtype": torch.float16}, "load the model in it"),
    ],
)
def test_wrong_settings_are_named(tiny_model, kind, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(tiny_model, keys_and_values(tiny_model), kind, target(kind, tmp_path), **options)
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_is_refused(tiny_model, tmp_path):
    edit = keys_and_values(tiny_model)
    with pytest.raises(InvalidEdit, match=r"a \.safetensors file, and 'out\.ckpt' was given"):
        export(tiny_model, edit, "lora", tmp_path / "out.ckpt")
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"
    export(tiny_model, edit, "lora", file)
    export(tiny_model, edit, "diffusers", folder)
    for kind, path in (("lora", file), ("diffusers", folder)):
        with pytest.raises(EffaceError, match="overwrite"):
            export(tiny_model, edit, kind, path)
        export(tiny_model, edit, kind, path, overwrite=True)
    with pytest.raises(EffaceError, match="is a file"):
        export(tiny_model, edit, "diffusers", file, overwrite=True)
    (folder / RECORD).unlink()
    with pytest.raises(EffaceError, match="no export wrote"):
        export(tiny_model, edit, "diffusers", folder, overwrite=True)


def test_another_model_and_attached_edits_are_refused(tiny_model, tiny_v_model, tmp_path):
    edit = keys_and_values(tiny_model)
    with pytest.raises(Mismatch, match="other weights"):
        export(tiny_v_model, edit, "lora", tmp_path / "out.safetensors")
    with edit.attach(tiny_model), pytest.raises(Overlap, match="detach them before an export"):
        export(tiny_model, edit, "lora", tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
    export(tiny_v_model, edit, "lora", tmp_path / "out.safetensors", match="family")


def test_a_failure_leaves_nothing_behind(tiny_model, tmp_path, monkeypatch):
    edit = keys_and_values(tiny_model)
    weights = [id(p) for p in tiny_model.pipeline.unet.parameters()]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_model.pipeline.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export(tiny_model, edit, "diffusers", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert [id(p) for p in tiny_model.pipeline.unet.parameters()] == weights


# -- prove ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_tells_a_right_export_from_a_wrong_one(tiny_model, kind, tmp_path):
    edit = every_map(tiny_model)
    made = export(tiny_model, edit, kind, target(kind, tmp_path), **whole(kind))
    bar = copy.copy(vars(tiny_model.pipeline).get("_progress_bar_config"))
    assert prove(tiny_model, edit, made) < SAME
    assert prove(tiny_model, keys_and_values(tiny_model), made) > 0.02  # the control: another edit was written
    assert vars(tiny_model.pipeline).get("_progress_bar_config") == bar
    assert not any("lora" in name for name, _ in tiny_model.pipeline.unet.named_modules())


def test_a_zero_change_cannot_be_attached_and_is_no_lora(tiny_model, tmp_path):
    edit = WeightEdit({f"{BLOCK}.attn2.to_k.weight": torch.zeros(16, 32)}, card(tiny_model))
    with pytest.raises(NoEffect), edit.attach(tiny_model):
        pass
    with pytest.raises(Unsupported, match="this edit has none"):
        export(tiny_model, edit, "lora", tmp_path / "out.safetensors")


def test_a_live_pipeline_will_do(tiny_model, tmp_path):
    edit = every_map(tiny_model)
    for kind, name in (("diffusers", "folder"), ("delta", "delta.safetensors")):
        assert export(tiny.pipeline(), edit, kind, tmp_path / name).error == pytest.approx(0, abs=1e-5)

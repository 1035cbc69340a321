"""Imports: what others wrote acts as an edit exactly as it acts in plain diffusers, and what does not fit is named."""

import json

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from models import compvis
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from efface.core.card import Card
from efface.core.edit import LowRankEdit, WeightEdit
from efface.core.errors import InvalidEdit, InvalidModel, Mismatch, NoEffect, Unsupported
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.models import names
from efface.models.export import export
from efface.models.imports import import_edit
from efface.models.load import load
from efface.models.sd import StableDiffusion

SAME = 1e-4
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def drawn(pipeline):
    generators = [seeded(i) for i in (3, 4)]
    return pipeline(["a cat", "a dog"], num_inference_steps=3, guidance_scale=4.0, generator=generators, output_type="pt").images


def attached(model, edit):
    with edit.attach(model):
        return drawn(model.pipeline)


def apart(a, b):
    return float((a - b).abs().max())


def every_map(model):
    g = seeded(0)
    slots = model.slots([f"{name}.weight" for name in names.maps(model)])
    deltas = {n: 0.2 * s.tensor.detach().std() * torch.randn(s.tensor.shape, generator=g) for n, s in slots.items()}
    return WeightEdit(deltas, Card.of(model, method="noop", task=Task.of("cat"), seed=0))


def factors(seed=1):
    g = seeded(seed)
    return torch.randn(3, tiny.WIDTH, generator=g), 0.1 * torch.randn(16, 3, generator=g)


def saved(tensors, path, metadata=None):
    save_file(tensors, path, metadata)
    return path


# -- LoRA ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["lora", "kohya", "delta"])
def test_an_export_comes_back_with_its_card(tiny_model, kind, tmp_path):
    edit = every_map(tiny_model)
    options = {} if kind == "delta" else {"energy": 1.0}
    again = import_edit(tiny_model, export(tiny_model, edit, kind, tmp_path / "out.safetensors", **options).path)
    assert type(again) is (WeightEdit if kind == "delta" else LowRankEdit)
    assert again.card == edit.card
    assert apart(attached(tiny_model, again), attached(tiny_model, edit)) < SAME
    assert apart(attached(tiny_model, again), drawn(tiny_model.pipeline)) > 0.02


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_trained_with_peft_acts_as_in_diffusers(tiny_model, rslora, tmp_path):
    """With alpha unlike the rank, which only the header says, and both networks."""
    pipeline, config = tiny.pipeline(), {"r": 3, "lora_alpha": 12, "init_lora_weights": False, "use_rslora": rslora}
    unet = LoraConfig(target_modules=["to_k", "to_q", "conv1", "proj_in"], **config)
    text = LoraConfig(target_modules=["q_proj", "fc1"], **config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.unet.add_adapter(unet)
        pipeline.text_encoder.add_adapter(text)
    for network in (pipeline.unet, pipeline.text_encoder):
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(0.1)
    with torch.no_grad():
        expected = drawn(pipeline)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        unet_lora_adapter_metadata=unet.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    edit = import_edit(tiny_model, tmp_path / "pytorch_lora_weights.safetensors", task="cat")
    assert apart(attached(tiny_model, edit), expected) < SAME
    assert apart(expected, drawn(tiny_model.pipeline)) > 0.02
    assert (edit.card.task, edit.card.probes, edit.card.model) == ("cat", ("cat",), "tiny")
    assert edit.card.method == "imported(source='pytorch_lora_weights.safetensors')"
    assert import_edit(tiny_model, tmp_path).names == edit.names  # the folder, too


def test_a_peft_folder_takes_alpha_from_its_config(tiny_model, tmp_path):
    down, up = factors()
    save_file(
        {f"base_model.model.{KEY}.lora_A.weight": down, f"base_model.model.{KEY}.lora_B.weight": up}, tmp_path / "adapter_model.safetensors"
    )
    config = {"r": 3, "lora_alpha": 6, "alpha_pattern": {"attn2.to_k": 9}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    edit = import_edit(tiny_model, tmp_path)
    assert torch.allclose(edit.deltas(tiny_model)[f"unet.{KEY}.weight"], 3 * up @ down, atol=1e-5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"attn1.to_k": 9}}))
    assert torch.allclose(import_edit(tiny_model, tmp_path).deltas(tiny_model)[f"unet.{KEY}.weight"], 2 * up @ down, atol=1e-5)


@pytest.mark.parametrize(("alpha", "share"), [(None, 1.0), (3.0, 1.0), (1.0, 1 / 3), (12.0, 4.0)])
def test_kohyas_alpha_over_rank_is_the_scale(tiny_model, alpha, share, tmp_path):
    down, up = factors()
    tensors = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up}
    path = saved(tensors if alpha is None else {**tensors, f"{KOHYA}.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
    for scale in (1.0, -0.5):
        edit = import_edit(tiny_model, path, scale=scale)
        assert torch.allclose(edit.deltas(tiny_model)[f"unet.{KEY}.weight"], scale * share * up @ down, atol=1e-5)
    pipeline = tiny.pipeline()
    pipeline.load_lora_weights(str(path))
    assert apart(attached(tiny_model, import_edit(tiny_model, path)), drawn(pipeline)) < SAME


def test_the_older_spellings_of_diffusers_are_read(tiny_model, tmp_path):
    edit = every_map(tiny_model)
    kohya = load_file(export(tiny_model, edit, "kohya", tmp_path / "kohya.safetensors", energy=1.0).path)
    alpha = next(float(t) for key, t in kohya.items() if key.endswith(".alpha"))
    for key in kohya:
        if key.endswith("lora_up.weight"):  # the older files know no alpha
            kohya[key] *= alpha / kohya[key].shape[1]
    older, _ = _convert_non_diffusers_lora_to_diffusers(kohya)
    assert {"processor", "to_q_lora", "lora_linear_layer"} <= {part for key in older for part in key.split(".")}
    again = import_edit(tiny_model, saved({key: t.contiguous() for key, t in older.items()}, tmp_path / "older.safetensors"))
    assert again.names == edit.names
    assert apart(attached(tiny_model, again), attached(tiny_model, edit)) < SAME


# -- weights -------------------------------------------------------------------------------------------------------------
def test_a_state_dict_of_trained_parameters_is_a_difference(tiny_model, tmp_path):
    """As the newer ESD scripts save: some tensors of the UNet, under its own names."""
    other = tiny.pipeline().unet
    trained = {n: p.detach() + 0.1 for n, p in other.named_parameters() if "attn2" in n}
    still = {n: p.detach() for n, p in other.named_parameters() if "attn1" in n}
    edit = import_edit(tiny_model, saved({**trained, **still}, tmp_path / "esd-x.safetensors"), task="cat")
    assert edit.names == {f"unet.{name}" for name in trained}
    assert all(torch.allclose(delta, torch.tensor(0.1), atol=1e-6) for delta in edit.deltas.values())
    pipeline = tiny.pipeline()
    pipeline.unet.load_state_dict(trained, strict=False)
    assert apart(attached(tiny_model, edit), drawn(pipeline)) < SAME
    assert apart(drawn(pipeline), drawn(tiny_model.pipeline)) > 0.02


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
@pytest.mark.parametrize("form", ["flat", "state_dict", "networks"])
def test_a_state_dict_that_torch_saved(tiny_model, suffix, form, tmp_path):
    """As the older ESD and UCE scripts save, and Concept Ablation's by network."""
    trained = {f"{KEY}.weight": tiny_model.pipeline.unet.get_parameter(f"{KEY}.weight").detach() + 0.1}
    content = {"flat": trained, "state_dict": {"state_dict": trained}, "networks": {"unet": trained, "modifier_token": {}}}[form]
    torch.save(content, tmp_path / f"esd.{suffix}")
    edit = import_edit(tiny_model, tmp_path / f"esd.{suffix}", task="cat")
    assert edit.names == {f"unet.{KEY}.weight"}
    assert torch.allclose(edit.deltas[f"unet.{KEY}.weight"], torch.tensor(0.1), atol=1e-6)
    assert edit.card.method == f"imported(source='esd.{suffix}')"


def test_a_lora_that_torch_saved(tiny_model, tmp_path):
    down, up = factors()
    torch.save({f"unet.{KEY}.lora_A.weight": down, f"unet.{KEY}.lora_B.weight": up}, tmp_path / "pytorch_lora_weights.bin")
    edit = import_edit(tiny_model, tmp_path / "pytorch_lora_weights.bin")
    assert torch.allclose(edit.deltas(tiny_model)[f"unet.{KEY}.weight"], up @ down)


class Trap:
    """An object whose pickle writes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_code_of_a_pickle_runs(tiny_model, tmp_path):
    torch.save({f"{KEY}.weight": Trap(str(tmp_path / "sprung"))}, tmp_path / "esd.pt")
    with pytest.raises(InvalidEdit, match=r"without running its code .*convert it to \.safetensors"):
        import_edit(tiny_model, tmp_path / "esd.pt")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "esd.pt", weights_only=False)[f"{KEY}.weight"].close()  # the control: the trap works
    assert (tmp_path / "sprung").exists()


def test_what_torch_saved_and_is_no_state_dict(tiny_model, tmp_path):
    path = tmp_path / "esd.pt"
    path.write_bytes(b"half")
    with pytest.raises(InvalidEdit, match="no state dict that can be read"):
        import_edit(tiny_model, path)
    for content, message in (({"epoch": 3}, "an? int under 'epoch'"), (DOWN, "which .* does not have"), ([DOWN], "list under ''")):
        torch.save(content, path)
        with pytest.raises((InvalidEdit, Mismatch), match=message):
            import_edit(tiny_model, path)


def test_a_checkpoint_in_compvis_format_is_a_difference(tiny_model, tmp_path):
    pipeline = tiny.pipeline()
    pipeline.save_pretrained(tmp_path / "config")
    pipeline.unet.conv_in.weight.data += 0.05
    pipeline.text_encoder.encoder.layers[0].mlp.fc1.weight.data += 0.05
    file = compvis.save(pipeline, tmp_path / "erased.safetensors")
    edit = import_edit(tiny_model, file, config=tmp_path / "config")
    assert edit.names == {"unet.conv_in.weight", "text_encoder.encoder.layers.0.mlp.fc1.weight"}
    assert edit.card.method == "imported(source='erased.safetensors')"
    assert apart(attached(tiny_model, edit), drawn(pipeline)) < SAME


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_in_half_precision_differs_by_more_than_rounding(tiny_model, dtype, tmp_path):
    pipeline = tiny.pipeline()
    pipeline.unet.conv_in.bias.data += 1
    pipeline.to(dtype=dtype).save_pretrained(tmp_path)
    assert import_edit(tiny_model, tmp_path).names == {"unet.conv_in.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_alone_is_no_difference(tiny_model, dtype, tmp_path):
    state = {n: p.detach().to(dtype) for n, p in tiny.pipeline().unet.named_parameters()}
    assert any(not torch.equal(p.float(), tiny_model.pipeline.unet.get_parameter(n)) for n, p in state.items())  # the control
    state["conv_in.bias"] += 1
    edit = import_edit(tiny_model, saved(state, tmp_path / "unet.safetensors"))
    assert edit.names == {"unet.conv_in.bias"}
    half = StableDiffusion(tiny.pipeline().to(dtype=dtype), id="half")
    whole = {n: p.detach() for n, p in tiny.pipeline().unet.named_parameters()}
    whole["conv_in.bias"] = whole["conv_in.bias"] + 1
    assert import_edit(half, saved(whole, tmp_path / "whole.safetensors")).names == {"unet.conv_in.bias"}


@pytest.mark.parametrize("how", ["folder", "component", "model", "shards"])
def test_an_erased_pipeline_is_a_difference(tiny_model, how, tmp_path):
    pipeline = tiny.pipeline()
    pipeline.unet.conv_in.weight.data += 0.05
    if how != "component" and how != "shards":
        pipeline.text_encoder.encoder.layers[0].mlp.fc1.weight.data += 0.05
    expected = drawn(pipeline)
    if how == "shards":
        pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
        assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    else:
        pipeline.save_pretrained(tmp_path)
    source = {"folder": tmp_path, "component": tmp_path / "unet", "shards": tmp_path / "unet", "model": StableDiffusion(pipeline)}[how]
    edit = import_edit(tiny_model, source)
    text = set() if how in ("component", "shards") else {"text_encoder.encoder.layers.0.mlp.fc1.weight"}
    assert edit.names == {"unet.conv_in.weight"} | text
    assert apart(attached(tiny_model, edit), expected) < SAME
    assert apart(expected, drawn(tiny_model.pipeline)) > 0.01


@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_differences_are_those_of_float32_whatever_models_are_loaded_in(tiny_model, source, tmp_path, monkeypatch):
    """On CUDA a model comes in bfloat16 by default, which rounds small changes away."""
    monkeypatch.setitem(load.__globals__, "default_dtype", lambda device: torch.bfloat16)
    path, name, changed = tmp_path / "erased", f"{KEY}.weight", tiny.pipeline()
    weight = changed.unet.get_parameter(name)
    delta = 1e-3 * torch.randn(weight.shape, generator=seeded(5))
    with torch.no_grad():
        weight.add_(delta)
    changed.save_pretrained(path)
    if source == "checkpoint":
        file = compvis.save(changed, tmp_path / "erased.safetensors")
        for weights in path.glob("**/*.safetensors"):
            weights.unlink()
        edit = import_edit(tiny_model, file, config=path)
    else:
        assert load(path).dtype == torch.bfloat16
        edit = import_edit(tiny_model, path)
    assert edit.names == {f"unet.{name}"}
    assert (edit.deltas[f"unet.{name}"] - delta).norm() < 1e-3 * delta.norm()


def test_live_pipelines_will_do(tiny_model):
    other = tiny.pipeline(seed=5)
    expected = import_edit(tiny_model, StableDiffusion(other)).deltas
    found = import_edit(tiny.pipeline(), other).deltas
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())


def test_an_imported_edit_is_saved_and_bound_to_its_model(tiny_model, tiny_v_model, tmp_path):
    down, up = factors()
    path = saved({f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up}, tmp_path / "a.safetensors")
    edit = import_edit(tiny_model, path)
    again = import_edit(tiny_model, edit.save(tmp_path / "edit.safetensors"))
    assert apart(attached(tiny_model, again), attached(tiny_model, edit)) == 0
    with pytest.raises(Mismatch), edit.attach(tiny_v_model):
        pass


# -- what does not fit ---------------------------------------------------------------------------------------------------
DOWN, UP = factors()
BAD = {
    "an unknown map": (
        {f"unet.{KEY}x.lora_A.weight": DOWN, f"unet.{KEY}x.lora_B.weight": UP},
        Mismatch,
        rf"which tiny \(sd1\) does not have; the nearest name here is 'unet.{KEY}'",
    ),
    "an unknown kohya name": (
        {f"{KOHYA}_9.lora_down.weight": DOWN, f"{KOHYA}_9.lora_up.weight": UP},
        Mismatch,
        f"nearest name here is '{KOHYA}'",
    ),
    "an unknown parameter": ({f"{KEY}.wait": DOWN}, Mismatch, f"nearest name here is '{KEY}.weight'"),
    "a wrong width": (
        {f"{KOHYA}.lora_down.weight": DOWN[:, :5].clone(), f"{KOHYA}.lora_up.weight": UP},
        Mismatch,
        r"\(16, 5\).*\(16, 32\)",
    ),
    "a wrong shape": ({f"{KEY}.weight": DOWN}, Mismatch, r"\(3, 32\).*\(16, 32\)"),
    "one factor": ({f"{KOHYA}.lora_down.weight": DOWN}, InvalidEdit, "only one factor"),
    "DoRA": ({f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.dora_scale": UP}, Unsupported, "DoRA.*import that folder"),
    "something else": ({f"{KOHYA}.lora_down.weight": DOWN, "more": UP}, InvalidEdit, "'more' among the factors"),
    "a part of CompVis' format": ({"model.diffusion_model.out.2.weight": DOWN}, InvalidModel, "no checkpoint of Stable Diffusion"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(tiny_model, case, tmp_path):
    tensors, error, message = BAD[case]
    with pytest.raises(error, match=message):
        import_edit(tiny_model, saved(tensors, tmp_path / "a.safetensors"))


def test_files_that_are_none(tiny_model, tmp_path):
    with pytest.raises(InvalidEdit, match="there is no file or folder"):
        import_edit(tiny_model, tmp_path / "none.safetensors")
    (tmp_path / "esd.ckpt").touch()
    with pytest.raises(InvalidModel, match="pickle"):
        import_edit(tiny_model, tmp_path / "esd.ckpt")
    with pytest.raises(InvalidEdit, match=r"holds no \.safetensors file"):
        import_edit(tiny_model, tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"half")
    with pytest.raises(InvalidEdit, match="corrupt or truncated"):
        import_edit(tiny_model, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(InvalidEdit, match="several files"):
        import_edit(tiny_model, tmp_path)
    saved({"a": DOWN}, tmp_path / "a.safetensors", {"efface": "{"})
    with pytest.raises(InvalidEdit, match="no JSON object"):
        import_edit(tiny_model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="scale was nan"):
        import_edit(tiny_model, tmp_path / "a.safetensors", scale=float("nan"))


def test_the_models_own_weights_are_no_edit(tiny_model, tmp_path):
    tiny_model.pipeline.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "unet", load(tmp_path)):
        with pytest.raises(NoEffect, match="the very weights"):
            import_edit(tiny_model, source)


def test_a_pipeline_of_another_shape_is_refused(tiny_model):
    other = tiny.pipeline()
    other.unet.conv_norm_out = torch.nn.Identity()
    with pytest.raises(Mismatch, match=r"unet\.conv_norm_out\.bias is in tiny and not in other"):
        import_edit(tiny_model, StableDiffusion(other, id="other"))

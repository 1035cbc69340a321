"""Live pipelines whose networks others have wrapped: used where that is possible, and otherwise refused with what to do."""

import pytest
import tiny
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from peft import LoraConfig

from efface.core.errors import InvalidModel
from efface.core.method import Resources
from efface.core.task import Task
from efface.methods.esd import ESD
from efface.models.export import export
from efface.models.load import load

LORA = {"unet": LoraConfig(r=2, target_modules=["to_k"]), "text_encoder": LoraConfig(r=2, target_modules=["q_proj"])}


@pytest.mark.parametrize("network", LORA)
@pytest.mark.parametrize("fused", [False, True])
def test_layers_of_a_lora_are_refused_until_they_are_unloaded(network, fused):
    pipe = tiny.pipeline()
    getattr(pipe, network).add_adapter(LORA[network])
    if fused:
        pipe.fuse_lora(components=[network])
    with pytest.raises(InvalidModel, match=rf"{network} holds layers of a LoRA.*unload_lora_weights\(\) first, after pipe\.fuse_lora"):
        load(pipe)
    pipe.unload_lora_weights()
    assert load(pipe).groups == load(tiny.pipeline()).groups


def test_hooks_that_move_weights_are_refused_until_they_are_removed():
    pipe = tiny.pipeline()
    add_hook_to_module(pipe.vae, CpuOffload("cpu"))
    with pytest.raises(InvalidModel, match=r"vae has hooks of accelerate's.*remove_all_hooks\(\) and pipe\.to\(device\)"):
        load(pipe)
    pipe.remove_all_hooks()
    load(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(InvalidModel, match=r"unet is offloaded in groups, or cast.*without enable_group_offload"):
        load(pipe)


def test_code_that_was_compiled_in_place_is_refused():
    pipe = tiny.pipeline()
    pipe.unet.mid_block.compile(backend="eager")
    with pytest.raises(InvalidModel, match=r"unet was compiled in place.*without \.compile\(\)"):
        load(pipe)


def test_a_compiled_network_is_the_one_inside(tmp_path):
    """Names, groups, fits, pictures and files are those of the pipeline that was not compiled."""
    plain, pipe = tiny.pipeline(), tiny.pipeline()
    for network in ("unet", "text_encoder", "vae"):
        setattr(pipe, network, torch.compile(getattr(pipe, network), backend="eager"))
    assert any(name.startswith("_orig_mod.") for name, _ in pipe.unet.named_parameters())  # what every name would begin with
    model, expected = load(pipe), load(plain)
    assert model.select("xattn").keys() == expected.select("xattn").keys()
    method = ESD(steps=1, batch=1, latent_steps=2)
    edit, other = (method.fit(m, Task.of("cat"), seed=0, resources=Resources()) for m in (model, expected))
    assert all(torch.equal(edit.deltas[name], delta) for name, delta in other.deltas.items())
    with edit.attach(model), other.attach(expected):
        assert torch.equal(model.sample(["cat"], steps=2), expected.sample(["cat"], steps=2))
    export(model, edit, "diffusers", tmp_path / "folder")
    edit.bake(model)
    again = load(tmp_path / "folder", device="cpu")
    assert all(torch.equal(s.tensor, again.select("full")[n].tensor) for n, s in model.select("full").items())

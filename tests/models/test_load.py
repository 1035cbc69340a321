"""Every source that a model can come from, and what is said where it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from models import compvis
from safetensors.torch import save_file

from efface.core.errors import InvalidModel
from efface.models import sniff
from efface.models.load import BUNDLED, Settings, load
from efface.models.quiet import quiet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    with quiet():
        tiny.pipeline().save_pretrained(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "tiny"))


# -- what loads ----------------------------------------------------------------------------------------------------------
def test_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (model.id, model.family, model.dtype, model.lr_scale) == (str(folder), "sd1", torch.float32, 1.0)
    assert torch.equal(model.sample("a cat", steps=2), load(tiny.pipeline()).sample("a cat", steps=2))
    assert not any(p.requires_grad for network in model.components.values() for p in network.parameters())
    assert not any(network.training for network in model.components.values())


def test_a_live_pipeline_is_used_as_it_is() -> None:
    pipeline = tiny.pipeline()
    pipeline.unet.train()
    model = load(pipeline)
    assert model.pipeline is pipeline
    assert model.denoiser is pipeline.unet
    assert pipeline.unet.training and next(pipeline.unet.parameters()).requires_grad
    assert load(pipeline, dtype="bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("open_clip", [False, True], ids=["clip", "open_clip"])
def test_a_single_file(folder: Path, copied: Path, tmp_path: Path, open_clip: bool) -> None:
    for weights in copied.glob("**/*.safetensors"):
        weights.unlink()
    file = compvis.save(tiny.pipeline(), tmp_path / "tiny.safetensors", open_clip=open_clip)
    model, expected = load(file, config=copied, device="cpu"), load(folder, device="cpu")
    for name, network in expected.components.items():
        assert all(torch.equal(tensor, model.components[name].state_dict()[key]) for key, tensor in network.state_dict().items())
    assert torch.equal(model.sample("a cat", steps=2), expected.sample("a cat", steps=2))
    other = load(file, config=copied, tokenizer=copied / "tokenizer", device="cpu")
    assert other.words() == expected.words()


@pytest.mark.parametrize(("text", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)])
def test_every_network_is_brought_to_one_precision(folder: Path, text: str | torch.dtype, dtype: torch.dtype) -> None:
    model = load(folder, dtype=text, device="cpu")
    assert {p.dtype for network in model.components.values() for p in network.parameters()} == {dtype}


def test_weights_stored_in_half_precision_come_in_float32_on_the_cpu(tmp_path: Path) -> None:
    with quiet():
        tiny.pipeline().to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    model = load(tmp_path / "half", device="cpu")
    assert {p.dtype for network in model.components.values() for p in network.parameters()} == {torch.float32}
    assert torch.isfinite(model.sample("a cat", steps=2)).all()


def test_a_model_brings_its_own_defaults(copied: Path) -> None:
    (copied / "efface.json").write_text('{"lr_scale": 50.0, "steps": 3, "guidance": 4}')
    model = load(copied, device="cpu")
    assert (model.lr_scale, model.default_steps, model.default_guidance) == (50.0, 3, 4)
    assert Settings.read(copied.parent) == Settings(lr_scale=1.0, steps=50, guidance=7.5)


def test_a_live_pipeline_has_the_defaults_of_its_folder(copied: Path) -> None:
    live = {}
    for name in ("without", "with"):
        with quiet():
            live[name] = StableDiffusionPipeline.from_pretrained(str(copied), safety_checker=None, requires_safety_checker=False)
        if name == "without":
            assert load(live[name]).default_steps == 50
            (copied / "efface.json").write_text('{"lr_scale": 50.0, "steps": 3, "guidance": 4}')
    model = load(live["with"])
    assert (model.id, model.lr_scale, model.default_steps, model.default_guidance) == (str(copied), 50.0, 3, 4)


# -- what is refused -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 3}', "unknown key 'step'; did you mean 'steps'"),
        ('{"steps": 2.5}', "steps as 2.5; expected an integer"),
        ('{"steps": "20"}', "steps as '20'; expected a finite number"),
        ('{"lr_scale": 0}', "lr_scale as 0; expected a number above 0"),
        ('{"guidance": NaN}', "guidance as nan"),
        ("[1]", "holds a list; expected a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_wrong_defaults_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "efface.json").write_text(text)
    with pytest.raises(InvalidModel, match=message):
        Settings.read(tmp_path)


def test_a_folder_that_is_no_pipeline(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"no model_index\.json.*save_pretrained"):
        load(tmp_path)
    with pytest.raises(InvalidModel, match="one component of a pipeline; give the folder above"):
        load(folder / "unet")
    with pytest.raises(InvalidModel, match="There is one below it: tiny"):
        load(folder.parent)


def test_a_pipeline_of_another_class(copied: Path) -> None:
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(InvalidModel, match=r"is a StableDiffusionXLPipeline.*Supported: StableDiffusionPipeline"):
        load(copied)
    parts = tiny.pipeline().components
    with pytest.raises(InvalidModel, match="StableDiffusionImg2ImgPipeline, which is not supported"):
        load(StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))
    with pytest.raises(InvalidModel, match="a path, a Hub id or a diffusers pipeline, and got a UNet2DConditionModel"):
        load(parts["unet"])


def test_a_pipeline_with_missing_or_pickled_or_damaged_weights(copied: Path) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidModel, match="cannot be loaded"):
        load(copied, device="cpu")
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(InvalidModel, match=r"must be \.safetensors \(pickles are refused\)"):
        load(copied, device="cpu")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"anything")
    with pytest.raises(InvalidModel, match=r"pickle, which can run any code.*convert it to \.safetensors"):
        load(path)


def test_a_missing_path_names_the_nearest(folder: Path) -> None:
    with pytest.raises(InvalidModel, match=r"there is no '.*tinny'; did you mean '.*tiny'"):
        load(folder.parent / "tinny")
    with pytest.raises(InvalidModel, match="did you mean 'emoji'"):
        load("emojji")


def test_the_bundled_model_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: Path) -> None:
    assert BUNDLED["emoji"].parts[-4:] == ("efface", "world", "weights", "emoji")
    monkeypatch.setitem(BUNDLED, "emoji", tmp_path / "nowhere")
    with pytest.raises(InvalidModel, match=r"bundled model 'emoji' is not there.*efface world train"):
        load("emoji")
    monkeypatch.setitem(BUNDLED, "emoji", copied)
    (copied / "efface.json").write_text('{"lr_scale": 50.0}')
    assert (load("emoji").id, load("emoji").lr_scale) == ("emoji", 50.0)


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(InvalidModel, match=r"'nobody/nothing' is no path here, and the Hub did not give it.*`token`.*give its folder"):
        load("nobody/nothing", local_files_only=True)


def test_an_unknown_precision(folder: Path) -> None:
    with pytest.raises(InvalidModel, match="unknown dtype 'fp61'; did you mean 'fp16'"):
        load(folder, dtype="fp61")


# -- single files, told apart by their tensors ---------------------------------------------------------------------------
def checkpoint(path: Path, width: int = 768, channels: int = 4) -> Path:
    names = {sniff.TEXT_KEY: (320, width), f"{sniff.UNET}input_blocks.0.0.weight": (320, channels, 3, 3)}
    save_file({name: torch.zeros(shape, dtype=torch.uint8) for name, shape in names.items()}, path)
    return path


def test_checkpoints_are_told_apart(tmp_path: Path) -> None:
    assert sniff.checkpoint_config(checkpoint(tmp_path / "1.safetensors")) == "sd1"
    second = checkpoint(tmp_path / "2.safetensors", width=1024)
    assert sniff.checkpoint_config(second) == "sd2"
    with pytest.raises(InvalidModel, match=r"config='sd2' for noise.*config='sd2-v' for velocity"):
        load(second)
    with pytest.raises(InvalidModel, match="text width of sd2, and config='sd1' was given"):
        load(second, config="sd1")
    with pytest.raises(InvalidModel, match="cannot be loaded with the config 'sd1'"):
        load(tmp_path / "1.safetensors")
    with pytest.raises(InvalidModel, match="reads 9 channels"):
        load(checkpoint(tmp_path / "3.safetensors", channels=9))


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("conditioner.embedders.0.transformer.x", "Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("double_blocks.0.x", "FLUX"),
        ("lora_unet_down_blocks_0", "a LoRA"),
        ("anything.weight", "something else, with 1 tensors such as anything.weight"),
    ],
)
def test_other_files_are_named(tmp_path: Path, key: str, what: str) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidModel, match=f"it looks like {what}"):
        load(tmp_path / "x.safetensors")


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a header at all")
    with pytest.raises(InvalidModel, match="no readable safetensors file"):
        load(path)
    path.rename(tmp_path / "x.txt")
    with pytest.raises(InvalidModel, match=r"no \.safetensors checkpoint"):
        load(tmp_path / "x.txt")


def test_a_wrong_config_or_tokenizer_folder(folder: Path, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "1.safetensors")
    with pytest.raises(InvalidModel, match="is no diffusers pipeline"):
        load(file, config=tmp_path)
    with pytest.raises(InvalidModel, match="holds no CLIP tokenizer"):
        load(file, tokenizer=tmp_path / "nowhere")


def test_silence_ends_where_it_began() -> None:
    from diffusers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_rate_is_the_models_own_inside_and_outside_the_cross_attention(copied: Path) -> None:
    (copied / "efface.json").write_text('{"lr_scale": 50.0, "lr_scale_others": 5.0}')
    model = load(copied)
    assert [model.learning_rate(1e-5, group) for group in ("xattn", "text_kv")] == [5e-4, 5e-4]
    assert [model.learning_rate(1e-5, *groups) for groups in (("noxattn",), ("full",), ("text_kv", "selfattn"))] == [5e-5, 5e-5, 5e-5]
    (copied / "efface.json").write_text('{"lr_scale": 50.0}')
    assert load(copied).learning_rate(1e-5, "full") == 5e-4

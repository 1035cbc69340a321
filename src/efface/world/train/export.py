"""From a training folder to the folder of committed weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from efface.core.whole import whole_folder
from efface.world import captions
from efface.world.clip import load_tower, save_text_encoder, save_tower
from efface.world.judge import Judge
from efface.world.train import clip, unet, vae
from efface.world.train.loop import checkpoint_path

NEEDED = {
    "clip": ("tokenizer/tokenizer.json", "text_encoder/model.safetensors", "clip/model.safetensors"),
    "vae": ("vae/config.json",),
    "unet": ("unet/config.json",),
    "judge": ("judge.safetensors",),
}
"""What each stage leaves in the training folder."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
SETTINGS = {"lr_scale": 50.0, "lr_scale_others": 5.0, "steps": 20, "guidance": 4.0}
"""The model's own defaults, which `efface.load` reads from `efface.json`. `lr_scale`: the rates of Stable Diffusion 1.x, 1e-5 and the
like, are some fifty times too small for the cross-attention of so small a network (tried with AP: 5e-4 erases, 1e-4 falls short), and
some five times where the other layers are trained (`lr_scale_others`; tried with ESD: 5e-5 erases, 5e-4 destroys)."""
CREDITS = Path(__file__).parents[1] / "CREDITS.md"


def require(folder: Path, stages: tuple[str, ...]) -> None:
    """Raises FileNotFoundError naming each stage whose results are missing."""
    missing = [stage for stage in stages if not all((folder / name).is_file() for name in NEEDED[stage])]
    if missing:
        commands = " && ".join(f"efface world train {stage}" for stage in missing)
        raise FileNotFoundError(f"{folder} lacks the results of: {', '.join(missing)}; train them first: {commands}")


def write(folder: Path, out: Path) -> Path:
    """See `efface.world.train.export`."""
    require(folder, tuple(NEEDED))
    denoiser = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    with whole_folder(out) as temporary:
        pipeline(folder, denoiser, temporary / "emoji")
        save_tower(load_tower(folder / "clip"), temporary / "clip", torch.float16)
        Judge.load(folder / "judge.safetensors").save(temporary / "judge.safetensors", torch.float16)
        shutil.copy(CREDITS, temporary / "CREDITS.md")
    return out


def preview(folder: Path, out: Path) -> Path:
    """See `efface.world.train.preview`."""
    require(folder, ("clip", "vae"))
    path = checkpoint_path(folder, "unet")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint of the denoiser at {path}; start its training: efface world train unet")
    average = torch.load(path, map_location="cpu", weights_only=True)["average"]
    denoiser = unet.architecture(0, latent=vae.load(folder, torch.device("cpu")).config.latent_channels)
    denoiser.load_state_dict({key.removeprefix("unet."): value for key, value in average.items()})
    with whole_folder(out) as temporary:
        pipeline(folder, denoiser, temporary)
    return out


def pipeline(folder: Path, denoiser: UNet2DConditionModel, out: Path) -> None:
    """Writes the diffusers folder: tokenizer with its four files and whole words, prefixed float32 text encoder, the rest in float16."""
    tokens, text = clip.load(folder, torch.device("cpu"))
    StableDiffusionPipeline(
        vae=vae.load(folder, torch.device("cpu")).half(),
        text_encoder=text,
        tokenizer=tokens,
        unet=denoiser.half(),
        scheduler=unet.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    save_text_encoder(text, out / "text_encoder")
    (out / "efface.json").write_text(json.dumps(SETTINGS) + "\n", encoding="utf-8")
    for name in TOKENIZER:
        shutil.copy(folder / "tokenizer" / name, out / "tokenizer" / name)
    (out / "tokenizer" / "words.txt").write_text("\n".join(captions.words()) + "\n", encoding="utf-8")
    state = load_file(out / "text_encoder" / "model.safetensors")
    if any(value.dtype != torch.float32 for value in state.values()):
        raise ValueError("the text encoder must be stored in float32, or a plain from_pretrained mixes dtypes; train clip again")

"""The proof of an export: what was written is loaded by plain diffusers, and must draw the pictures of the attached edit."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from efface.core.card import Match
from efface.core.edit import Edit
from efface.core.errors import MissingExtra, Unsupported
from efface.core.model import Model
from efface.models.export import Export
from efface.models.load import UNCHECKED
from efface.models.quiet import quiet

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from efface.models.sd import StableDiffusion


def prove(
    model: Model, edit: Edit, made: Export, *, prompt: str | None = None, seed: int = 0, steps: int = 4, match: Match = "exact"
) -> float:
    """The largest difference of a pixel, 0 to 1, between two pictures of one seed: drawn by the pipeline of `model` with `edit` attached,
    and by plain diffusers from what `export` wrote. efface's own code has no part in the second.

    prompt: by default the first of the edit's card. Guidance is the model's own.
    Raises Unsupported (no diffusers pipeline), MissingExtra (LoRA files are loaded by peft)."""
    with quiet():
        from efface.models.sd import StableDiffusion
    if not isinstance(model, StableDiffusion):
        raise Unsupported(f"{model.id} is no Stable Diffusion pipeline, so there is nothing in plain diffusers to compare it with")
    text = prompt if prompt is not None else (edit.card.probes or ("",))[0]
    settings = {"num_inference_steps": steps, "guidance_scale": model.default_guidance}
    with edit.attach(model, match=match, check=False):
        expected = _draw(_again(model, ()), text, seed, settings)
    return float((_draw(_reloaded(model, made), text, seed, settings) - expected).abs().max())


def _draw(pipeline: StableDiffusionPipeline, text: str, seed: int, settings: dict[str, Any]) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(text, generator=torch.Generator().manual_seed(seed), output_type="pt", **settings).images
    return images.float().cpu()


def _reloaded(model: StableDiffusion, made: Export) -> StableDiffusionPipeline:
    """What a user of diffusers has after loading the file or folder."""
    pipeline = model.pipeline
    with quiet():
        if made.kind == "diffusers":
            found = type(pipeline).from_pretrained(str(made.path), local_files_only=True, **UNCHECKED)
            return found.to(pipeline.device, pipeline.dtype)
        fresh = _again(model, ("unet", "text_encoder", "vae"))
        if made.kind == "delta":
            _add(fresh, load_file(made.path))
        elif importlib.util.find_spec("peft") is None:
            raise MissingExtra("diffusers loads LoRA files by the package peft, which is not installed: pip install peft")
        else:
            fresh.load_lora_weights(str(made.path))
        return fresh


def _again(model: StableDiffusion, copied: tuple[str, ...]) -> StableDiffusionPipeline:
    """Another pipeline of the same parts, or of copies of some, so that settings and adapters do not reach the first."""
    pipeline: Any = model.pipeline
    whole = {**pipeline.components, **model.components}
    parts = {name: copy.deepcopy(part) if name in copied else part for name, part in whole.items()}
    return type(pipeline)(**parts, requires_safety_checker=pipeline.config.requires_safety_checker)


@torch.no_grad()
def _add(pipeline: StableDiffusionPipeline, deltas: Mapping[str, Tensor]) -> None:
    for name, delta in deltas.items():
        network, _, path = name.partition(".")
        weight = pipeline.components[network].get_parameter(path)
        weight.copy_(weight.float() + delta.to(weight.device))

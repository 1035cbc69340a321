"""What a path holds, found before anything is loaded: a pipeline folder, a checkpoint and of which family, or neither."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from efface.core.errors import InvalidModel

PIPELINES = ("StableDiffusionPipeline",)
"""The pipeline classes that efface reads."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
UNET = "model.diffusion_model."
TEXT_KEY = f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
"""A tensor that every CompVis checkpoint of Stable Diffusion 1.x and 2.x has; its second side is the width of the text."""
OTHERS = {
    "conditioner.embedders.": "Stable Diffusion XL",
    f"{UNET}joint_blocks.": "Stable Diffusion 3",
    f"{UNET}double_blocks.": "FLUX",
    "double_blocks.": "FLUX",
    "control_model.": "a ControlNet",
    "lora_unet_": "a LoRA",
    "first_stage_model.": "a VAE",
}
"""Key prefixes of what is no checkpoint of Stable Diffusion 1.x or 2.x, and what it is instead."""


def pipeline_class(folder: Path) -> str:
    """The class that a pipeline folder names. Raises InvalidModel: no `model_index.json`, or an unreadable one."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise InvalidModel(f"{folder} is no diffusers pipeline: it has no model_index.json. {_instead(folder)}")
    return str(read_json(index).get("_class_name", "nothing"))


def supported(name: str, source: object) -> None:
    """Raises InvalidModel unless efface reads pipelines of this class."""
    if name not in PIPELINES:
        raise InvalidModel(f"{source} is a {name}, which is not supported. Supported: {', '.join(PIPELINES)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InvalidModel for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, read from its header alone. Raises InvalidModel for a corrupt one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InvalidModel(f"{path} is no readable safetensors file ({error}); download it again") from error


def check_suffix(path: Path) -> None:
    """Raises InvalidModel for a pickle, and for any other file that is no `.safetensors`."""
    if path.suffix.lower() in PICKLES:
        raise InvalidModel(
            f"{path} is a pickle, which can run any code when it is opened; convert it to .safetensors where you trust its source "
            "(safetensors.torch.save_file of its state dict), or use a copy published as .safetensors"
        )
    if path.suffix.lower() != ".safetensors":
        raise InvalidModel(f"{path} is no .safetensors checkpoint; expected one, or a pipeline folder")


def checkpoint_config(path: Path) -> str:
    """Which of "sd1" and "sd2" a single-file checkpoint is, after its tensors.

    Raises InvalidModel: another model than Stable Diffusion 1.x or 2.x, an inpainting model, a corrupt file."""
    found = shapes(path)
    width = found.get(TEXT_KEY, (0, 0))[1]
    channels = found.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1]
    if width not in (768, 1024):
        raise InvalidModel(f"{path} is no checkpoint of Stable Diffusion 1.x or 2.x: it looks like {_likely(found)}")
    if channels != 4:
        raise InvalidModel(f"{path} reads {channels} channels (inpainting or depth); only text-to-image with 4 is supported")
    return "sd1" if width == 768 else "sd2"


def missing(source: str, names: tuple[str, ...]) -> InvalidModel:
    """The error for a path that does not exist: the nearest names, and what could be given."""
    expected = f"Give {', '.join(names)}, a pipeline folder, a .safetensors file, or a Hub id (owner/name)"
    return InvalidModel(f"there is no {source!r}; {near(source, names)}{expected}")


def near(source: str, names: tuple[str, ...]) -> str:
    """ "did you mean ...? " with names beside a missing path, or names of models, that are like it; "" without any."""
    parent = Path(source).expanduser().parent
    beside = [str(path) for path in parent.iterdir()] if parent.is_dir() else []
    found = difflib.get_close_matches(source, [*beside, *names], n=3, cutoff=0.7)
    return f"did you mean {' or '.join(repr(name) for name in found)}? " if found else ""


def _instead(folder: Path) -> str:
    """What a folder seems to be."""
    if (folder / "config.json").is_file():
        return "It is one component of a pipeline; give the folder above it"
    below = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    if below:
        return f"There is one below it: {', '.join(below)}"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return f"Give one of its files: {', '.join(files)}" if files else "Expected what StableDiffusionPipeline.save_pretrained writes"


def _likely(found: dict[str, tuple[int, ...]]) -> str:
    for prefix, name in OTHERS.items():
        if any(key.startswith(prefix) for key in found):
            return name
    return f"something else, with {len(found)} tensors such as {min(found, default='none')}"

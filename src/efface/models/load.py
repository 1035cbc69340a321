"""Loading a model from whatever holds one.

    load("emoji")                                the bundled model
    load("folder")                               what `save_pretrained` writes
    load("v1-5-pruned.safetensors")              one file in CompVis' format
    load("stable-diffusion-v1-5/stable-diffusion-v1-5")      a Hub id
    load(pipeline)                               a live StableDiffusionPipeline, which is used and not copied

A folder may hold `efface.json` with the model's own defaults: {"lr_scale": 50.0, "lr_scale_others": 5.0, "steps": 20, "guidance": 4.0}.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from efface.core.errors import InvalidModel, suggest
from efface.core.model import Model
from efface.models import sniff
from efface.models.clip import clip_tokenizer
from efface.models.quiet import quiet

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from efface.models.sd import StableDiffusion

BUNDLED = {"emoji": Path(__file__).parents[1] / "world" / "weights" / "emoji"}
"""The models that come with efface, by name."""
CONFIGS = Path(__file__).parent / "configs"
CONFIG_NAMES = ("sd1", "sd2", "sd2-v")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
UNCHECKED: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
"""Without the safety checker, which would hide what is to be measured."""
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class Settings:
    """A model's own defaults, as `efface.json` beside its weights gives them. Raises InvalidModel for values out of range."""

    lr_scale: float = 1.0
    """How much larger learning rates its cross-attention takes than that of Stable Diffusion 1.x; above 0."""
    lr_scale_others: float | None = None
    """The same where other layers are trained too; None where it is no other."""
    steps: int = 50
    """Sampling steps; at least 1."""
    guidance: float = 7.5
    """Classifier-free guidance; 1 or less for none."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InvalidModel(f"efface.json gives {field.name} as {value!r}; expected a finite number")
        for name in ("lr_scale", "lr_scale_others"):
            scale = getattr(self, name)
            if scale is not None and scale <= 0:
                raise InvalidModel(f"efface.json gives {name} as {scale}; expected a number above 0")
        if self.steps != int(self.steps) or self.steps < 1:
            raise InvalidModel(f"efface.json gives steps as {self.steps}; expected an integer of at least 1")

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """From `efface.json` in a folder, or the defaults where there is none. Raises InvalidModel for an unknown key."""
        path = folder / "efface.json"
        values = sniff.read_json(path) if path.is_file() else {}
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise InvalidModel(f"{path} has the unknown key {key!r}; {suggest(key, known)}")
        return cls(**values)


def load(
    source: str | Path | StableDiffusionPipeline,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> StableDiffusion:
    """A model from a name, a folder, a file, a Hub id or a live pipeline.

    device: default "cuda" where there is one, else "cpu".
    dtype: whatever the stored weights are in, default float32 on the CPU; on CUDA bfloat16 where the card computes in it, else
        float32. float16 only when asked for: its range is small, so that a step of a fit may need several backwards (`ops.descend`).
    revision, token, local_files_only: as for diffusers' `from_pretrained`, for a Hub id; variant: such as "fp16", for a folder too.
    config: for a single file, "sd1", "sd2", "sd2-v" or a pipeline folder without weights. "sd1" is recognised; Stable Diffusion 2.x
        does not tell in its tensors whether it predicts noise ("sd2") or velocity ("sd2-v").
    tokenizer: for a single file, a tokenizer folder in place of CLIP's own.

    A live pipeline is used as it is, moved or cast only where `device` or `dtype` is given, and has the defaults of the folder that it
    was loaded from; all others come in evaluation mode and without gradients of their own. Pickled weights are refused.

    Raises InvalidModel: nothing readable is there; the message says what was found and what to give."""
    if not isinstance(source, (str, Path)):
        pipeline = _live(source, dtype, device)
        name = str(pipeline.config.get("_name_or_path") or "pipeline")
        return _wrap(pipeline, name, Settings.read(Path(name)))
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    precision = _dtype(dtype) if dtype is not None else default_dtype(place)
    name = str(source)
    path = _bundled(name) if name in BUNDLED else Path(name).expanduser()
    settings = Settings()
    if path.is_dir():
        pipeline, settings = _folder(path, precision, {"variant": variant}), Settings.read(path)
    elif path.is_file():
        pipeline = _file(path, precision, config, tokenizer)
    elif HUB_ID.fullmatch(name):
        pipeline = _hub(name, precision, variant, {"revision": revision, "token": token, "local_files_only": local_files_only})
    else:
        raise sniff.missing(name, tuple(BUNDLED))
    return _wrap(_settled(pipeline, place), name, settings)


def opened(model: Model | str | Path | StableDiffusionPipeline) -> Model:
    """The model itself, or what `load` makes of anything else."""
    return model if isinstance(model, Model) else load(model)


def default_dtype(device: torch.device) -> torch.dtype:
    """float32; on a CUDA card that computes in bfloat16, that."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def _wrap(pipeline: StableDiffusionPipeline, name: str, settings: Settings) -> StableDiffusion:
    with quiet():
        from efface.models.sd import StableDiffusion
    return StableDiffusion(
        pipeline,
        id=name,
        lr_scale=settings.lr_scale,
        lr_scale_others=settings.lr_scale_others,
        default_steps=int(settings.steps),
        default_guidance=settings.guidance,
    )


def _live(pipeline: Any, dtype: torch.dtype | str | None, device: torch.device | str | None) -> StableDiffusionPipeline:
    name = type(pipeline).__name__
    with quiet():
        from diffusers import DiffusionPipeline
    if not isinstance(pipeline, DiffusionPipeline):
        raise InvalidModel(f"expected a path, a Hub id or a diffusers pipeline, and got a {name}")
    sniff.supported(name, "the pipeline")
    if dtype is not None:
        pipeline.to(dtype=_dtype(dtype))
    if device is not None:
        pipeline.to(device)
    return pipeline


def _bundled(name: str) -> Path:
    folder = BUNDLED[name]
    if not folder.is_dir():
        raise InvalidModel(f"the bundled model {name!r} is not there: expected it in {folder}; `efface world train` makes it")
    return folder


def _folder(folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> StableDiffusionPipeline:
    sniff.supported(sniff.pipeline_class(folder), folder)
    return _pretrained(str(folder), dtype, {"local_files_only": True, **options})


def _hub(name: str, dtype: torch.dtype, variant: str | None, access: dict[str, Any]) -> StableDiffusionPipeline:
    from huggingface_hub import hf_hub_download

    try:
        index = Path(hf_hub_download(name, "model_index.json", **access))
    except (OSError, ValueError) as error:
        hint = sniff.near(name, tuple(BUNDLED))
        raise InvalidModel(
            f"{name!r} is no path here, and the Hub did not give it: {_first_line(error)}. {hint}Check the name, the network and, "
            "for a gated model, `token`; or download it elsewhere and give its folder"
        ) from error
    sniff.supported(sniff.pipeline_class(index.parent), name)
    return _pretrained(name, dtype, {"variant": variant, **access})


def _pretrained(source: str, dtype: torch.dtype, options: dict[str, Any]) -> StableDiffusionPipeline:
    with quiet():
        from diffusers import StableDiffusionPipeline

        try:
            return StableDiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **UNCHECKED, **options)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InvalidModel(
                f"the pipeline in {source} cannot be loaded: {_first_line(error)}. Its weights must be .safetensors (pickles are refused), "
                "and all its components must be there"
            ) from error


def _file(path: Path, dtype: torch.dtype, config: str | Path | None, tokenizer: str | Path | None) -> StableDiffusionPipeline:
    folder = _config_folder(path, config)
    own = (folder / "tokenizer").is_dir() and tokenizer is None
    words = {} if own else {"tokenizer": _tokenizer(folder, tokenizer)}
    with quiet():
        from diffusers import StableDiffusionPipeline
        from diffusers.loaders.single_file import SingleFileComponentError

        try:
            return StableDiffusionPipeline.from_single_file(
                str(path), config=str(folder), dtype=dtype, local_files_only=True, **UNCHECKED, **words
            )
        except (OSError, ValueError, KeyError, SafetensorError, SingleFileComponentError) as error:
            raise InvalidModel(f"{path} cannot be loaded with the config {folder.name!r}: {_first_line(error)}") from error


def _config_folder(path: Path, config: str | Path | None) -> Path:
    """The folder of configurations for a checkpoint: the one that was asked for, or the one that its tensors tell."""
    sniff.check_suffix(path)
    if config is not None and str(config) not in CONFIG_NAMES:
        sniff.supported(sniff.pipeline_class(Path(config)), config)
        return Path(config)
    found = sniff.checkpoint_config(path)
    if config is None and found == "sd2":
        raise InvalidModel(
            f"{path} is Stable Diffusion 2.x, whose tensors do not tell what it predicts: give config='sd2' for noise (2.0-base and "
            "2.1-base, 512 px) or config='sd2-v' for velocity (2.0 and 2.1, 768 px)"
        )
    if config is not None and not str(config).startswith(found):
        raise InvalidModel(f"{path} has the text width of {found}, and config={str(config)!r} was given")
    return CONFIGS / str(config or found)


def _tokenizer(folder: Path, given: str | Path | None) -> Any:
    if given is None:
        return clip_tokenizer(pad="!") if folder.name.startswith("sd2") else clip_tokenizer()
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(given), local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{given} holds no CLIP tokenizer: {_first_line(error)}") from error


def _settled(pipeline: StableDiffusionPipeline, device: torch.device) -> StableDiffusionPipeline:
    """On its device, in evaluation mode, without gradients."""
    pipeline.to(device)
    for network in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        network.eval().requires_grad_(False)
    return pipeline


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InvalidModel(f"unknown dtype {dtype!r}; {suggest(dtype, DTYPES)}")
    return DTYPES[dtype]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0].rstrip('.') if str(error).strip() else 'no message'}"

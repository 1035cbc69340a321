"""Others' artifacts as an `Edit`: a LoRA, a fine-tuned or erased denoiser, a pipeline folder, or what efface itself wrote.

    import_edit(model, "lora.safetensors")        diffusers/PEFT's, kohya's or older names -> LowRankEdit
    import_edit(model, "peft-folder")             adapter_config.json + adapter_model.safetensors -> LowRankEdit
    import_edit(model, "esd-x.safetensors")       a state dict, whole or of the trained parameters only -> WeightEdit
    import_edit(model, "esd-x.pt")                the same as torch.save wrote it, read without running any code
    import_edit(model, "checkpoint.safetensors")  one file in CompVis' format, compared with the model -> WeightEdit
    import_edit(model, "pipeline-folder")         compared with the model, network by network -> WeightEdit
    import_edit(model, efface.load("other"))      the same for a model that is loaded already

A name or a shape that does not fit is an error, never skipped: an adapter that silently loads nothing is this field's classic failure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from efface.core.card import Card, Fingerprint, versions
from efface.core.edit import Edit, LowRankEdit, WeightEdit
from efface.core.errors import InvalidEdit, Mismatch, NoEffect, Unsupported
from efface.core.file import HEADER
from efface.core.model import Model
from efface.core.task import Task
from efface.models import names, sniff
from efface.models.load import load, opened

OTHER = {
    "dora_scale": "DoRA, which rescales the sum of weight and change",
    "lora_magnitude_vector": "DoRA, which rescales the sum of weight and change",
    "hada_": "LoHa, a product of two low-rank changes",
    "lokr_": "LoKr, a Kronecker product",
    "lora_mid": "LoCon's three-factor convolution",
    "oft_": "OFT, a rotation of weights",
    "diff_b": "a change of biases beside the low-rank one",
    "lora_B.bias": "a change of biases beside the low-rank one",
}
"""Parts of keys in adapters that are no plain LoRA, and what they are."""
COMPVIS = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.")
SAVED_BY_TORCH = (".pt", ".pth", ".bin")
"""Suffixes of state dicts that `torch.save` wrote."""
HALF = (torch.bfloat16, torch.float16)
"""The coarser first: most of its numbers are numbers of the other, too."""
UNROUNDED: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""How the weights to compare with are loaded: a difference is far smaller than they are, and half precision would round it away."""
IGNORED = ("position_ids",)
"""Ends of keys that hold no parameter."""


def import_edit(
    model: Model | Any,
    source: str | Path | Model | Any,
    *,
    task: Task | str | None = None,
    scale: float = 1.0,
    config: str | Path | None = None,
) -> Edit:
    """What others made for `model`, as an edit that can be attached, measured, attacked, saved and exported.

    model: what `efface.load` returned, or anything that it takes.
    source: a file, a folder, or a loaded model or pipeline of the same shape; see the module's docstring. Of files that `torch.save` wrote
        (.pt, .pth, .bin) tensors in plain containers are read, and whatever else a pickle can hold is refused.
    task: what it is known to erase, for the card and as the prompts that must change when it is attached ("cat"); without, the empty
        prompt must.
    scale: of a LoRA: W + scale · (alpha / rank) up · down.
    config: for a file in CompVis' format, as for `efface.load`; by default that of the model's family.

    Files that efface wrote keep their card. A parameter counts as unchanged where it equals the model's in the coarser of the two number
    formats. Raises InvalidEdit (unreadable, or no plain LoRA), InvalidModel (a file of another kind, an unreadable folder), Mismatch (a
    name or shape that the model does not have), NoEffect (nothing differs), ValueError (scale)."""
    if not math.isfinite(scale):
        raise ValueError(f"scale was {scale}; expected a finite number")
    model = opened(model)
    if not isinstance(source, (str, Path)):
        other = opened(source)
        return _compared(model, other, _card(model, other.id, task))
    path = Path(source).expanduser()
    if (path / "model_index.json").is_file():
        return _compared(model, load(path, **UNROUNDED), _card(model, path.name, task))
    tensors, metadata = _read_folder(path) if path.is_dir() else _read(path)
    head = _json(metadata.get(HEADER, "{}"), path)
    if head.get("format") == "efface-edit":
        return Edit.load(path)
    card = Card.from_json(head["card"]) if "card" in head else _card(model, path.name, task)
    if head.get("format") == "efface-delta":
        return WeightEdit({name: tensor.float() for name, tensor in tensors.items()}, card)
    if any(key.startswith(COMPVIS) for key in tensors):
        return _compared(model, _checkpoint(model, path, config), card)
    if any(names.factor(key) for key in tensors):
        return LowRankEdit(_factors(model, tensors, _config(metadata, path), path), card, scale=scale)
    return WeightEdit(_differences(model, tensors, path), card)


def _card(model: Model, source: str, task: Task | str | None) -> Card:
    asked = Task.of(task) if isinstance(task, str) else task
    probes = tuple(concept.texts[0] for concept in asked.targets) if asked else ("",)
    made = f"imported(source={Path(source).name!r})"
    return Card(made, str(asked or ""), 0, model.id, model.family, Fingerprint.of(model), probes, {}, versions())


# -- files ---------------------------------------------------------------------------------------------------------------
def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file."""
    if not path.exists():
        raise InvalidEdit(f"there is no file or folder {path}; give a LoRA, a state dict in .safetensors, or a pipeline folder")
    if path.suffix.lower() in SAVED_BY_TORCH:
        return _unpickled(path), {}
    sniff.check_suffix(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InvalidEdit(f"{path} is no whole safetensors file ({error}); it is corrupt or truncated, fetch it again") from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote: a state dict as it is, under "state_dict", or one for each network.

    Torch's restricted unpickler makes tensors and plain containers, and calls nothing that the file names."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt or forbidden pickle fails in many ways
        raise InvalidEdit(
            f"{path} is no state dict that can be read without running its code ({type(error).__name__}); convert it to .safetensors where "
            "you trust its source (safetensors.torch.save_file of its state dict), or use a copy published as .safetensors"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {"": found}
    nested = {name: part if isinstance(part, dict) else {"": part} for name, part in found.items()}
    tensors = {".".join(filter(None, (name, key))): value for name, part in nested.items() for key, value in part.items()}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InvalidEdit(f"{path} holds a {type(value).__name__} under {name!r}; expected a state dict, which holds tensors only")
    return tensors


def _checkpoint(model: Model, path: Path, config: str | Path | None) -> Model:
    """A whole model in CompVis' format. What a Stable Diffusion 2.x predicts cannot be told, and is not needed to compare weights."""
    return load(path, **UNROUNDED, config=config or ("sd2" if model.family == "sd2" else None))


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A PEFT adapter, a folder with one LoRA, or one network's folder, in shards or not."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if re.fullmatch(r"[\w-]+", file.stem)] or files  # without variants such as ".fp16"
    if not plain:
        raise InvalidEdit(f"{folder} holds no .safetensors file; give a LoRA, a state dict, or a pipeline folder")
    shards = len(plain) > 1 and all(re.search(r"-\d+-of-\d+$", file.stem) for file in plain)
    if len(plain) > 1 and not shards:
        raise InvalidEdit(f"{folder} holds several files ({', '.join(file.name for file in plain)}); give one of them")
    parts = [_read(file) for file in plain]
    tensors = {name: tensor for part, _ in parts for name, tensor in part.items()}
    config = folder / "adapter_config.json"
    metadata = {"adapter_config": config.read_text(encoding="utf-8")} if config.is_file() else {}
    return tensors, {**parts[0][1], **metadata}


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise InvalidEdit(f"the settings in {path} are no JSON object ({error}); the file is corrupt, fetch it again") from error


def _config(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """PEFT's settings by network: from a file's header (diffusers), or beside it (PEFT, under "")."""
    if "adapter_config" in metadata:
        return {"": _json(metadata["adapter_config"], path)}
    found: dict[str, dict[str, Any]] = {}
    for key, value in _json(metadata.get("lora_adapter_metadata", "{}"), path).items():
        network, _, setting = key.partition(".")
        found.setdefault(network, {})[setting] = value
    return found


# -- LoRA ----------------------------------------------------------------------------------------------------------------
def _factors(
    model: Model, tensors: Mapping[str, Tensor], config: Mapping[str, Mapping[str, Any]], path: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up · alpha / rank) by parameter name."""
    for key in tensors:
        for mark, what in OTHER.items():
            if mark in key:
                raise Unsupported(f"{path} holds {what} ({key}); bake it into a pipeline with diffusers and import that folder instead")
    pairs, alphas = _sorted(tensors, path)
    known = names.maps(model)
    lookup = names.index(known)
    found = {}
    for spelt, sides in pairs.items():
        if spelt not in lookup:
            raise _unknown(path, spelt, model, lookup)
        if set(sides) != {"down", "up"}:
            raise InvalidEdit(f"{path} holds only one factor of {spelt!r}; it is incomplete, fetch it again")
        name, down, up = lookup[spelt], sides["down"].float(), sides["up"].float()
        _check_shape(name, (len(up), *down.shape[1:]), tuple(known[name].weight.shape), model, path)
        network, _, module = name.partition(".")
        found[f"{name}.weight"] = down, _scale(alphas.get(spelt), config.get(network, config.get("", {})), module, len(down)) * up
    return found


def _sorted(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """The two factors, and the alpha where it has one, of each module as the file spells it."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        found = names.factor(key)
        if found is not None:
            pairs.setdefault(found[0], {})[found[1]] = tensor
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(tensor)
        else:
            raise InvalidEdit(f"{path} holds {key!r} among the factors of a LoRA; only pairs of factors and alphas are read")
    return pairs, alphas


def _scale(alpha: float | None, config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank; alpha from its own tensor, else from PEFT's settings, else the rank."""
    if alpha is None and "lora_alpha" in config:
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


# -- weights -------------------------------------------------------------------------------------------------------------
def _differences(model: Model, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """W' − W of the parameters that differ, for a state dict in diffusers' names, whole or partial."""
    own = _parameters(model)
    lookup = names.index(own)
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(IGNORED):
            continue
        if key not in lookup:
            raise _unknown(path, key, model, lookup)
        name = lookup[key]
        _check_shape(name, tuple(tensor.shape), tuple(own[name].shape), model, path)
        theirs = tensor.reshape(own[name].shape)  # a 1 × 1 convolution and a linear map hold the same numbers
        if _differs(theirs, own[name]):
            found[name] = theirs.float() - own[name].detach().float().cpu()
    return _some(found, str(path), model)


def _compared(model: Model, other: Model, card: Card) -> WeightEdit:
    """Every network of `other` against that of `model`."""
    own, theirs = _parameters(model), _parameters(other)
    apart = sorted(own.keys() ^ theirs.keys())
    if apart:
        missing = apart[0] in own
        raise Mismatch(
            f"{apart[0]} is in {model.id if missing else other.id} and not in {other.id if missing else model.id}"
            f"{names.nearest(apart[0], theirs if missing else own)}; the two are of different shapes, and have no difference"
        )
    for name, tensor in theirs.items():
        _check_shape(name, tuple(tensor.shape), tuple(own[name].shape), model, Path(other.id))
    formats = {name: _format(network) for name, network in other.components.items()}
    theirs = {name: tensor.reshape(own[name].shape).to(formats[name.partition(".")[0]]) for name, tensor in theirs.items()}
    found = {n: t.detach().float().cpu() - own[n].detach().float().cpu() for n, t in theirs.items() if _differs(t, own[n])}
    return WeightEdit(_some(found, other.id, model), card)


def _format(network: nn.Module) -> torch.dtype:
    """What a network's weights were stored in: where loading widened them, every number still is one of the narrower format."""
    parameters = [p.detach() for p in network.parameters()]
    narrow = (dtype for dtype in HALF if all(torch.equal(p, p.to(dtype).to(p.dtype)) for p in parameters))
    return next(narrow, parameters[0].dtype)


def _differs(theirs: Tensor, own: Tensor) -> bool:
    """Whether they are apart by more than storing one in the number format of the other explains."""
    a, b = theirs.detach().cpu(), own.detach().cpu()
    return not (torch.equal(a, b.to(a.dtype)) or torch.equal(a.to(b.dtype), b))


def _parameters(model: Model) -> dict[str, Tensor]:
    return {f"{c}.{name}": p for c, network in model.components.items() for name, p in network.named_parameters()}


def _some(found: dict[str, Tensor], source: str, model: Model) -> dict[str, Tensor]:
    if not found:
        raise NoEffect(f"{source} holds the very weights of {model.id}; there is nothing to import")
    return found


def _check_shape(name: str, given: tuple[int, ...], own: tuple[int, ...], model: Model, path: Path) -> None:
    if math.prod(given) != math.prod(own) or given[0] != own[0]:
        raise Mismatch(f"{path} gives {name} the shape {given}, and in {model.id} it is {own}; it was made for another model")


def _unknown(path: Path, name: str, model: Model, known: Mapping[str, str]) -> Mismatch:
    return Mismatch(
        f"{path} holds {name!r}, which {model.id} ({model.family}) does not have{names.nearest(name, known)}. "
        "Load the model that it was made for"
    )

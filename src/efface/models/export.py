"""An edit in the formats of others: a diffusers folder, a LoRA in diffusers/PEFT's or kohya's names, a file of differences.

    export(model, edit, "diffusers", "no-cat")             a whole pipeline folder with the edit baked in
    export(model, edit, "lora", "no-cat.safetensors")      for `pipe.load_lora_weights`, at scale +1
    export(model, edit, "kohya", "no-cat.safetensors")     kohya's names with alpha; diffusers reads them too
    export(model, edit, "delta", "no-cat.safetensors")     W' − W by parameter name

What a format cannot hold exactly is measured, written into the file, returned and, where it matters, warned of. `models.prove`
reloads the result in plain diffusers and compares pictures. The formats are described in docs/export.md.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from efface.core import file
from efface.core.card import Match
from efface.core.edit import Chain, Edit, LowRankEdit, WeightEdit
from efface.core.errors import EffaceError, InvalidEdit, Overlap, Unsupported, suggest
from efface.core.model import Model
from efface.core.whole import whole_folder
from efface.models import names
from efface.models.load import Settings, opened
from efface.models.quiet import quiet
from efface.ops.lowrank import truncated
from efface.ops.overlay import swapped

if TYPE_CHECKING:
    from efface.models.sd import StableDiffusion

Kind = Literal["diffusers", "lora", "kohya", "delta"]
KINDS: tuple[str, ...] = get_args(Kind)
VERSION = 1
"""Of the headers; a reader refuses a newer one."""
RECORD = "efface_export.json"
"""The file in a diffusers folder that holds what the header of the other formats holds."""
ENERGY = 0.9999
"""The default for a change that is not stored as factors: each map's relative error is at most √(1 − ENERGY) = 1 %."""
LOUD = 0.02
"""The relative error of the whole change above which a warning is given."""


@dataclass(frozen=True)
class Export:
    """What was written, and how exactly. Errors are relative: ‖written − Δ‖_F / ‖Δ‖_F."""

    kind: Kind
    path: Path
    error: float
    """Of the whole change of weights, with what the format left out."""
    errors: Mapping[str, float]
    """Of each parameter that was written."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Of each map, for the LoRA formats."""
    lost: tuple[str, ...] = ()
    """Parameters that the edit changes and the format cannot hold."""
    warnings: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, eq=False)
class _Content:
    """What a format makes of a change: the tensors to store, and the change that a reader gets from them."""

    tensors: dict[str, Tensor]
    read: dict[str, Tensor]
    """Δ as read back, by parameter; a parameter that is missing here is lost."""
    ranks: dict[str, int] = field(default_factory=dict)


def export(
    model: Model | Any,
    edit: Edit,
    kind: Kind,
    path: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
    match: Match = "exact",
    overwrite: bool = False,
) -> Export:
    """Writes `edit`, which belongs to `model`, in another program's format, whole or not at all; the model is left as it was.

    model: what `efface.load` returned, or anything that it takes.
    kind: "diffusers" (path: a folder), "lora", "kohya" or "delta" (path: a .safetensors file).
    rank, energy: for the LoRA formats, how much of each map's change is kept (`ops.lowrank.truncated`); by default the factors of a
        low-rank edit as they are, and of any other change ENERGY = 0.9999 of its squared norm.
    dtype: of the tensors stored in a file, default float32. A diffusers folder keeps the format of the model's weights.
    match: how well `model` must fit the edit, as for `Edit.attach`.
    overwrite: replaces a file, or a folder that an earlier export wrote.

    Raises Unsupported: the edit is no change of weights, or the format can hold nothing of it. Mismatch, Overlap (edits are attached),
    InvalidEdit (path), ValueError (kind, rank, energy), EffaceError (the path is taken, the disk is full)."""
    path = Path(path)
    _check(kind, path, rank, energy, dtype, overwrite)
    model = opened(model)
    if model.attached:
        raise Overlap("other edits are attached to the model; detach them before an export, or export a Chain of all")
    deltas = changes(model, edit)
    edit.card.check(model, match)
    if kind == "diffusers":
        read = _rounded(model, deltas)
        made = _report(kind, path, edit, deltas, _Content({}, read))
        _write_folder(model, edit, deltas, made)
    else:
        content = _contents(kind, model, edit, deltas, rank, energy, dtype or torch.float32)
        made = _report(kind, path, edit, deltas, content)
        file.write(path, content.tensors, header(edit, made))
    for message in made.warnings:
        warnings.warn(message, stacklevel=2)
    return made


def changes(model: Model, edit: Edit) -> dict[str, Tensor]:
    """Δ by full parameter name, float32, of an edit that is a change of weights; of a chain, the whole way from the first part to the last.

    Raises Unsupported for removable hooks, and where a shape does not fit the model."""
    if isinstance(edit, Chain):
        return _chained(model, edit)
    if isinstance(edit, LowRankEdit):
        return edit.deltas(model)
    if not isinstance(edit, WeightEdit):
        raise Unsupported(
            f"a {edit.kind} edit is {edit.threat.partition(':')[0]} and no change of weights, so no format of weights can hold it; "
            "save it with `edit.save`, and attach it with efface to the pipeline that is to use it"
        )
    deltas = edit.expand(model)
    for name, slot in model.slots(deltas).items():
        if slot.tensor.shape != deltas[name].shape:
            raise Unsupported(
                f"{name} has the shape {tuple(slot.tensor.shape)} in {model.id}, and the edit's is {tuple(deltas[name].shape)}"
            )
    return {name: delta.detach().float().cpu() for name, delta in deltas.items()}


def _chained(model: Model, chain: Chain) -> dict[str, Tensor]:
    """Each part meets the weights that the ones before it have made, here in float32."""
    total: dict[str, Tensor] = {}
    for part in chain.edits:
        slots = model.slots(total)
        with swapped(slots, {n: s.tensor.detach().float() + total[n].to(s.tensor.device) for n, s in slots.items()}):
            found = changes(model, part)
        total |= {name: total[name] + delta if name in total else delta for name, delta in found.items()}
    return total


def header(edit: Edit, made: Export) -> dict[str, Any]:
    """What stands in the file's metadata under "efface", and in a folder's record: JSON values."""
    return {
        "format": "efface-delta" if made.kind == "delta" else f"efface-{made.kind}",
        "version": VERSION,
        "edit": edit.kind,
        "threat": "a change of weights" if made.kind == "diffusers" else edit.threat,
        "card": edit.card.json(),
        "error": made.error,
        "errors": dict(made.errors),
        "ranks": dict(made.ranks),
        "lost": list(made.lost),
        "warnings": list(made.warnings),
    }


# -- what is stored ------------------------------------------------------------------------------------------------------
def _contents(
    kind: Kind, model: Model, edit: Edit, deltas: dict[str, Tensor], rank: int | None, energy: float | None, dtype: torch.dtype
) -> _Content:
    if kind == "delta":
        stored = {name: delta.to(dtype) for name, delta in deltas.items()}
        return _Content(stored, stored)
    factors = _factors(model, edit, deltas, rank, energy)
    if not factors:
        raise Unsupported(
            "a LoRA holds changes of linear maps and convolutions only, and this edit has none; export it as 'diffusers' or 'delta'"
        )
    if kind == "lora":
        return _peft(factors, dtype)
    if "unet" not in model.components or "text_encoder_2" in model.components:
        raise Unsupported(f"kohya's names are written for Stable Diffusion 1.x and 2.x, and {model.id} is {model.family!r}; use 'lora'")
    return _kohya({**factors, **_signpost(model, factors)}, dtype)


def _factors(
    model: Model, edit: Edit, deltas: dict[str, Tensor], rank: int | None, energy: float | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """(down (r, i, …), up (o, r, …)), scale 1, by the full name of each map that changes; float32."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    known = names.maps(model)
    own = edit.factors if isinstance(edit, LowRankEdit) and rank is None and energy is None else {}
    for name, delta in deltas.items():
        module, _, attribute = name.rpartition(".")
        if attribute != "weight" or module not in known or not delta.any():
            continue
        if name in own:
            down, up = (factor.float().flatten(1) for factor in own[name])
            pair = down, edit.scale * up  # type: ignore[attr-defined]
        else:
            pair = truncated(delta.flatten(1), rank=rank, energy=ENERGY if rank is None and energy is None else energy)
        found[module] = (pair[0].reshape(-1, *delta.shape[1:]), pair[1].reshape(*pair[1].shape, *(1,) * (delta.ndim - 2)))
    return found


def _peft(factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> _Content:
    """diffusers' convention without alphas: W + up · down for each map, whatever its rank."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in factors.items():
        tensors |= {f"{names.peft(module)}.lora_A.weight": down.to(dtype), f"{names.peft(module)}.lora_B.weight": up.to(dtype)}
    read = {f"{m}.weight": _product(down.to(dtype), up.to(dtype)) for m, (down, up) in factors.items()}
    return _Content(tensors, read, {module: len(down) for module, (down, _) in factors.items()})


def _kohya(factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> _Content:
    """W + (alpha / rank) up · down, with one alpha for all maps and the rest of the scale in `up`.

    One alpha, because diffusers 0.42 looks up an attention map's own alpha by a name that it has not converted, and so ignores it."""
    alpha = float(max(len(down) for down, _ in factors.values()))
    tensors: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for module, (down, up) in factors.items():
        name, scale = names.kohya(module), alpha / len(down)
        stored = {"lora_down.weight": down.to(dtype), "lora_up.weight": (up / scale).to(dtype), "alpha": torch.tensor(alpha)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
        read[f"{module}.weight"] = scale * _product(stored["lora_down.weight"], stored["lora_up.weight"])
    return _Content(tensors, read, {module: len(down) for module, (down, _) in factors.items()})


def _signpost(model: Model, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A change of nothing, where it is needed: diffusers 0.42 recognises kohya's spelling of a text encoder's attention by an out_proj, and
    fails on, or misreads, a file with others alone."""
    layers = [name.rpartition(".")[0] for name in factors if ".self_attn." in name]
    if not layers or any(name.endswith("self_attn.out_proj") for name in factors):
        return {}
    name = f"{layers[0]}.out_proj"
    outputs, inputs = names.maps(model)[name].weight.shape
    return {name: (torch.zeros(1, inputs), torch.zeros(outputs, 1))}


def _product(down: Tensor, up: Tensor) -> Tensor:
    return (up.float().flatten(1) @ down.float().flatten(1)).reshape(len(up), *down.shape[1:])


def _rounded(model: Model, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The change that is left of Δ once W + Δ is stored in the format of W."""
    read = {}
    for name, slot in model.slots(deltas).items():
        weight = slot.tensor.detach()
        stored = (weight.float() + deltas[name].to(weight.device)).to(weight.dtype)
        read[name] = (stored.double() - weight.double()).cpu()
    return read


# -- how exact it is -----------------------------------------------------------------------------------------------------
def _report(kind: Kind, path: Path, edit: Edit, deltas: Mapping[str, Tensor], content: _Content) -> Export:
    changed = {name: delta for name, delta in deltas.items() if delta.any()}
    written = [name for name in changed if name in content.read]
    lost = tuple(name for name in changed if name not in content.read)
    norms = {name: _norm(delta) for name, delta in changed.items()}
    apart = {name: _norm(content.read[name].double() - changed[name].double()) for name in written}
    total = math.hypot(*norms.values()) or 1.0
    left_out, inexact = math.hypot(*(norms[name] for name in lost)) / total, math.hypot(*apart.values()) / total
    errors = {name: apart[name] / norms[name] for name in written}
    said = (*(f"weights cannot hold {what}" for what in _beyond_weights(edit)), *_warnings(kind, lost, left_out, inexact))
    return Export(kind, path, math.hypot(left_out, inexact), errors, content.ranks, lost, said)


def _beyond_weights(edit: Edit) -> list[str]:
    """What no format of weights can hold of an edit, such as a prompt gate; for each part of a chain."""
    if isinstance(edit, Chain):
        return [what for part in edit.edits for what in _beyond_weights(part)]
    return [edit.lost_in_weights] if edit.lost_in_weights else []


def _warnings(kind: Kind, lost: tuple[str, ...], left_out: float, inexact: float) -> Iterator[str]:
    """`left_out`, `inexact`: the share of the change's norm in parameters that are lost, and in what was written inexactly."""
    if lost:
        yield (
            f"a LoRA cannot hold {len(lost)} of the parameters that this edit changes (biases, norms, embeddings; such as {lost[0]}), "
            f"which carry {left_out:.2%} of its change; 'diffusers' and 'delta' hold all"
        )
    if inexact > LOUD and kind == "diffusers":
        yield (
            f"the number format of the model's weights rounds away {inexact:.1%} of this change; load the model in float32 to export all"
        )
    elif inexact > LOUD:
        yield f"what was written differs from the edit by {inexact:.1%} of its change; a higher rank or energy comes nearer"


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


# -- the folder ----------------------------------------------------------------------------------------------------------
def _write_folder(model: Model, edit: Edit, deltas: Mapping[str, Tensor], made: Export) -> None:
    with quiet():
        from efface.models.sd import StableDiffusion
    if not isinstance(model, StableDiffusion):
        raise Unsupported(f"{model.id} is no Stable Diffusion pipeline, and only these are written as 'diffusers'; use 'lora' or 'delta'")
    baked = WeightEdit(deltas, edit.card)
    with whole_folder(made.path) as folder, baked.attach(model, match="force", check=False), quiet():
        _save_pipeline(model, folder)
        (folder / RECORD).write_text(json.dumps(header(edit, made), indent=2) + "\n", encoding="utf-8")
        settings = Settings(model.lr_scale, model.lr_scale_others, model.default_steps, model.default_guidance)
        if settings != Settings():
            (folder / "efface.json").write_text(
                json.dumps({key: value for key, value in asdict(settings).items() if value is not None}) + "\n", encoding="utf-8"
            )


def _save_pipeline(model: StableDiffusion, folder: Path) -> None:
    """As `save_pretrained`, so that a plain `from_pretrained` runs: transformers loads a text encoder in the format that it was stored in,
    and diffusers the other networks in float32, so the text encoder is stored in float32. Its names keep the `text_model.` that older
    readers expect."""
    from safetensors.torch import load_file, save_file

    pipeline, text_encoder = model.pipeline, copy.deepcopy(model.components["text_encoder"]).float()
    parts: dict[str, Any] = {**pipeline.components, **model.components, "text_encoder": text_encoder}
    type(pipeline)(**parts, requires_safety_checker=pipeline.config.requires_safety_checker).save_pretrained(folder)
    stored = folder / "text_encoder" / "model.safetensors"
    state = {names.peft(f"text_encoder.{name}").partition(".")[2]: tensor for name, tensor in load_file(stored).items()}
    save_file(state, stored, {"format": "pt"})


# -- what was asked ------------------------------------------------------------------------------------------------------
def _check(kind: str, path: Path, rank: int | None, energy: float | None, dtype: torch.dtype | None, overwrite: bool) -> None:
    if kind not in KINDS:
        raise ValueError(f"the kind of export was {kind!r}; {suggest(str(kind), KINDS)}")
    if kind not in ("lora", "kohya") and (rank is not None or energy is not None):
        raise ValueError(f"rank and energy belong to the kinds lora and kohya; {kind!r} takes the whole change")
    if rank is not None and rank < 1:
        raise ValueError(f"rank was {rank}; expected an integer of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy was {energy}; expected a number above 0 and at most 1")
    if kind == "diffusers":
        if dtype is not None:
            raise ValueError("dtype belongs to single files; a diffusers folder is written in the model's own format: load the model in it")
        _check_folder(path, overwrite)
    elif path.suffix != ".safetensors":
        raise InvalidEdit(f"a {kind} export is a .safetensors file, and {path.name!r} was given")
    elif path.exists() and (path.is_dir() or not overwrite):
        raise EffaceError(f"{path} exists already; give another path{'' if path.is_dir() else ', or replace it with overwrite (--force)'}")


def _check_folder(path: Path, overwrite: bool) -> None:
    if path.is_file():
        raise EffaceError(f"{path} is a file; a diffusers export is a folder")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / RECORD).is_file():
        raise EffaceError(f"{path} holds files that no export wrote (it has no {RECORD}); give another folder")
    if not overwrite:
        raise EffaceError(f"{path} holds an earlier export; give another folder, or replace it with overwrite (--force)")

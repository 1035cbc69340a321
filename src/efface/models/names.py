"""What LoRA files call the maps of a model: diffusers/PEFT's names, kohya's, and the older spellings that are still read.

    here                             diffusers / PEFT                            kohya
    unet.mid_block.….attn2.to_k      unet.mid_block.….attn2.to_k                 lora_unet_mid_block_…_attn2_to_k
    text_encoder.encoder.….mlp.fc1   text_encoder.text_model.encoder.….mlp.fc1   lora_te_text_model_encoder_…_mlp_fc1

kohya's names have lost their dots, so they are read by looking them up among a model's own maps and never by guessing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from efface.core.model import Model
from efface.ops.lowrank import can_adapt

KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
"""The prefixes of kohya's names by network; the first is written."""
SIDE = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?:A|B|down|up)|\.lora\.(?:down|up)|\.lora_linear_layer\.(?:down|up)|_lora\.(?:down|up))(?:\.\w+)?\.weight"
)
"""A factor's key: the module's name, then which factor it is, in any of the spellings."""
DOWN = re.compile(r"(lora_A|lora_down|\.down)(\.\w+)?\.weight$")
OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj", "to_out.0": "out_proj"}
"""How early LoRA files called the projections of a text encoder."""


def maps(model: Model) -> dict[str, nn.Linear | nn.Conv2d]:
    """The modules that a LoRA can stand beside, by full name: linear maps and convolutions of the denoiser and the text encoders."""
    networks = {name: network for name, network in model.components.items() if not name.startswith("vae")}
    return {f"{c}.{name}": m for c, network in networks.items() for name, m in network.named_modules() if can_adapt(m)}


def peft(name: str) -> str:
    """diffusers/PEFT's name of a module, with the `text_model.` that files keep and transformers 5 no longer has."""
    network, _, path = name.partition(".")
    return f"{network}.{_prefixed(path)}" if network.startswith("text_encoder") else name


def kohya(name: str) -> str:
    """kohya's name of a module."""
    return _kohya(name)[0]


def _kohya(name: str) -> list[str]:
    network, _, path = name.partition(".")
    path = _prefixed(path) if network.startswith("text_encoder") else path
    return [prefix + path.replace(".", "_") for prefix in KOHYA.get(network, ())]


def _prefixed(path: str) -> str:
    return path if path.startswith("text_model.") else f"text_model.{path}"


def spellings(name: str) -> list[str]:
    """Every name under which files may hold a module or a parameter: the full one, that of its network alone, and those above."""
    network, _, path = name.partition(".")
    alone = [path] if network in ("unet", "transformer") else [_prefixed(path)] if network == "text_encoder" else []
    return [name, peft(name), *alone, *_kohya(name)]


def index(names: Iterable[str]) -> dict[str, str]:
    """spelling -> full name."""
    return {spelling: name for name in names for spelling in spellings(name)}


def factor(key: str) -> tuple[str, str] | None:
    """(module as the file spells it, "down" or "up") of a factor's key; None for any other key."""
    found = SIDE.fullmatch(key)
    if found is None:
        return None
    module = found["module"].removeprefix("base_model.model.").replace(".processor.", ".")
    head, _, last = module.rpartition(".")
    if ".self_attn" in head and last in OLD:
        module = f"{head}.{OLD[last]}"
    elif last == "to_out":
        module = f"{module}.0"
    return module, "down" if DOWN.search(key) else "up"


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; the nearest name here is …" for a name that is not known; "" where none is like it."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest name here is {near[0]!r}" if near else ""

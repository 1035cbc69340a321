"""Keys: what gives a hidden concept back to whoever holds it (KPOP's learnable prompts, arXiv 2403.12326).

    with edit.attach(model), unlock(model, edit.extras["key"], "cat"):
        model.sample(["a cat"])

A key is an extra of its edit and a file of its own ("no-cat.key.safetensors"), to be kept apart from the edit that is given away.
**A key is not security.** The public weights still hold the concept, by design, and whoever has them can fit a key of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from efface.core.edit import Part
from efface.core.errors import InvalidEdit, NoEffect, Unsupported, suggest
from efface.core.model import Model
from efface.core.sampling import noise_for, seeded
from efface.ops.keyed import keyed

Mode = Literal["mid", "midout", "inmidout"]
MODES: tuple[str, ...] = get_args(Mode)
_WHERE = {"mid": (".mid_block.",), "midout": (".mid_block.", ".up_blocks."), "inmidout": (".",)}
SIDES = ("key", "value")


def places(model: Model, mode: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """The key and the value projections of the cross-attentions of a mode: the middle block, with the upper half, or all.

    Raises Unsupported where the model has none there."""
    names = [n for n in model.hook_points("cross_attn") if any(part in f".{n}." for part in _WHERE[mode])]
    if not names:
        raise Unsupported(f"a key in the mode {mode!r} needs cross-attention there, and {model.id} has none; choose another mode")
    keys, values = ([model.module(f"{name}.{side}") for name in names] for side in ("to_k", "to_v"))
    return keys, values


def make_key(tokens: Mapping[str, tuple[Tensor, Tensor]], mode: str) -> Part:
    """A key from (p_K (m d), p_V (m d)) for each concept's text."""
    parts = {f"{text}/{side}": t.detach().float().cpu() for text, pair in tokens.items() for side, t in zip(SIDES, pair, strict=True)}
    return Part(parts, {"mode": mode, "concepts": list(tokens)})


def random_key(key: Part, seed: int) -> Part:
    """A wrong key of the same shape, as a control: each token a random direction of the length that the right one has."""
    generator = seeded(seed)
    found = {}
    for name, tokens in key.tensors.items():
        drawn = torch.randn(tokens.shape, generator=generator)
        found[name] = drawn / drawn.norm(dim=-1, keepdim=True) * tokens.norm(dim=-1, keepdim=True)
    return Part(found, key.info)


@contextmanager
def unlock(model: Model, key: Part, concept: str | None = None) -> Iterator[Model]:
    """The model with the key of one concept in place; `concept` may be left out where the key is for one alone.

    Raises InvalidEdit: the part is no key, or holds none for this concept. Unsupported: the tokens do not fit the model. NoEffect."""
    p_key, p_value = _tokens(key, concept)
    keys, values = places(model, key.info["mode"])
    width = model.encode([""]).tokens.shape[-1]
    if p_key.shape[-1] != width:
        raise Unsupported(f"the key has tokens of width {p_key.shape[-1]}, and {model.id} reads text of width {width}")
    before = _probe(model)
    with keyed(keys, values, p_key[None], p_value[None]):
        if torch.equal(_probe(model), before):
            raise NoEffect("the key changes nothing: the attention layers do not call their key and value maps; unfuse their projections")
        yield model


def _tokens(key: Part, concept: str | None) -> tuple[Tensor, Tensor]:
    known = key.info.get("concepts", [])
    if key.info.get("mode") not in MODES or not known:
        raise InvalidEdit("this part is no key; give `edit.extras['key']` of an edit that was fitted to be recovered")
    if concept is None and len(known) > 1:
        raise InvalidEdit(f"the key opens {len(known)} concepts, one at a time; name one of {', '.join(known)}")
    text = known[0] if concept is None else concept
    if text not in known:
        raise InvalidEdit(f"the key does not open {text!r}; {suggest(text, known)}")
    p_key, p_value = (key.tensors[f"{text}/{side}"] for side in SIDES)
    return p_key, p_value


@torch.no_grad()
def _probe(model: Model) -> Tensor:
    """An unmetered prediction for the empty prompt on fixed noise at the middle of the schedule."""
    spent = model.meter.forwards, model.meter.calls
    x = noise_for(0, 1, model.latent_shape).to(model.device, model.dtype)
    result = model.predict(x, model.schedule.train_steps // 2, model.encode([""]))
    model.meter.forwards, model.meter.calls = spent
    return result

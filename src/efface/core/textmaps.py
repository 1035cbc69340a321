"""The linear maps that read text, for closed-form editing: what enters them, and the edit from one right factor for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from efface.core.edit import Patch
from efface.core.errors import Diverged, Unsupported
from efface.core.model import Model
from efface.ops.ridge import IllConditioned, RightFactor

Form = Literal["deltas", "patch"]
"""How an edit by right factors is kept: a Δ for each map, or the factor itself, which is expanded when it is attached."""
BATCH = 64
"""Texts that are encoded at a time."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Texts:
    """The rows of some texts that enter a set of maps."""

    names: tuple[str, ...]
    """The weights of the maps, all of which read these rows."""
    tokens: Mapping[str, Tensor]
    """Text -> (l d)."""
    lengths: Mapping[str, int]
    """Text -> the number of its tokens, the start and the first end-of-text token included and padding not."""
    ids: Mapping[str, Tensor]
    """Text -> (l,), its token ids."""

    @property
    def width(self) -> int:
        """d."""
        return next(iter(self.tokens.values())).shape[-1]

    def words(self, text: str) -> list[int]:
        """The token ids of a text, start and first end-of-text included, padding not."""
        return self.ids[text][: self.lengths[text]].tolist()


def read(model: Model, texts: Sequence[str], group: str = "text_kv") -> list[Texts]:
    """Encodes texts, each once, and groups the maps of `group` by the rows that enter them; most families have one such set.

    Raises Unsupported where the encoding does not say where a text ends."""
    found: dict[tuple[str, ...], tuple[dict[str, Tensor], dict[str, int], dict[str, Tensor]]] = {}
    for part in batches(list(dict.fromkeys(texts))):
        cond = model.encode(part)
        if cond.mask is None or cond.ids is None:
            raise Unsupported(f"closed-form editing needs to know where a prompt ends, and {model.family!r} encodes prompts without a mask")
        for names, inputs in _alike(model.inputs(group, cond)).items():
            tokens, lengths, ids = found.setdefault(names, ({}, {}, {}))
            tokens.update(zip(part, inputs, strict=True))
            lengths.update(zip(part, cond.mask.sum(1).tolist(), strict=True))
            ids.update(zip(part, cond.ids.cpu(), strict=True))
    return [Texts(names, *parts) for names, parts in found.items()]


def batches(items: Sequence[T], size: int = BATCH) -> Iterator[list[T]]:
    """Items `size` at a time, so that their rows can be summed and forgotten."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def kept_as(model: Model, factors: Mapping[tuple[str, ...], RightFactor], form: str) -> tuple[dict[str, Tensor], tuple[Patch, ...]]:
    """The deltas and the patches of a `WeightEdit` W ↦ W (I + D), by names of maps and their factor; one of the two is empty."""
    if form == "patch":
        return {}, tuple(Patch(names, factor.float()) for names, factor in factors.items())
    return expanded(model, factors), ()


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Turns a solve that was refused into an error that says what to change. Raises Diverged."""
    try:
        yield
    except IllConditioned as error:
        raise Diverged(f"{error}; the model is as it was. {advice}") from error


@torch.no_grad()
def expanded(model: Model, factors: Mapping[tuple[str, ...], RightFactor]) -> dict[str, Tensor]:
    """W D for each map by name, float32, on the CPU."""
    pairs = [(name, factor) for names, factor in factors.items() for name in names]
    slots = model.slots(name for name, _ in pairs)
    return {name: factor.change(slots[name].tensor).float().cpu() for name, factor in pairs}


def _alike(inputs: Mapping[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    """Maps by the tensor that enters them."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in inputs.items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return {tuple(names): tensor for names, tensor in groups.values()}

"""Adapters whose strength depends on the prompt of each row: how strong (the transport of SPM), and how it reaches a denoiser.

A denoiser never sees a prompt, only its encoding. So the strengths are worked out where token ids and encodings are both at hand, in the
text encoder, are remembered by the encoding, and are looked up again for each row of the denoiser's batch, in whatever order rows are
stacked or repeated there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Transport = Literal["clipcos_tokenuni", "clipcos", "tokenuni", "allone"]
TRANSPORTS: tuple[str, ...] = get_args(Transport)
Merge = Literal["sum", "repo"]
MERGES: tuple[str, ...] = get_args(Merge)
_KEPT, _READ = 4096, 256
"""Encodings that are remembered, and entries of each by which it is recognised."""


def cosines(rows: Float[Tensor, "b l d"], concepts: Float[Tensor, "k l d"]) -> Float[Tensor, "b k"]:
    """cos(vec E(p), vec E(c)): of whole encodings, start and padding rows included, as in SPM's code. Unrelated prompts share much of
    these, so that their cosine is far from 0."""
    a, b = (F.normalize(part.float().flatten(1), dim=1) for part in (rows, concepts))
    return a @ b.T


def overlaps(ids: Int[Tensor, "b l"], concepts: Sequence[frozenset[int]], special: frozenset[int]) -> Float[Tensor, "b k"]:
    """|tok(p) ∩ tok(c)| / |tok(c)| for sets of token ids; those of `special` (start, end, padding) do not count. 0 for a row that does
    not begin with a special token: it is no tokenised prompt, and its ids mean nothing."""
    prompts = [frozenset(row) - special if row[0] in special else frozenset() for row in ids.tolist()]
    return torch.tensor([[len(p & c) / len(c) for c in concepts] for p in prompts])


@dataclass(frozen=True, eq=False)
class Concepts:
    """What strengths are worked out from, for k membranes."""

    rows: Float[Tensor, "n l d"]
    """Encodings of n texts."""
    tokens: tuple[frozenset[int], ...]
    """The token ids of each text without special ones."""
    member: Int[Tensor, " n"]
    """The membrane of each text, 0 … k − 1; a membrane with several texts takes the largest strength of them."""
    special: frozenset[int]

    def strengths(self, rows: Float[Tensor, "b l d"], ids: Int[Tensor, "b l"], transport: str) -> Float[Tensor, "b k"]:
        """γ of each prompt for each membrane: "clipcos_tokenuni" is max(cosine, overlap) (SPM), "allone" is 1."""
        count = int(self.member.max()) + 1
        if transport == "allone":
            return torch.ones(len(rows), count, device=rows.device)
        parts = []
        if "clipcos" in transport:
            parts.append(cosines(rows, self.rows))
        if "tokenuni" in transport:
            parts.append(overlaps(ids, self.tokens, self.special).to(rows.device))
        each = torch.stack(parts).amax(0)
        return torch.stack([each[:, self.member == i].amax(1) for i in range(count)], 1)


class UnknownRow(LookupError):
    """An encoding that the text encoder did not give while it was watched."""


@dataclass
class Memory:
    """Values by the encoding that they belong to, recognised by an even sample of its entries in the number format `dtype`."""

    dtype: torch.dtype
    values: dict[bytes, Tensor] = field(default_factory=dict)

    def learn(self, rows: Float[Tensor, "b l d"], values: Float[Tensor, "b k"]) -> None:
        """Remembers a value for each row; those of earlier calls lose their graph, and the oldest are forgotten."""
        self.values = {key: value.detach() for key, value in self.values.items()}
        self.values |= dict(zip(self._keys(rows), values, strict=True))
        for key in list(self.values)[: max(0, len(self.values) - _KEPT)]:
            del self.values[key]

    def recall(self, rows: Float[Tensor, "b l d"]) -> Float[Tensor, "b k"]:
        """The values of the rows. Raises UnknownRow for one that was never learned."""
        try:
            return torch.stack([self.values[key] for key in self._keys(rows)])
        except KeyError as error:
            raise UnknownRow from error

    def _keys(self, rows: Tensor) -> list[bytes]:
        flat = rows.detach().flatten(1)
        index = torch.linspace(0, flat.shape[1] - 1, min(_READ, flat.shape[1]), dtype=torch.float64).long().to(flat.device)
        return [key.tobytes() for key in flat[:, index].to(self.dtype).float().cpu().numpy()]


@dataclass(eq=False)
class Membranes:
    """Rank-1 adapters in place: y = W x + scale · Σ_c γ_c U_c (D_c x) for each row of the batch; `strengths` (b k) is set before each call.

    With `merge="repo"` as the released code merges, γ scales D and U of one adapter: Σ_c γ_c U_c Σ_b γ_b (D_b x), which is γ² for one
    membrane and has cross terms between several. Gradient checkpointing of the denoiser computes modules again after the call, with the
    strengths of the last one: do not use both."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """(down (k, i, …), up (o, k, …)) by the name of the module; membrane c has row c of down and column c of up."""
    scale: float = 1.0
    merge: str = "sum"
    strengths: Tensor | None = None

    def attach(self, modules: Mapping[str, nn.Module], hooks: ExitStack) -> None:
        """Hooks onto the modules; closing `hooks` takes them off."""
        for name in self.factors:
            hooks.callback(modules[name].register_forward_hook(self._hook(*self.factors[name])).remove)

    def _hook(self, down: Tensor, up: Tensor) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, gamma = inputs[0], self.strengths
            if gamma is None or len(gamma) != len(x):
                raise RuntimeError(f"a gated module got {len(x)} rows, and strengths are known for {0 if gamma is None else len(gamma)}")
            d, u = (p.to(x.device, torch.float32) for p in (down, up))
            with torch.autocast(x.device.type, enabled=False):
                if isinstance(module, nn.Conv2d):
                    narrow = F.conv2d(x.float(), d, None, module.stride, module.padding, module.dilation)
                    return output + F.conv2d(self._gated(narrow, gamma, 1), u).to(output.dtype)
                return output + F.linear(self._gated(F.linear(x.float(), d), gamma, -1), u).to(output.dtype)

        return hook

    def _gated(self, narrow: Tensor, gamma: Tensor, axis: int) -> Tensor:
        """D x times what goes before U, with the membranes along `axis`."""
        shape = [1] * narrow.ndim
        shape[0], shape[axis] = gamma.shape
        weight = gamma.to(narrow).reshape(shape)
        weighted = weight * narrow
        return self.scale * (weighted if self.merge == "sum" else weight * weighted.sum(axis, keepdim=True))


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a hooked call, however it was passed; None where it was not."""
    return kwargs.get(name) if name in kwargs else args[position] if len(args) > position else None

"""Searching for tokens of a prompt with gradients: relaxed rows over a table of embeddings, and where they stand in the prompt.

Shapes: `b` prompts, `l` positions of a prompt, `s` free positions of all prompts together, `v` tokens that may be drawn, `d` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Piece = int | None
"""A token id, or a free position."""


def simplex(rows: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    """The nearest point of the probability simplex for each row: max(u − μ, 0) with the μ for which it sums to one.

    Exact, by sorting (Duchi et al., ICML 2008, figure 1); UnlearnDiffAtk's code finds the same μ by bisection."""
    falling = rows.sort(-1, descending=True).values
    excess = falling.cumsum(-1) - 1
    rank = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    count = (falling * rank > excess).sum(-1, keepdim=True)
    return (rows - excess.gather(-1, count - 1) / count).clamp(min=0)


def drawn(weights: Float[Tensor, "s v"], generator: torch.Generator) -> Float[Tensor, "s v"]:
    """One token of each row's distribution, one-hot; its gradient goes to the row as it is."""
    picks = torch.multinomial(weights.detach().float().cpu(), 1, generator=generator)[:, 0].to(weights.device)
    return torch.nn.functional.one_hot(picks, weights.shape[-1]).to(weights.dtype) + (weights - weights.detach())


def nearest(points: Float[Tensor, "s d"], table: Float[Tensor, "v d"]) -> Int[Tensor, " s"]:
    """The row of the table with the largest cosine to each point (PEZ, arXiv 2302.03668)."""
    unit = torch.nn.functional.normalize
    return (unit(points, dim=-1) @ unit(table, dim=-1).T).argmax(-1)


def projected(points: Float[Tensor, "s d"], table: Float[Tensor, "v d"]) -> Float[Tensor, "s d"]:
    """The nearest rows of the table, with the gradient at them given to the points as it is."""
    with torch.no_grad():
        rows = table[nearest(points, table)]
    return rows + (points - points.detach())


def prefixed(body: Sequence[int], count: int) -> list[Piece]:
    """`count` free positions before the prompt."""
    return [*[None] * count, *body]


def interleaved(body: Sequence[int], every: int) -> list[Piece]:
    """A free position behind every `every` tokens of the prompt, and at least one: behind all of a shorter prompt."""
    pieces: list[Piece] = []
    for number, token in enumerate(body, 1):
        pieces += [token, None] if number % every == 0 else [token]
    return pieces if None in pieces else [*pieces, None]


def replaced(body: Sequence[int], start: int | None, length: int) -> list[Piece]:
    """One free position in the place of `length` tokens from `start` on; before the prompt where `start` is None."""
    return [None, *body] if start is None else [*body[:start], None, *body[start + length :]]


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt's own tokens."""

    start: int
    end: int
    pad: int
    length: int
    """l, start and end included."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Prompts with free positions."""

    ids: Int[Tensor, "b l"]
    """0 at free positions."""
    rows: Int[Tensor, " s"]
    places: Int[Tensor, " s"]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[Piece]], frame: Frame) -> Layout:
        """Start, pieces, end, padding; pieces that do not fit are cut off at the end."""
        ids, rows, places = [], [], []
        for row, pieces in enumerate(prompts):
            kept = list(pieces[: frame.length - 2])
            rest = frame.length - 2 - len(kept)
            ids.append([frame.start, *(0 if piece is None else piece for piece in kept), frame.end, *[frame.pad] * rest])
            free = [place for place, piece in enumerate(kept, 1) if piece is None]
            rows += [row] * len(free)
            places += free
        return cls(torch.tensor(ids), torch.tensor(rows, dtype=torch.long), torch.tensor(places, dtype=torch.long))

    def take(self, rows: Sequence[int]) -> tuple[Layout, Int[Tensor, " s"]]:
        """Some of the prompts in this order, and the numbers of their free positions in the whole."""
        slots = [(new, int(i)) for new, old in enumerate(rows) for i in (self.rows == old).nonzero()[:, 0]]
        chosen = torch.tensor([i for _, i in slots], dtype=torch.long)
        return Layout(self.ids[list(rows)], torch.tensor([n for n, _ in slots], dtype=torch.long), self.places[chosen]), chosen

    def with_ids(self, free: Int[Tensor, " s"]) -> Int[Tensor, "b l"]:
        """The token ids, with these at the free positions."""
        return self.ids.index_put((self.rows, self.places), free.cpu())

    def with_embeds(self, table: Float[Tensor, "v d"], free: Float[Tensor, "s d"]) -> Float[Tensor, "b l d"]:
        """The input embeddings, with these at the free positions; differentiable in them."""
        rows, places = self.rows.to(table.device), self.places.to(table.device)
        return table[self.ids.to(table.device)].index_put((rows, places), free.to(table.dtype))

"""Choosing candidate words for a target: the nearest by their encodings, then some spread evenly over the distances."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Encode = Callable[[list[str]], Tensor]
"""Texts to token encodings (n l d)."""


@torch.no_grad()
def distances(encode: Encode, words: Sequence[str], targets: Sequence[str], *, chunk: int = 256) -> Float[Tensor, "e n"]:
    """‖vec τ(target) − vec τ(word)‖₂ over all tokens, on the CPU. Words are encoded in chunks and not kept."""
    queries = encode(list(targets)).flatten(1).float()
    found = [torch.zeros(len(queries), 0)]
    for i in range(0, len(words), chunk):
        rows = encode(list(words[i : i + chunk])).flatten(1).float()
        found.append(torch.cdist(queries, rows, compute_mode="donot_use_mm_for_euclid_dist").cpu())
    return torch.cat(found, dim=1)


def nearest(distance: Float[Tensor, " n"], count: int) -> Int[Tensor, " k"]:
    """The indices of the `count` smallest distances, ascending; ties in their given order."""
    return torch.argsort(distance, stable=True)[:count]


def spread(distance: Float[Tensor, " n"], centers: int) -> Int[Tensor, " m"]:
    """The indices of the values nearest to the means of a one-dimensional k-means with `centers` clusters, by ascending distance.

    At most `centers`; fewer where two means share their nearest value. The k-means is exact: clusters of sorted numbers are
    intervals, and dynamic programming finds the best ones (Wang & Song, The R Journal 3(2), 2011), in O(n²) memory."""
    ordered, order = torch.sort(distance.double(), stable=True)
    if centers >= len(ordered):
        return order
    bounds = intervals(ordered, centers)
    means = torch.stack([ordered[a:b].mean() for a, b in bounds])
    chosen = (ordered[None] - means[:, None]).abs().argmin(1).unique()
    return order[chosen]


def intervals(ordered: Float[Tensor, " n"], count: int) -> list[tuple[int, int]]:
    """The split of sorted numbers into `count` intervals [a, b) with the least sum of squared deviations from their means."""
    cost = _deviations(ordered - ordered.mean())
    best, cuts = cost[0], []
    for _ in range(count - 1):
        before = torch.cat([best.new_full((1,), torch.inf), best[:-1]])  # the best split of everything left of a
        best, cut = (before[:, None] + cost).min(0)
        cuts.append(cut)
    end, found = len(ordered), []
    for cut in reversed(cuts):
        start = int(cut[end - 1])
        found.append((start, end))
        end = start
    return [(0, end), *reversed(found)]


def _deviations(x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
    """[a, b] is the sum of squared deviations of x_a … x_b from their mean; ∞ for a > b."""
    zero = x.new_zeros(1)
    first, second = (torch.cat([zero, v.cumsum(0)]) for v in (x, x.square()))
    size = torch.arange(1, len(x) + 1)[None] - torch.arange(len(x))[:, None]
    total, squares = first[None, 1:] - first[:-1, None], second[None, 1:] - second[:-1, None]
    return torch.where(size > 0, (squares - total.square() / size.clamp(min=1)).clamp(min=0), torch.inf)

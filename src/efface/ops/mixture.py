"""Sparse mixtures: of a distribution over many words only the few heaviest are kept."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def sparse(weights: Float[Tensor, "b n"], count: int) -> Float[Tensor, "b n"]:
    """Each row with its `count` largest entries alone, scaled to the sum 1 again; all where there are no more.

    The choice is a constant, and the gradient flows through the kept entries and their sum (AGE, `gumbel_topk`). Raises ValueError for
    a count below 1."""
    if count < 1:
        raise ValueError(f"count was {count}; expected at least 1 entry to keep")
    index = weights.topk(min(count, weights.shape[-1]), dim=-1).indices
    kept = weights * torch.zeros_like(weights).scatter(-1, index, 1.0)
    return kept / kept.sum(-1, keepdim=True)

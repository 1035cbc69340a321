"""Attention re-steering: how much attention some tokens of a prompt get; and learned words in the place of others.

Shapes: `b` rows, `n` heads, `q` places of the image, `l` tokens. Source: `src/train_attn.py` of SHI-Labs/Forget-Me-Not@a4a81e8.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def squared_attention(probabilities: Float[Tensor, "b n q l"], marked: Bool[Tensor, "b l"]) -> Float[Tensor, " b"]:
    """Σ A² over heads, places and marked tokens, for each row: what one layer adds to the square of the loss."""
    return (probabilities.float().square() * marked[:, None, None].to(probabilities.device)).sum((1, 2, 3))


def attention_norm(squares: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """The mean over rows of ‖A[marked]‖_F, from the sums of squares over all layers; its gradient is 0 where no attention is left."""
    return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt().mean()


def pulled(rows: Float[Tensor, "k d"], norm: float, share: float) -> Float[Tensor, "k d"]:
    """v ← v/‖v‖ · (‖v‖ + share (norm − ‖v‖)): rows whose length goes a share of the way to `norm`, and whose direction stays."""
    length = rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return rows / length * (length + share * (norm - length))


def spliced(embeds: Float[Tensor, "l d"], start: int, stop: int, rows: Float[Tensor, "k d"]) -> Float[Tensor, "l d"]:
    """`rows` in the place of the embeddings start … stop − 1; the length stays: the end is cut, or its last embedding repeated."""
    whole = torch.cat([embeds[:start], rows, embeds[stop:], embeds[-1:].expand(max(0, stop - start - len(rows)), -1)])
    return whole[: len(embeds)]

"""Sums of edits that were trained apart on the same weights: w₁ Δ₁ + w₂ Δ₂, in the place of one trained on top of the other."""

from __future__ import annotations

from dataclasses import replace

from efface.core.edit import Chain, LowRankEdit, WeightEdit
from efface.core.errors import Mismatch

Change = WeightEdit | LowRankEdit


def merge(first: Change, second: Change, *, weights: tuple[float, float] = (1.0, 1.0)) -> Chain:
    """w₁ Δ₁ + w₂ Δ₂ as one edit of the weights that both were trained on; it belongs where the first does.

    With a safety LoRA and a user's own this is Modular LoRA's merge (Kim et al., arXiv 2412.00357), whose weights are (1, 1).
    Raises Mismatch where the two were trained on different weights: then one has seen the other, and the sum is not what it learned."""
    if not first.card.fingerprint.same_weights(second.card.fingerprint):
        raise Mismatch("the two edits were trained on different weights; train both on the original ones, with nothing attached")
    card = replace(first.card, method=f"{first.card.method} merged with {second.card.method}")
    return Chain((scaled(first, weights[0]), scaled(second, weights[1])), card)


def scaled(edit: Change, weight: float) -> Change:
    """The edit with its change multiplied; −1 subtracts what it adds. Raises Mismatch for patches, which are right factors."""
    if isinstance(edit, LowRankEdit):
        return replace(edit, scale=weight * edit.scale)
    if edit.patches:
        raise Mismatch("an edit of right factors depends on the weights that it meets and cannot be scaled; expand it first")
    return replace(edit, deltas={name: weight * delta for name, delta in edit.deltas.items()})

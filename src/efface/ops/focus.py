"""What MACE's adapters learn from: sentences about a concept, the times at which its shape forms, and the attention inside a mask."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

MEDIA = ("photo", "image", "picture", "painting", "drawing")
FRAMES = (
    "a {m} of {c}",
    "a {m} of the {c}",
    "the {c} in a {m}",
    "a {m} with the {c}",
    "the {c} on a {m}",
    "a {m} of the {c} on white",
)
STYLE_FRAMES = (
    "a {m} by {c}",
    "a {m} in {c} style",
    "a {m} in the style of {c}",
    "the style of {c} in a {m}",
    "{c} style {m}",
    "the {m} of {c}",
)
SENTENCES = len(MEDIA) * len(FRAMES)
LIMITS = (0.2, 0.4)
"""Of the focal times, as shares of all."""


def sentences(text: str, count: int, *, style: bool = False) -> list[str]:
    """The first `count` of 30 sentences about something that is called `text`; those about another text differ in it alone."""
    return [frame.format(m=m, c=text) for frame in (STYLE_FRAMES if style else FRAMES) for m in MEDIA][:count]


def focal_weights(train_steps: int, sharpness: float = 0.05) -> Float[Tensor, " t"]:
    """p(t) ∝ σ(0.05 (t − 200)) − σ(0.05 (t − 400)), stretched from 1000 times to `train_steps` (MACE, section 4.2)."""
    t = 1000 * torch.arange(train_steps, dtype=torch.float64) / train_steps
    low, high = (torch.sigmoid(sharpness * (t - 1000 * limit)) for limit in LIMITS)
    return (low - high) / (low - high).sum()


def marked_attention(
    probabilities: Float[Tensor, "1 n q l"], mask: Float[Tensor, "h w"] | None, marked: Bool[Tensor, " l"], *, squared: bool = False
) -> Float[Tensor, ""]:
    """‖A[mask, S]‖_F over heads, places and marked tokens of one layer, or its square; the mask is brought to the layer's grid, and counts
    where it is above 0.5. None is every place."""
    chosen = probabilities[0, :, :, marked.to(probabilities.device)].float()
    if mask is not None:
        inside = interpolate(mask[None, None].float(), _grid(mask, probabilities.shape[2]), mode="nearest").flatten() > 0.5
        chosen = chosen[:, inside.to(chosen.device)]
    return chosen.square().sum() if squared else torch.linalg.vector_norm(chosen)


def hot(heat: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """1 where a map is at least half of its way from its least to its largest value, else 0; all ones for a flat map."""
    least, most = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return (heat >= (least + most) / 2).float()


def _grid(mask: Tensor, places: int) -> tuple[int, int]:
    """(h, w) of a layer with that many places, by halving the mask's sides."""
    height, width = mask.shape
    while height * width > places:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width

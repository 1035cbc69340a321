"""Goals that are combinations of predictions at one (x_t, t), in the network's own parametrisation.

Velocity is affine in the noise there, so that a combination whose weights sum to one is the same in both."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def erase_goal(neutral: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], eta: float) -> Float[Tensor, "b c h w"]:
    """ε_n − η (ε_e − ε_n): from the neutral prediction, guided away from the target (ESD, arXiv 2303.07345, eq. 6; AP; AGE)."""
    return neutral - eta * (target - neutral)


def erase_from_goal(
    start: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], empty: Float[Tensor, "b c h w"], eta: float
) -> Float[Tensor, "b c h w"]:
    """ε_f − η (ε_e − ε_∅): the prediction of f, guided away from the target (ESD's code of 2024).

    For f = e it is `erase_goal` with η − 1: ε_e − η (ε_e − ε_∅) = ε_∅ − (η − 1)(ε_e − ε_∅)."""
    return start - eta * (target - empty)

"""DDIM's stochastic step with more noise than its theory allows: the noise probe's knob."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def eta_step(
    clean: Float[Tensor, "b c h w"],
    direction: Float[Tensor, "b c h w"],
    a: Float[Tensor, "#b 1 1 1"],
    a_next: Float[Tensor, "#b 1 1 1"],
    noise: Float[Tensor, "b c h w"],
    *,
    eta: float,
    variance: float,
) -> Float[Tensor, "b c h w"]:
    """√ᾱ' x̂_0 + |1 − ᾱ' − σ²|^½ ε̂ + v σ ξ,   σ = η √((1 − ᾱ')/(1 − ᾱ)) √(1 − ᾱ/ᾱ').

    For η ≤ 1 and v = 1 this is DDIM (Song et al., arXiv 2010.02502, equations 12 and 16): deterministic at 0, DDPM at 1. Above some η the
    bracket turns negative, and its modulus is taken (Lu et al., arXiv 2505.17013, `eta_ddim_scheduler.py`).

    clean: x̂_0. direction: ε̂. a, a_next: ᾱ now and at the cleaner time. noise: ξ. eta: η ≥ 0. variance: v ≥ 0."""
    sigma = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).clamp(min=0).sqrt()
    return a_next.sqrt() * clean + (1 - a_next - sigma.square()).abs().sqrt() * direction + variance * sigma * noise

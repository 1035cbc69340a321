"""Ridge regression on linear maps in closed form: what UCE and its relatives solve.

    W' = argmin  Σ_i w_i ‖W' c_i − v_i‖² + μ ‖W' − W‖²_F  =  (μ W + Σ_i w_i v_i c_iᵀ) (μ I + Σ_i w_i c_i c_iᵀ)⁻¹

Where the outputs are v_i = W g_i for inputs g_i, one d × d matrix M serves every map that reads the same inputs:

    W' = W M,   M = (μ I + Σ_i w_i g_i c_iᵀ) (μ I + Σ_i w_i c_i c_iᵀ)⁻¹

All solves are in float64: half or single precision loses the answer when μ is small.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gram(contexts: Float[Tensor, "n d"], weights: Float[Tensor, " n"], mu: float) -> Float[Tensor, "d d"]:
    """μ I + Σ_i w_i c_i c_iᵀ, float64. Raises ValueError for μ ≤ 0, with which the inverse need not exist."""
    if not mu > 0:
        raise ValueError(f"the regulariser was {mu}; expected a number above 0, since without it the solve need not exist")
    c = contexts.double()
    return mu * torch.eye(c.shape[1], dtype=torch.float64, device=c.device) + (c * weights.double()[:, None]).T @ c


def common_factor(
    contexts: Float[Tensor, "n d"], targets: Float[Tensor, "n d"], weights: Float[Tensor, " n"], mu: float
) -> Float[Tensor, "d d"]:
    """M of the module's docstring, float64: W' = W M for every map that reads these inputs."""
    c, g = contexts.double(), targets.double()
    cross = mu * torch.eye(c.shape[1], dtype=torch.float64, device=c.device) + (g * weights.double()[:, None]).T @ c
    return solve_right(cross, gram(contexts, weights, mu))


def ridge(
    weight: Float[Tensor, "o d"], contexts: Float[Tensor, "n d"], outputs: Float[Tensor, "n o"], weights: Float[Tensor, " n"], mu: float
) -> Float[Tensor, "o d"]:
    """W' of the module's docstring, float64, for outputs that differ from map to map."""
    right = mu * weight.double() + (outputs.double() * weights.double()[:, None]).T @ contexts.double()
    return solve_right(right, gram(contexts, weights, mu))


def solve_right(b: Float[Tensor, "m d"], a: Float[Tensor, "d d"]) -> Float[Tensor, "m d"]:
    """b a⁻¹ for a symmetric positive definite a, by Cholesky."""
    return torch.cholesky_solve(b.T, torch.linalg.cholesky(a)).T


def without_component(target: Float[Tensor, "n o"], direction: Float[Tensor, "n o"]) -> Float[Tensor, "n o"]:
    """N − ⟨U, N⟩_F U with U = O/‖O‖_F: the block `target` without its component along the block `direction`."""
    unit = direction / direction.norm()
    return target - (unit * target).sum() * unit

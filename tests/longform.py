"""Ridge regression by the long way, with every row at hand: what `efface.ops.ridge` is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge(weight: Tensor, contexts: Tensor, outputs: Tensor, weights: Tensor, mu: float) -> Tensor:
    """argmin_V Σ_i w_i ‖V c_i − v_i‖² + μ ‖V − W‖²_F = (μ W + Σ_i w_i v_i c_iᵀ) (μ I + Σ_i w_i c_i c_iᵀ)⁻¹, float64 (o d)."""
    c, weighted = contexts.double(), weights.double()[:, None] * contexts.double()
    gram = mu * torch.eye(c.shape[1], dtype=torch.float64) + weighted.T @ c
    return torch.linalg.solve(gram, mu * weight.double() + outputs.double().T @ weighted, left=False)

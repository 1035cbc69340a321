"""The Fréchet distance of two sets of feature vectors, taken as Gaussians: what FID is on Inception's features."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frechet(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> float:
    """‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), with unbiased covariances; in the squared unit of the features, never negative.

    With centred rows A, B the last trace is ‖A Bᵀ‖_* / √((n−1)(m−1)), the sum of singular values, since the eigenvalues of
    AᵀA BᵀB are those of (A Bᵀ)(A Bᵀ)ᵀ; so no matrix root is taken. It is biased upwards by about 1/n: compare equal n only.

    Source: Dowson & Landau, J. Multivariate Analysis 12 (1982) 450; Heusel et al., arXiv 1706.08500.
    Raises ValueError for fewer than two rows in either, or values that are not finite."""
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a covariance needs two rows, and {len(first)} and {len(second)} were given")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("the features hold values that are not finite; look for broken pictures")
    (mean1, rows1), (mean2, rows2) = _centred(first), _centred(second)
    cross = torch.linalg.svdvals(rows1 @ rows2.T).sum()
    distance = (mean1 - mean2).square().sum() + rows1.square().sum() + rows2.square().sum() - 2 * cross
    return max(0.0, float(distance))


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and rows R with RᵀR = Σ: at most d of them, so that many pictures cost no more."""
    values = features.double()
    mean = values.mean(0)
    rows = (values - mean) / (len(values) - 1) ** 0.5
    return mean, torch.linalg.qr(rows).R if len(rows) > rows.shape[1] else rows

"""Changes of linear maps that are confined to a subspace: what SPEED is made of. Everything in float64.

Rows r of width d that a map W (o × d) must go on mapping as before have the second moment R = mean r rᵀ; P projects on the directions in
which R is small, and a change D P of the map leaves W r alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from efface.ops.ridge import LIMIT, IllConditioned, self_product


def second_moment(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """mean r rᵀ."""
    return self_product(rows) / len(rows)


def null_projector(moment: Float[Tensor, "d d"], threshold: float) -> Float[Tensor, "d d"]:
    """P on the eigenvectors of a second moment whose eigenvalue is below `threshold`; zero where there is none."""
    values, vectors = torch.linalg.eigh(moment.double())
    free = vectors[:, values.clamp(min=0) < threshold]
    return free @ free.T


def weakest_direction(weight: Float[Tensor, "o d"]) -> Float[Tensor, " d"]:
    """v with |v| = 1, the right singular vector of the smallest of the min(o, d) singular values of W.

    From the smaller of W Wᵀ and Wᵀ W: what squaring costs in accuracy matters little for a direction that W hardly sees."""
    w = weight.double()
    if len(w) >= w.shape[1]:
        return torch.linalg.eigh(self_product(w))[1][:, 0]
    image = torch.linalg.eigh(self_product(w.T))[1][:, 0] @ w
    return image / image.norm()


def centres(rows: Float[Tensor, "n d"], count: int, *, steps: int = 100) -> Float[Tensor, "k d"]:
    """At most `count` k-means centres, the same every time: started from the row farthest from the mean and each next one from those
    chosen, and moved (Lloyd) until they rest. Fewer where there are fewer different rows."""
    x = rows.double()
    chosen = x[(x - x.mean(0)).norm(dim=1).argmax()][None]
    while len(chosen) < count:
        away = torch.cdist(x, chosen).amin(1)
        if away.max() <= 1e-9 * x.norm(dim=1).max():
            break
        chosen = torch.cat([chosen, x[away.argmax()][None]])
    for _ in range(steps):
        nearest = torch.cdist(x, chosen).argmin(1)
        moved = torch.stack([x[nearest == k].mean(0) if (nearest == k).any() else centre for k, centre in enumerate(chosen)])
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return chosen


def shift(targets: Float[Tensor, "d d"], crossed: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """(A − T)(I + T)⁻¹: the change W ↦ W (I + B) that only erases, for T = mean t tᵀ and A = mean a tᵀ."""
    return torch.linalg.solve(torch.eye(len(targets)).to(targets) + targets, crossed - targets, left=False)


def confined(
    targets: Float[Tensor, "d d"],
    crossed: Float[Tensor, "d d"],
    projector: Float[Tensor, "d d"],
    invariants: Float[Tensor, "d k"],
    weight: float,
    regulariser: float,
    *,
    limit: float = LIMIT,
) -> tuple[Float[Tensor, "d d"], float]:
    """(E, condition number) of the change W ↦ W (I + E), E = D P, that solves

        min over D   mean ‖W (I + D P) t − W a‖² + l ‖W D P‖²   subject to   D P k = 0 for the columns k of `invariants`,

    which is E = (A − T) P (I − M Q P) M with M = (T P + l I)⁻¹, Q = K (Kᵀ P M K + μ I)⁻¹ Kᵀ; l = `weight`, μ = `regulariser`.
    With μ = 0 the inverse in Q is a pseudo-inverse: an invariant that P removes is kept anyway, and its multiplier is free.
    Raises IllConditioned for M."""
    eye = torch.eye(len(targets)).to(targets)
    system = targets @ projector + weight * eye
    inverse, info = torch.linalg.inv_ex(system)
    condition = float(torch.linalg.matrix_norm(system, 1) * torch.linalg.matrix_norm(inverse, 1))
    if info or not condition <= limit:
        raise IllConditioned(f"the matrix to be inverted has the condition number {condition:.1e}; at most {limit:.0e} is solved")
    reach = projector @ inverse @ invariants
    small = invariants.T @ reach
    small = (small + small.T) / 2 + regulariser * torch.eye(small.shape[0]).to(small)
    scale = float(invariants.square().sum()) / weight
    multipliers = torch.linalg.pinv(small, atol=1e-10 * scale, hermitian=True) @ reach.T
    return (crossed - targets) @ (projector @ inverse - reach @ multipliers), condition

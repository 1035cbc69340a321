"""Ridge regression on linear maps in closed form: what UCE and its relatives solve.

    W' = argmin  Σ_i w_i ‖W' c_i − v_i‖² + μ ‖W' − W‖²_F  =  (μ W + Σ_i w_i v_i c_iᵀ) (μ I + Σ_i w_i c_i c_iᵀ)⁻¹

Where the outputs are v_i = W g_i for inputs g_i, one d × d matrix serves every map that reads the same inputs:

    W' = W (I + D),   D = (Σ_i w_i (g_i − c_i) c_iᵀ) (μ I + Σ_i w_i c_i c_iᵀ)⁻¹

which is the form in use: `Statistics` holds the two sums while rows come in, concept by concept, so that memory does not grow with
their number; rows to keep have g = c and enter the second sum alone; the rank of D is at most the number of rows to erase, and
`RightFactor` keeps it as two thin factors while that is small.

Sums and solves are in float64: half or single precision loses the answer when μ is small. A solve whose condition number is beyond
`LIMIT` is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LIMIT = 1e12
"""The largest condition number that is solved; float64 then keeps some four digits."""
ROWS = 4096
"""Rows that are brought to float64 at a time."""


class IllConditioned(ArithmeticError):
    """A matrix that cannot be inverted, or only with the loss of nearly all digits."""


@dataclass(frozen=True, eq=False)
class RightFactor:
    """W ↦ W (I + D), one for all maps that read the same rows, with D = left · right, or `left` itself."""

    left: Float[Tensor, "d r"]
    right: Float[Tensor, "r d"] | None = None

    def dense(self) -> Float[Tensor, "d d"]:
        """D."""
        return self.left if self.right is None else self.left @ self.right

    def float(self) -> RightFactor:
        """The same in float32, on the CPU."""
        return RightFactor(self.left.float().cpu(), None if self.right is None else self.right.float().cpu())

    def change(self, weight: Float[Tensor, "o d"]) -> Float[Tensor, "o d"]:
        """W D, in the weight's precision or float32, the higher; by the thin factors where there are some."""
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        product = weight @ self.left.to(weight)
        return product if self.right is None else product @ self.right.to(weight)

    def then(self, other: RightFactor) -> RightFactor:
        """First this, then `other`: (I + D)(I + D') = I + [left, left' + D left'] [right; right']."""
        if self.right is None or other.right is None or len(self.right) + len(other.right) > len(self.left) // 2:
            first, second = self.dense(), other.dense()
            return RightFactor(first + second + first @ second)
        after = other.left + self.left @ (self.right @ other.left)
        return RightFactor(torch.cat([self.left, after], 1), torch.cat([self.right, other.right]))


@dataclass(frozen=True, eq=False)
class Solution:
    """A right factor, and the condition number of the matrix that was inverted for it."""

    factor: RightFactor
    condition: float


class Statistics:
    """The sums over rows that the solve needs, float64; see the module's docstring.

    Contexts may be wider (m) than what the maps read (d): then only `mapped` makes them solvable."""

    def __init__(self, width: int, *, context_width: int | None = None, device: torch.device | None = None) -> None:
        m = width if context_width is None else context_width
        options = {"dtype": torch.float64, "device": device}
        self.gram: Tensor = torch.zeros(m, m, **options)  # type: ignore[arg-type]
        """Σ w c cᵀ over the rows to erase (m m)."""
        self.cross: Tensor = torch.zeros(width, m, **options)  # type: ignore[arg-type]
        """Σ w g cᵀ over the rows to erase (d m)."""
        self.kept: Tensor = torch.zeros(width, width, **options)  # type: ignore[arg-type]
        """Σ w p pᵀ over the rows to keep (d d)."""
        self.thin: list[tuple[Tensor, Tensor]] | None = []
        """(√w c, √w g) of every row to erase while they are at most d/2, from which D is kept thin."""
        self.count = 0
        """Rows to erase so far."""

    def erase(self, contexts: Float[Tensor, "n m"], targets: Float[Tensor, "n d"], weight: float = 1.0) -> None:
        """Adds rows c (contexts) whose outputs shall be those of g (targets)."""
        for some, goals in zip(contexts.split(ROWS), targets.split(ROWS), strict=True):
            c, g = some.to(self.gram), goals.to(self.gram)
            self.count += len(c)
            self.thin = self.thin if self.count <= len(self.kept) // 2 else None
            self._add(weight**0.5 * c, weight**0.5 * g)

    def _add(self, c: Tensor, g: Tensor) -> None:
        self.gram.add_(self_product(c))
        self.cross.addmm_(g.T, c)
        if self.thin is not None:
            self.thin.append((c, g))

    def keep(self, rows: Float[Tensor, "n d"], weight: float = 1.0) -> None:
        """Adds rows whose outputs shall stay."""
        for part in rows.split(ROWS):
            self.kept.add_(self_product(part), alpha=weight)

    def mapped(self, by: Float[Tensor, "d m"]) -> Statistics:
        """The statistics of the contexts B c with the same targets and kept rows, without going over the rows again."""
        new = Statistics(len(self.kept), device=self.gram.device)
        new.kept, new.count = self.kept.clone(), self.count
        if self.thin is None:
            new.gram, new.cross, new.thin = by @ self.gram @ by.T, self.cross @ by.T, None
            return new
        for c, g in self.thin:
            new._add(c @ by.T, g)
        return new

    def joined(self, other: Statistics) -> Statistics:
        """The erased rows of both; the rows to keep are those of this one."""
        new = Statistics(len(self.kept), device=self.gram.device)
        new.gram, new.cross, new.kept = self.gram + other.gram, self.cross + other.cross, self.kept.clone()
        new.count = self.count + other.count
        both = None if self.thin is None or other.thin is None else self.thin + other.thin
        new.thin = both if new.count <= len(self.kept) // 2 else None
        return new

    def solve(self, mu: float, *, limit: float = LIMIT) -> Solution:
        """D for the regulariser μ ≥ 0. Raises IllConditioned."""
        system = Cholesky(self.gram + self.kept, mu, limit=limit)
        if self.thin is None:
            return Solution(RightFactor(system.right(self.cross - self.gram)), system.condition)
        none = self.gram.new_zeros(0, len(self.kept))
        c, g = (torch.cat([none, *(pair[i] for pair in self.thin)]) for i in (0, 1))
        return Solution(RightFactor((g - c).T, system.right(c)), system.condition)


class Cholesky:
    """A symmetric positive definite A + μ I, factorised once in float64. Raises IllConditioned beyond `limit`."""

    def __init__(self, a: Float[Tensor, "d d"], mu: float = 0.0, *, limit: float = LIMIT) -> None:
        a = a.double().clone()
        a.diagonal().add_(mu)
        self.triangle, info = torch.linalg.cholesky_ex(a)
        if info or not self.triangle.isfinite().all():
            raise IllConditioned("the matrix to be inverted is singular or not finite")
        self.condition = float(torch.linalg.matrix_norm(a, 1)) * self._inverse_norm()
        """In the 1-norm, estimated from below (`_inverse_norm`)."""
        if not self.condition <= limit:
            raise IllConditioned(f"the matrix to be inverted has the condition number {self.condition:.1e}; at most {limit:.0e} is solved")

    def left(self, b: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """(A + μ I)⁻¹ B."""
        return torch.cholesky_solve(b.double(), self.triangle)

    def right(self, b: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """B (A + μ I)⁻¹."""
        return self.left(b.T).T

    def _inverse_norm(self) -> float:
        """‖A⁻¹‖₁ from below by Hager's ascent (SIAM J. Sci. Stat. Comput. 5, 1984), in a handful of solves; rarely off by more than 3."""
        d = len(self.triangle)
        x = self.triangle.new_full((d, 1), 1 / d)
        best = 0.0
        for _ in range(5):
            y = self.left(x)
            best = max(best, float(y.abs().sum()))
            z = self.left(torch.where(y < 0, -1.0, 1.0).to(y))
            peak = int(z.abs().argmax())
            if z[peak].abs() <= (z * x).sum():
                break
            x = torch.zeros_like(x)
            x[peak] = 1
        return best


def self_product(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """xᵀ x in float64."""
    return _halved(x.double())


def _halved(x: Tensor, parts: int = 4) -> Tensor:
    """xᵀ x in the precision of x; of each two blocks on either side of the diagonal, one is computed."""
    columns = x.tensor_split(parts, dim=1)
    widths = [c.shape[1] for c in columns]
    full = x.new_empty(x.shape[1], x.shape[1])
    blocks = [row.split(widths, dim=1) for row in full.split(widths)]
    for i, column in enumerate(columns):
        for j in range(i, parts):
            blocks[i][j].copy_(column.T @ columns[j])
            if i < j:
                blocks[j][i].copy_(blocks[i][j].T)
    return full


def weight_gram(weights: Iterable[Float[Tensor, "_ d"]]) -> Float[Tensor, "d d"]:
    """Σ_i W_iᵀ W_i, summed in float64. Each product is taken in the weight's own precision (float32 at least), whose rounding is
    that of the weights themselves; it is what costs most in RECE, and float64 would double that."""
    total: Tensor | None = None
    for weight in weights:
        w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        product = _halved(w).double()
        total = product if total is None else total.add_(product)
    if total is None:
        raise ValueError("no weight was given; expected at least one")
    return total


def without_component(target: Float[Tensor, "n o"], direction: Float[Tensor, "n o"]) -> Float[Tensor, "n o"]:
    """N − ⟨U, N⟩_F U with U = O/‖O‖_F: the block `target` without its component along the block `direction`."""
    unit = direction / direction.norm()
    return target - (unit * target).sum() * unit

"""Changes confined to a null space: the optimum, what stays, and the parts."""

import pytest
import torch

from efface.core.sampling import seeded
from efface.ops.project import centres, confined, null_projector, second_moment, shift, weakest_direction
from efface.ops.ridge import IllConditioned

D = 12


@pytest.fixture
def case():
    """T, A, the rows to keep, P, K and W; three concepts, five kept rows."""
    g = seeded(0)
    t, a = torch.randn(2, 3, D, generator=g).double()
    kept, k, w = torch.randn(5, D, generator=g).double(), torch.randn(D, 2, generator=g).double(), torch.randn(7, D, generator=g).double()
    return t, a, kept, null_projector(second_moment(kept), 1e-6), k, w


def objective(w, e, t, a, weight):
    return ((t + t @ e.T - a) @ w.T).square().sum() / len(t) + weight * (w @ e).square().sum()


def test_the_change_is_the_constrained_optimum(case):
    """No change that P and the invariants allow lowers the objective, while one that they forbid does."""
    t, a, _, p, k, w = case
    e, _ = confined(second_moment(t), a.T @ t / 3, p, k, 0.5, 0.0)
    free = w.new_tensor(torch.randn(D, D, generator=seeded(1)).numpy())
    leave = torch.eye(D) - (p @ k) @ torch.linalg.pinv(p @ k)
    allowed = free @ leave.double() @ p
    assert (allowed @ k).norm() < 1e-9 < 0.1 < allowed.norm()
    here = objective(w, e, t, a, 0.5)
    for step in (1e-4, -1e-4):
        assert objective(w, e + step * allowed, t, a, 0.5) > here
    downhill = min(objective(w, e + step * free @ p, t, a, 0.5) for step in (1e-3, -1e-3))
    assert downhill < here


def test_kept_rows_and_invariants_stay_and_the_targets_move(case):
    t, a, kept, p, k, w = case
    e, condition = confined(second_moment(t), a.T @ t / 3, p, k, 0.5, 0.0)
    assert (e @ kept.T).norm() < 1e-9 and (e @ k).norm() < 1e-9
    assert ((t + t @ e.T - a) @ w.T).norm() < ((t - a) @ w.T).norm()
    loose, _ = confined(second_moment(t), a.T @ t / 3, torch.eye(D).double(), k, 0.5, 0.0)
    assert (loose @ kept.T).norm() > 0.1
    soft, _ = confined(second_moment(t), a.T @ t / 3, p, k, 0.5, 0.5)
    assert (soft @ k).norm() > 0.01
    assert 1 <= condition < 1e4


def test_an_anchor_equal_to_the_target_changes_nothing(case):
    t, _, _, p, k, _ = case
    e, _ = confined(second_moment(t), second_moment(t), p, k, 0.5, 0.0)
    assert e.abs().max() == 0


def test_an_invariant_that_the_projector_removes_needs_no_multiplier(case):
    """Then KᵀPMK is singular, and the solve is that without it."""
    t, a, kept, p, _, _ = case
    with_it, _ = confined(second_moment(t), a.T @ t / 3, p, kept[:2].T, 0.5, 0.0)
    bare, _ = confined(second_moment(t), a.T @ t / 3, p, torch.zeros(D, 1).double(), 0.5, 0.0)
    assert torch.allclose(with_it, bare, atol=1e-9)
    assert bare.norm() > 0.1


def test_a_hopeless_system_is_refused(case):
    t, a, _, p, k, _ = case
    with pytest.raises(IllConditioned, match="at most 1e"):
        confined(second_moment(t), a.T @ t / 3, p, k, 1e-30, 0.0)


def test_the_projector_holds_the_directions_that_rows_hardly_use(case):
    _, _, kept, p, _, _ = case
    assert torch.allclose(p @ p, p) and torch.allclose(p, p.T)
    assert round(float(p.trace())) == D - 5
    assert (kept @ p).norm() < 1e-9
    assert null_projector(second_moment(kept), 0.0).abs().max() == 0


def test_the_free_change_is_the_ridge_with_unit_weight(case):
    """W (A − T)(I + T)⁻¹ minimises mean ‖(W + Δ) t − W a‖² + ‖Δ‖²."""
    t, a, _, _, _, w = case
    e = (shift(second_moment(t), a.T @ t / 3)).requires_grad_(True)
    ((t + t @ e.T - a).square().sum() / 3 + e.square().sum()).backward()
    assert e.grad.norm() < 1e-9


@pytest.mark.parametrize("rows", [5, D, 20])
def test_the_weakest_direction(rows):
    w = torch.randn(rows, D, generator=seeded(2))
    _, _, right = torch.linalg.svd(w.double(), full_matrices=False)
    v = weakest_direction(w)
    assert abs(abs(v @ right[-1]) - 1) < 1e-6
    assert abs(v @ right[0]) < 1e-6


def test_centres_are_means_of_their_rows_and_always_the_same():
    g = seeded(3)
    spots = 10 * torch.randn(3, D, generator=g)
    rows = torch.cat([spot + 0.1 * torch.randn(6, D, generator=g) for spot in spots])
    found = centres(rows, 3)
    expected = torch.stack([part.double().mean(0) for part in rows.split(6)])
    assert torch.cdist(found, expected).amin(1).max() < 1e-6
    assert torch.equal(found, centres(rows, 3))
    assert len(centres(rows[:1].expand(4, -1), 3)) == 1

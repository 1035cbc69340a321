"""Ridge regression: its theorems, the long form against the short one, and the refusals."""

import pytest
import torch
from longform import ridge

from efface.core.sampling import seeded
from efface.ops.ridge import (
    Cholesky,
    IllConditioned,
    RightFactor,
    Statistics,
    self_product,
    weight_gram,
    without_component,
)

D = 12


@pytest.fixture
def g():
    return seeded(0)


def matrices(g, n=5, d=D, o=7):
    return torch.randn(o, d, generator=g).double(), torch.randn(n, d, generator=g).double(), torch.randn(n, d, generator=g).double()


def solved(c, v, weight=1.0, mu=0.3, keep=None, keep_weight=1.0):
    statistics = Statistics(c.shape[1])
    statistics.erase(c, v, weight)
    if keep is not None:
        statistics.keep(keep, keep_weight)
    return statistics.solve(mu)


def test_one_context_has_the_closed_form_of_the_sheet(g):
    """W' c = (μ W c + η ‖c‖² v)/(μ + η ‖c‖²), and W' c → v as μ → 0."""
    w, c, v = matrices(g, n=1)
    v = v @ w.T
    for mu, eta in [(0.5, 1.0), (2.0, 3.0)]:
        out = ridge(w, c, v, torch.tensor([eta]), mu) @ c[0]
        n = c[0].square().sum()
        assert torch.allclose(out, (mu * w @ c[0] + eta * n * v[0]) / (mu + eta * n))
        assert not torch.allclose(out, v[0], atol=1e-4)
    assert torch.allclose(ridge(w, c, v, torch.ones(1), 1e-9) @ c[0], v[0], atol=1e-4)


@pytest.mark.parametrize("n", [3, 30])
def test_the_statistics_solve_the_long_form(g, n):
    """With few rows the factor is thin, with many it is one matrix; both are the regression with every row at hand."""
    w, c, v = matrices(g, n=n)
    keep = torch.randn(4, D, generator=g).double()
    solution = solved(c, v, 0.7, 0.3, keep, 2.0)
    assert (solution.factor.right is None) == (n > D // 2)
    weights = torch.cat([torch.full((n,), 0.7), torch.full((4,), 2.0)])
    expected = ridge(w, torch.cat([c, keep]), torch.cat([v, keep]) @ w.T, weights, 0.3)
    assert torch.allclose(w + solution.factor.change(w), expected, atol=1e-9)


def test_rows_may_come_concept_by_concept(g):
    _, c, v = matrices(g, n=40)
    statistics = Statistics(D)
    for i in range(0, 40, 8):
        statistics.erase(c[i : i + 8], v[i : i + 8])
    assert torch.allclose(statistics.solve(0.3).factor.dense(), solved(c, v).factor.dense(), atol=1e-10)
    assert statistics.thin is None and statistics.count == 40


def test_vectors_orthogonal_to_all_contexts_keep_their_output(g):
    w, c, v = matrices(g)
    changed = w + solved(c, v, mu=0.5).factor.change(w)
    q = torch.linalg.qr(c.T, mode="complete")[0][:, 5:].T
    assert torch.allclose(changed @ q.T, w @ q.T, atol=1e-9)
    assert not torch.allclose(changed @ c.T, w @ c.T, atol=1e-2)


def test_rows_to_keep_alone_change_nothing(g):
    _, c, v = matrices(g)
    statistics = Statistics(D)
    statistics.keep(c)
    assert statistics.solve(0.1).factor.dense().abs().max() == 0
    assert solved(c, v, keep=c).factor.dense().abs().max() > 0.1


def test_the_solve_minimises_the_objective(g):
    w, c, v = matrices(g)
    v, weights, mu = v @ w.T, torch.rand(5, generator=g).double(), 0.4
    best = ridge(w, c, v, weights, mu).requires_grad_(True)

    def objective(m):
        return (weights[:, None] * (c @ m.T - v).square()).sum() + mu * (m - w).square().sum()

    objective(best).backward()
    assert best.grad.norm() < 1e-9
    assert objective(best) < objective(w)


@pytest.mark.parametrize("n", [3, 30])
def test_mapped_contexts_need_no_second_pass(g, n):
    w, c, v = matrices(g, n=n)
    by = torch.randn(D, D, generator=g).double()
    statistics = Statistics(D)
    statistics.erase(c, v, 0.7)
    statistics.keep(v[:2])
    direct = solved(c @ by.T, v, 0.7, 0.3, v[:2]).factor.dense()
    assert torch.allclose(statistics.mapped(by).solve(0.3).factor.dense(), direct, atol=1e-9)
    assert not torch.allclose(statistics.solve(0.3).factor.dense(), direct, atol=1e-3)


def test_joined_statistics_are_those_of_all_rows(g):
    _, c, v = matrices(g, n=10)
    one, two = Statistics(D), Statistics(D)
    one.erase(c[:3], v[:3])
    two.erase(c[3:], v[3:], 2.0)
    weights = torch.cat([torch.ones(3), torch.full((7,), 2.0)])
    joined, eye = one.joined(two).solve(0.3).factor.dense(), torch.eye(D)
    assert torch.allclose(joined + eye, ridge(eye, c, v, weights, 0.3), atol=1e-9)


@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 9), (9, 2)])
def test_factors_compose(g, first, second):
    def factor(rank):
        left, right = torch.randn(D, rank, generator=g).double(), torch.randn(rank, D, generator=g).double()
        return RightFactor(left, right) if rank < D // 2 else RightFactor(left @ right)

    a, b = factor(first), factor(second)
    both, eye = a.then(b), torch.eye(D).double()
    assert (both.right is None) == (first + second > D // 2)
    assert torch.allclose(eye + both.dense(), (eye + a.dense()) @ (eye + b.dense()))
    assert not torch.allclose(eye + both.dense(), (eye + b.dense()) @ (eye + a.dense()))


def test_products_of_a_matrix_with_itself(g):
    x = torch.randn(9, 10, generator=g)
    assert torch.allclose(self_product(x), x.double().T @ x.double())
    assert torch.allclose(weight_gram([x, 2 * x]), 5 * x.double().T @ x.double(), rtol=1e-5, atol=1e-5)
    assert weight_gram([x.bfloat16()]).dtype == torch.float64
    with pytest.raises(ValueError, match="at least one"):
        weight_gram([])


@pytest.mark.parametrize("exponent", [0, 3, 6])
def test_the_condition_number_is_near_and_below_the_true_one(g, exponent):
    q = torch.linalg.qr(torch.randn(20, 20, generator=g).double())[0]
    a = (q * torch.logspace(0, exponent, 20, dtype=torch.float64)) @ q.T
    true = torch.linalg.cond(a, 1)
    assert true / 3 < Cholesky(a).condition < true * 1.0001


def test_a_singular_or_hopeless_system_is_refused(g):
    _, c, _ = matrices(g, n=3)
    with pytest.raises(IllConditioned, match="singular"):
        Cholesky(-torch.eye(3))
    with pytest.raises(IllConditioned, match="condition number .* at most 1e"):
        Cholesky(c.T @ c, 1e-14)
    with pytest.raises(IllConditioned, match="not finite"):
        Cholesky(torch.full((2, 2), float("nan")))
    assert Cholesky(c.T @ c, 1e-3).condition > 100


def test_without_component_is_orthogonal_to_the_direction(g):
    n, o = torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g)
    assert abs((without_component(n, o) * o).sum()) < 1e-5 < abs((n * o).sum())

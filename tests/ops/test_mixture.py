"""Sparse mixtures."""

import pytest
import torch

from efface.core.sampling import seeded
from efface.ops.mixture import sparse


def test_the_heaviest_are_kept_in_their_proportions():
    y = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]])
    found = sparse(y, 2)
    assert torch.allclose(found[0], torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    assert (found > 0).sum(-1).tolist() == [2, 2]  # ties too
    assert torch.allclose(sparse(y, 9), y)


def test_the_gradient_is_that_of_the_kept_entries_and_their_sum():
    y = torch.rand(3, 6, generator=seeded(0)).softmax(-1).requires_grad_()
    value = torch.rand(6, generator=seeded(1))
    (found,) = torch.autograd.grad((sparse(y, 2) @ value).sum(), y)
    kept = sparse(y, 2) > 0
    for row, k, g in zip(y.detach(), kept, found, strict=True):
        mass, mean = row[k].sum(), (row[k] * value[k]).sum() / row[k].sum()
        assert torch.allclose(g[k], (value[k] - mean) / mass, atol=1e-6)
        assert not g[~k].any()
    assert float(found.abs().max()) > 1e-3


def test_an_empty_mixture_is_refused():
    with pytest.raises(ValueError, match="count was 0; expected at least 1"):
        sparse(torch.ones(1, 2), 0)

"""The nearest matrix of lower rank, and an adapter beside a network's own maps."""

import math

import pytest
import torch
from torch import nn

from efface.ops.lowrank import Adapter, can_adapt, fresh, truncated


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(rows=12, columns=7):
    return torch.randn(rows, columns, generator=seeded(1))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_is_that_of_the_values_left_out_and_no_other_matrix_of_the_rank_is_nearer(rank):
    a = matrix()
    down, up = truncated(a, rank=rank)
    assert (down.shape, up.shape) == ((rank, 7), (12, rank))
    error = float((a - up @ down).norm())
    assert error == pytest.approx(float(torch.linalg.svdvals(a)[rank:].norm()), abs=1e-5)
    other = torch.randn(rank, 7, generator=seeded(2))
    projection = torch.linalg.pinv(other) @ other  # the nearest among those with other rows
    assert rank == 7 or float((a - a @ projection).norm()) > error + 0.01


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.9999])
def test_energy_keeps_the_fewest_values_that_suffice(energy):
    a = matrix()
    rank = len(truncated(a, energy=energy)[0])
    square = torch.linalg.svdvals(a).double().square()
    assert square[:rank].sum() >= energy * square.sum() > square[: rank - 1].sum()
    down, up = truncated(a, energy=energy)
    assert float((a - up @ down).norm() / a.norm()) <= math.sqrt(1 - energy) + 1e-6


def test_a_matrix_of_low_rank_is_found_whole_at_its_rank():
    a = torch.randn(12, 2, generator=seeded(3)) @ torch.randn(2, 7, generator=seeded(4))
    down, up = truncated(a, energy=0.999999)
    assert len(down) == 2
    assert torch.allclose(up @ down, a, atol=1e-5)
    assert len(truncated(torch.zeros(3, 4))[0]) == 3
    assert len(truncated(torch.zeros(3, 4), energy=0.5)[0]) == 1


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"energy": math.nan}])
def test_a_rank_or_energy_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"rank was 0|energy was"):
        truncated(matrix(), **wrong)


LAYERS = {
    "linear": (nn.Linear(5, 6), (2, 3, 5)),
    "conv": (nn.Conv2d(5, 6, 3, stride=2, padding=1), (2, 5, 8, 8)),
    "1x1": (nn.Conv2d(5, 6, 1, bias=False), (2, 5, 8, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inside_an_adapter_the_map_is_the_sum(name):
    layer, shape = LAYERS[name]
    down, up = fresh(layer, 3, seeded())
    x = torch.randn(shape, generator=seeded(5))
    before = layer(x)
    with Adapter({"a": layer}, {"a": (down, up)}):
        assert torch.equal(layer(x), before)  # up is zero at the start
    up = torch.randn(up.shape, generator=seeded(6))
    summed = torch.func.functional_call(layer, {"weight": layer.weight + (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)}, x)
    with Adapter({"a": layer}, {"a": (down, up)}):
        assert torch.allclose(layer(x), summed, atol=1e-5)
    assert not torch.allclose(before, summed, atol=1e-2)
    assert torch.equal(layer(x), before)
    assert not layer._forward_hooks


def test_gradients_reach_the_factors_and_not_the_map():
    layer = nn.Linear(5, 6).requires_grad_(False)
    adapter = Adapter({"a": layer}, {"a": fresh(layer, 2, seeded())})
    with adapter:
        layer(torch.randn(3, 5, generator=seeded(7))).square().sum().backward()
    assert [p.grad.abs().sum() > 0 for p in adapter.parameters] == [False, True]  # down's gradient passes through up, which is zero
    assert layer.weight.grad is None
    adapter.parameters[1].data.fill_(1)
    assert not torch.equal(adapter.learned()["a"][1], torch.zeros(6, 2))


def test_what_has_no_matrix_is_refused():
    assert not can_adapt(nn.LayerNorm(4))
    assert not can_adapt(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="LayerNorm was given"):
        fresh(nn.LayerNorm(4), 1, seeded())

"""Candidates: the order by distance, and an exact one-dimensional k-means against every possible split."""

from itertools import combinations, pairwise

import pytest
import torch

from efface.core.sampling import seeded
from efface.ops.candidates import distances, intervals, nearest, spread

TABLE = {"": [0.0, 0.0], "near": [1.0, 0.0], "far": [3.0, 4.0], "middle": [0.0, 2.0]}


def encode(texts):
    return torch.tensor([[TABLE[t.lower()]] for t in texts])


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_distances_are_euclidean_over_the_flattened_encoding(chunk):
    found = distances(encode, ["far", "near", "NEAR"], ["", "near"], chunk=chunk)
    assert torch.allclose(found, torch.tensor([[5.0, 1, 1], [20**0.5, 0, 0]]))
    assert found[1, 1] == 0
    assert distances(encode, [], ["near"]).shape == (1, 0)


def test_the_nearest_come_first_and_ties_in_their_order():
    assert nearest(torch.tensor([3.0, 1, 2, 1]), 3).tolist() == [1, 3, 2]
    assert nearest(torch.tensor([3.0, 1]), 1000).tolist() == [1, 0]


def within(x, bounds):
    return sum(float((x[a:b] - x[a:b].mean()).square().sum()) for a, b in bounds)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_split_has_a_smaller_sum_of_squares(count):
    for seed in range(5):
        x = (100 + torch.randn(9, generator=seeded(seed)).double()).sort().values
        found = intervals(x, count)
        assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
        assert found[-1][1] == 9
        every = [within(x, list(pairwise([0, *cuts, 9]))) for cuts in combinations(range(1, 9), count - 1)]
        assert within(x, found) == pytest.approx(min(every), abs=1e-9)
        assert count == 1 or max(every) > min(every) + 1e-3


def test_spread_takes_a_word_from_each_cluster_in_order_of_distance():
    distance = torch.tensor([10.2, 1.0, 5.1, 10.0, 1.1, 5.0, 1.05, 9.8])
    chosen = spread(distance, 3)
    assert chosen.tolist() == [6, 5, 3] or chosen.tolist() == [6, 2, 3]
    assert spread(distance, 8).tolist() == nearest(distance, 8).tolist()


def test_equal_distances_collapse():
    assert len(spread(torch.tensor([1.0, 1, 1, 1, 2]), 4)) == 2

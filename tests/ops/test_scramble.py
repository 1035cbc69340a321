"""The scrambled grid: a bijection of cells that destroys an image's layout and nothing within a cell."""

import pytest
import torch

from efface.core.sampling import seeded
from efface.ops.scramble import cell_side, cut, join, layout, likeness, permutations, scramble, scramble_layout


def images(count=3, size=32):
    return torch.rand(count, 3, size, size + 8, generator=seeded(0))


def orders(count, cells, seed=1):
    return permutations(count, cells, seeded(seed))


def test_scrambling_is_a_bijection_of_pixels_and_its_inverse_undoes_it():
    x, order = images(), orders(3, 4 * 5)
    y = scramble(x, 8, order)
    assert not torch.equal(x, y)
    assert torch.equal(x.flatten(2).sort(-1).values, y.flatten(2).sort(-1).values)
    assert torch.equal(scramble(y, 8, order.argsort(1)), x)
    assert not torch.equal(scramble(y, 8, order), x)


def test_each_cell_of_the_result_is_the_cell_that_the_order_names():
    x, order = images(), orders(3, 20)
    cells, moved = cut(x, 8), cut(scramble(x, 8, order), 8)
    for row in range(3):
        for i, source in enumerate(order[row].tolist()):
            assert torch.equal(moved[row, i], cells[row, source])
    assert torch.equal(cells[0, 6], x[0, :, 8:16, 8:16])  # second row of cells, second of five columns
    assert torch.equal(join(cells, 5), x)


def test_one_cell_is_the_identity_and_seeds_decide():
    square = torch.rand(2, 3, 16, 16, generator=seeded(3))
    assert torch.equal(scramble(square, 16, orders(2, 1)), square)
    assert torch.equal(orders(2, 64), orders(2, 64))
    assert not torch.equal(orders(2, 64), orders(2, 64, seed=2))
    assert not torch.equal(*orders(2, 64).unbind())  # one permutation for each image
    assert torch.equal(orders(2, 64).sort(1).values, torch.arange(64).expand(2, -1))


def gradients_within(x, cell):
    cells = cut(x, cell)
    return sum(float(cells.diff(dim=d).square().sum()) for d in (-1, -2))


def smooth(count=1):
    """An image with a layout: a ramp, plus some texture."""
    ramp = torch.linspace(0, 0.8, 64)[None, None, :, None].expand(count, 3, 64, 64)
    return ramp + 0.1 * torch.rand(count, 3, 64, 64, generator=seeded(4))


def test_the_layout_is_lost_on_average_and_the_texture_within_cells_is_not():
    x, order = smooth().expand(400, -1, -1, -1), orders(400, 64)
    y = scramble(x, 8, order)
    alike = likeness(x, y, 8)
    assert abs(float(alike.mean())) < 0.05  # 400 permutations of 64 cells: standard error 0.006
    assert torch.allclose(likeness(x[:2], x[:2], 8), torch.ones(2), atol=1e-5)
    assert gradients_within(y[:1], 8) == pytest.approx(gradients_within(x[:1], 8), rel=1e-5)
    within_other_borders = [gradients_within(i[:1, :, 4:60, 4:60], 8) for i in (x, y)]
    assert within_other_borders[1] > 2 * within_other_borders[0]  # the control: cells that straddle the borders do change


def test_the_low_pass_reading_moves_the_means_and_leaves_the_rest():
    x, order = smooth(2), orders(2, 64)
    y = scramble_layout(x, 8, order)
    assert torch.allclose(layout(y, 8), layout(scramble(x, 8, order), 8), atol=1e-5)
    detail = [i - layout(i, 8).repeat_interleave(8, 2).repeat_interleave(8, 3) for i in (x, y, scramble(x, 8, order))]
    assert torch.allclose(detail[0], detail[1], atol=1e-5)
    assert not torch.allclose(detail[0], detail[2], atol=1e-2)


@pytest.mark.parametrize(
    ("size", "share", "side"), [(512, 1 / 16, 32), (512, 1 / 32, 16), (64, 1 / 16, 8), (64, 1 / 4, 16), (512, 1.0, 512)]
)
def test_the_cell_is_in_proportion_to_the_image_and_meets_latents(size, share, side):
    assert cell_side(size, size, share, 8) == side


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="cells of 7 pixels were asked of images of 32×40; expected a divisor"):
        cut(images(), 7)
    with pytest.raises(ValueError, match="no multiple of 8 pixels divides an image of 60×60"):
        cell_side(60, 60, 0.1, 8)

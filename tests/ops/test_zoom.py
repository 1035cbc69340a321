"""Smaller and larger pictures, and the latent cells that they cover."""

import pytest
import torch

from efface.core.sampling import seeded
from efface.ops.zoom import GREY, cells, scales, zoom


def test_scales_lie_in_two_intervals_with_the_shares_of_the_code():
    found = scales(4000, seeded(0))
    smaller = found <= 1
    assert float(smaller.float().mean()) == pytest.approx(2 / 3, abs=0.03)
    assert float(found[smaller].min()) == pytest.approx(1 / 3, abs=0.01)
    assert float(found[~smaller].min()) == pytest.approx(1.2, abs=0.01)
    assert float(found[~smaller].max()) == pytest.approx(1.4, abs=0.01)


def test_a_smaller_picture_stands_whole_on_grey_within_its_box():
    image = torch.zeros(3, 64, 64)
    framed, (top, bottom, left, right) = zoom(image, 0.5, (1.0, 0.0))
    assert (top, bottom, left, right) == (32, 64, 0, 32)
    assert not framed[:, top:bottom, left:right].any()
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[top:bottom, left:right] = False
    assert (framed[:, outside] == GREY).all()


def test_a_larger_picture_fills_the_frame_with_a_part_of_itself():
    image = torch.linspace(0, 1, 64)[None, None, :].expand(3, 64, 64)
    for corner, low, high in ((0.0, 0.0, 0.75), (1.0, 0.25, 1.0)):
        framed, box = zoom(image, 4 / 3, (0.5, corner))
        assert box == (0, 64, 0, 64)
        assert framed.shape == image.shape
        assert float(framed.min()) == pytest.approx(low, abs=0.03)
        assert float(framed.max()) == pytest.approx(high, abs=0.03)


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((0, 64, 0, 64), (0, 8), (0, 8)),  # the frame itself loses nothing
        ((0, 32, 32, 64), (0, 3), (5, 8)),
        ((16, 48, 9, 55), (3, 5), (3, 5)),
        ((20, 30, 20, 30), (3, 4), (3, 4)),  # too small to lose a cell on each side
    ],
)
def test_the_mask_is_one_cell_smaller_where_the_picture_ends_within_the_frame(box, rows, columns):
    expected = torch.zeros(1, 8, 8)
    expected[:, slice(*rows), slice(*columns)] = 1
    assert torch.equal(cells(box, 8, 8, (64, 64)), expected)

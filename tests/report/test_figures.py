"""The grid holds the pictures themselves; the curves are valid SVG in the page's colours."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from efface.bench.result import Result
from efface.core.edit import Part
from efface.core.errors import EffaceError
from efface.report import figures

from .conftest import Run


def test_the_grid_shows_before_over_after(run: Run) -> None:
    assert run.result.pictures is not None
    size = figures.TILE
    generator = torch.Generator().manual_seed(0)
    shape = (len(run.result.pictures.rows), 3, size, size)
    before, after = (torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8) for _ in range(2))
    sheet = np.asarray(figures.grid(replace(run.result, pictures=replace(run.result.pictures, before=before, after=after))))
    left, top = figures.MARGIN + figures.LABEL, figures.MARGIN + figures.TITLE
    for side, images in enumerate((before, after)):
        y = top + side * (size + figures.GAP)
        tile = sheet[y + 1 : y + size - 1, left + 1 : left + size - 1]
        assert np.array_equal(tile, images[0, :, 1:-1, 1:-1].permute(1, 2, 0).numpy())


def test_the_grid_has_a_row_for_each_role_and_large_pictures_shrink(run: Run) -> None:
    assert run.result.pictures is not None
    high = figures.TITLE + 2 * (figures.TILE + figures.GAP) + 2 * figures.MARGIN
    assert figures.grid(run.result).height == 2 * figures.MARGIN + 4 * high
    assert figures.grid(run.result, columns=2).width < figures.grid(run.result).width
    large = torch.zeros(len(run.result.pictures.rows), 3, 512, 512, dtype=torch.uint8)
    sheet = figures.grid(replace(run.result, pictures=replace(run.result.pictures, before=large, after=large)))
    assert sheet.width < 5 * 200 + 150


def test_a_grid_needs_pictures(run: Run) -> None:
    with pytest.raises(EffaceError, match="holds no pictures, since it was read from JSON"):
        figures.grid(Result.from_json(run.result.json()))


def test_curves_are_svg_in_the_pages_colours(run: Run) -> None:
    losses, words = figures.losses(run.edit), figures.words(run.edit)
    assert losses is not None
    assert set(words) == {"cat"}
    for svg in (losses, *words.values()):
        ElementTree.fromstring(figures.standalone(svg))
        assert "#01020" not in svg
        assert "currentColor" in svg
    for label in ("step", "loss", "erasing loss", "preserving loss"):
        assert f">{label}<" in losses
    for label in ("step", "chance to be drawn (%)", *run.edit.extras["trace"].info["candidates"]["cat"]):
        assert f">{label}<" in words["cat"]


def test_two_figures_on_one_page_share_no_definition(run: Run) -> None:
    ids = [
        set(re.findall(r' id="(p[0-9a-f]{6,}|m[0-9a-f]{6,}|image[0-9a-f]+)"', svg))
        for svg in (figures.losses(run.edit), figures.words(run.edit)["cat"])
    ]
    assert all(ids)
    assert not ids[0] & ids[1]


def test_the_same_edit_gives_the_same_figure(run: Run) -> None:
    assert figures.losses(run.edit) == figures.losses(run.edit)


def test_the_words_drawn_are_counted(run: Run) -> None:
    drawn = figures.drawn(run.edit, most=1000)
    assert sum(share for _, share in drawn) == pytest.approx(1)
    assert [share for _, share in drawn] == sorted((share for _, share in drawn), reverse=True)


def test_an_edit_without_a_trace_has_no_figures(run: Run) -> None:
    for extras in ({}, {"trace": Part(info={"condition": [1.0]})}):
        edit = replace(run.edit, extras=extras)  # type: ignore[type-var]
        assert (figures.losses(edit), figures.words(edit), figures.drawn(edit)) == (None, {}, [])


def test_a_running_mean_keeps_a_constant_and_the_mean_of_noise() -> None:
    assert torch.allclose(figures._smooth(torch.full((50,), 3.0)), torch.full((50,), 3.0, dtype=torch.float64))
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    smooth = figures._smooth(noise)
    assert float(smooth.std()) < 0.2 * float(noise.std())

"""`efface sweep --pictures`: a labelled picture of every task beside the page, from the edits that are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

GRID = """
title = "A small sweep"
model = {model}
[[grid]]
tasks = ["cat", "dog"]
methods = ["uce", "negative_prompt"]
"""
PAGE = ("--markdown", "docs/grid.md", "--pictures")


def test_a_page_shows_each_task_and_nothing_is_drawn_twice(efface: Callable, model_folder: Path) -> None:
    Path("grid.toml").write_text(GRID.format(model=json.dumps(str(model_folder))), encoding="utf-8")
    outcome = efface("sweep", "grid.toml", *PAGE)
    assert outcome.code == 0, outcome.err
    page = Path("docs/grid.md").read_text(encoding="utf-8")
    names = ["grid-cat.jpg", "grid-dog.jpg"]
    assert [name for name in names if f"]({name})" in page] == names
    assert page.index("## object: cat") < page.index(names[0]) < page.index("| *un-erased*") < page.index(names[1])
    whole = height(names[0])
    strips = sorted(Path("runs/grid/strips").iterdir())
    assert len(strips) == 6  # two methods and the un-erased model, twice
    times = [strip.stat().st_mtime_ns for strip in strips]
    missing = next(path for path in Path("runs/grid/edits").glob("*.safetensors") if any(path.stem in s.name for s in strips))
    missing.unlink()
    next(strip for strip in strips if missing.stem in strip.name).unlink()
    again = efface("sweep", "grid.toml", *PAGE)
    assert again.code == 0, again.err
    assert "1 records have no edit beside them" in again.err
    kept = [strip for strip in strips if strip.is_file()]
    assert [s.stat().st_mtime_ns for s in kept] == [t for s, t in zip(strips, times, strict=True) if s in kept]
    assert sorted(map(height, names)) < [whole, whole], "a row less, in one of the two"


def height(name: str) -> int:
    with Image.open(Path("docs", name)) as image:
        return image.height


def test_a_page_of_pictures_needs_a_page_and_an_erasure(efface: Callable, model_folder: Path) -> None:
    grid = GRID.format(model=json.dumps(str(model_folder)))
    Path("grid.toml").write_text(grid, encoding="utf-8")
    outcome = efface("sweep", "grid.toml", "--pictures")
    assert outcome.code == 2
    assert "add --markdown FILE" in outcome.err
    assert not Path("runs").exists()

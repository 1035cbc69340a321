"""docs/methods: a page for every method of the catalogue, with what was measured and what was published beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from efface.core import catalog
from efface.report import docs
from efface.report.profiles import profile
from efface.report.published import published
from efface.report.records import Gathered
from efface.report.site import Site

from .conftest import Run
from .parts import failed, trial

FOLDER = Path(__file__).parents[2] / "docs" / "methods"
SECTIONS = ("## When to use it, and its limits", "## How it works", "## What a fit costs", "## Measured", "## Published")


def test_the_documents_have_a_page_for_every_method() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {docs.INDEX, *(f"{name}.md" for name in catalog.names())}


@pytest.mark.parametrize("name", catalog.names())
def test_every_page_has_its_parts(name: str) -> None:
    text, about = (FOLDER / f"{name}.md").read_text(encoding="utf-8"), profile(name)
    assert about is not None
    assert f"# {about.title}" in text
    places = [text.index(section) for section in SECTIONS]
    assert places == sorted(places)
    tables = published().of(name)
    assert text.count("Not comparable with what is measured here because") == len(tables)
    assert all(" | ".join(table.cells(row)) in text for table in tables for row in table.rows)
    assert f"]({name}.md)" in (FOLDER / docs.INDEX).read_text(encoding="utf-8")


def test_pages_are_made_of_records(run: Run, tmp_path: Path) -> None:
    site = Site(Gathered((trial(run, "ap", 38, 2), failed("uce"))), "", "efface report --docs x")
    assert docs.write(site, tmp_path) == sorted([docs.INDEX, *(f"{name}.md" for name in catalog.names())])
    ap, uce, rece = ((tmp_path / f"{name}.md").read_text(encoding="utf-8") for name in ("ap", "uce", "rece"))
    assert "<!-- Written by `efface report --docs x`" in ap
    assert "| object: cat | *un-erased* |  | 0.0 % [0.0 to 8.8]" in ap
    assert "| object: cat | `ap` | 1 | 95.0 %" in ap
    assert "it says nothing about Stable Diffusion" in ap
    assert "- object: cat, `uce`, seed 0: Diverged: the loss is not finite" in uce
    assert "Not measured yet." in uce
    assert "Not measured yet." in rece


def test_tables_have_as_many_cells_in_every_line(run: Run, tmp_path: Path) -> None:
    docs.write(Site(Gathered((trial(run, "ap", 38, 2),)), "", "x"), tmp_path)
    for path in tmp_path.iterdir():
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            rows = [line.replace("\\|", "").count("|") for line in block.splitlines() if line.startswith("| ")]
            assert len(set(rows)) <= 1, block

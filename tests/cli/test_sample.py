"""`efface sample`: what it draws is what the model draws, and the record says how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from PIL import Image

from efface.models.load import load


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1)


def test_pictures_are_those_of_the_model(efface: Callable, model_folder: Path) -> None:
    outcome = efface("sample", "cat", "dog", "--count", 2, "--seed", 5, "--model", model_folder, "--out", "drawn", "--json")
    assert outcome.code == 0
    data = outcome.json
    assert [(p["prompt"], p["seed"]) for p in data["pictures"]] == [("cat", 5), ("cat", 6), ("dog", 5), ("dog", 6)]
    expected = load(model_folder).sample(["cat", "cat", "dog", "dog"], seeds=[5, 6, 5, 6])
    for image, row in zip(expected, data["pictures"], strict=True):
        assert (pixels(Path("drawn") / row["file"]).float() - 255 * image).abs().max() < 1
    assert {p.name for p in Path("drawn").iterdir()} == {"000.png", "001.png", "002.png", "003.png", "grid.png", "record.json"}
    assert pixels(Path("drawn/grid.png")).shape == (3, 2 * 132 + 4, 2 * 132 + 4)


def test_an_edit_changes_what_is_drawn_and_leaves_no_trace(efface: Callable, model_folder: Path) -> None:
    assert efface("erase", "cat", "--method", "uce", "--model", model_folder, "--images", "none", "--out", "no-cat").code == 0
    for out, extra in (("before", []), ("after", ["--edit", "no-cat"]), ("again", [])):
        assert efface("sample", "cat", "--model", model_folder, "--out", out, *extra).code == 0
    before, after, again = (pixels(Path(name) / "000.png") for name in ("before", "after", "again"))
    assert torch.equal(before, again)
    assert not torch.equal(before, after)


def test_an_earlier_result_is_replaced_only_with_force(efface: Callable, model_folder: Path) -> None:
    arguments = ("sample", "cat", "--model", model_folder, "--out", "drawn")
    assert efface(*arguments).code == 0
    refused = efface(*arguments)
    assert (refused.code, "--force" in refused.err) == (2, True)
    assert efface(*arguments, "--force").code == 0

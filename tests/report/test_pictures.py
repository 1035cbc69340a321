"""Strips: the very pictures of the trial, un-erased and erased on the same noise; what lies there already is not drawn again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchparts import load, prepare
from PIL import Image, ImageFont

from efface.bench.options import Options
from efface.bench.run import run
from efface.bench.trial import Trial
from efface.core.edit import Edit
from efface.core.errors import Mismatch
from efface.report import pictures
from efface.report.contact import MARGIN, TALL, _wrapped, contact
from efface.report.pictures import GAP, draw, joined, sheets
from efface.report.records import Gathered, gather
from efface.report.rows import by_task

TRIALS = (Trial.of("tiny", "uce", "cat"), Trial.of("tiny", "uce", "cat", 1), Trial.of("tiny", "negative_prompt", "cat"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Gathered:
    folder = tmp_path_factory.mktemp("sweep")
    run(TRIALS, folder, load=load, setup=prepare)
    return gather([folder])


def test_a_strip_is_the_trials_own_pictures(found: Gathered, tmp_path: Path) -> None:
    (sheet,) = sheets(by_task(found.trials), found.edits)
    assert [strip.label for strip in sheet.strips] == ["un-erased", "uce", "negative_prompt"]
    assert {shot.role for shot in sheet.shots} == {"target", "neighbour", "unrelated", "pair"}
    model, done = load("tiny"), []
    draw(sheet, model, found.edits, tmp_path, lambda: done.append(1))
    assert len(done) == 3
    prompts, seeds = [shot.prompt for shot in sheet.shots], [shot.seed for shot in sheet.shots]
    for strip in sheet.strips:
        strips = np.asarray(Image.open(tmp_path / strip.file).convert("RGB"))
        sample = {"seeds": seeds, "steps": 2, "guidance": 2.0}
        if strip.trial:
            with Edit.load(found.edits[strip.trial]).attach(model):
                images = model.sample(prompts, **sample)
        else:
            images = model.sample(prompts, **sample)
        size = images.shape[-1]
        for i, image in enumerate(images):
            expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(strips[:, i * (size + GAP) : i * (size + GAP) + size], expected)
    files = [(tmp_path / strip.file).read_bytes() for strip in sheet.strips]
    assert len(set(files)) == 3
    assert not model.attached


def test_what_lies_there_is_not_drawn_again_and_what_has_no_edit_not_at_all(found: Gathered, tmp_path: Path) -> None:
    (sheet,) = sheets(by_task(found.trials))
    kept = tmp_path / sheet.strips[1].file
    kept.write_bytes(b"kept")
    edits = {sheet.strips[1].trial: found.edits[sheet.strips[1].trial]}
    draw(sheet, load("tiny"), edits, tmp_path)
    assert kept.read_bytes() == b"kept"
    assert not (tmp_path / sheet.strips[2].file).exists()
    shown = sheet.among(frozenset(path.name for path in tmp_path.iterdir()))
    assert shown is not None
    assert [strip.label for strip in shown.strips] == ["un-erased", "uce"]
    assert sheet.among(frozenset({sheet.strips[0].file})) is None


def test_the_fit_whose_edit_is_there_is_shown(found: Gathered) -> None:
    second = TRIALS[1].hash
    (sheet,) = sheets(by_task(found.trials), {second})
    assert [strip.trial for strip in sheet.strips] == ["", second, TRIALS[2].hash]


def test_the_name_hangs_on_what_the_pictures_hang_on(found: Gathered) -> None:
    (sheet,) = sheets(by_task(found.trials))
    other = [{**r, "ground": {**r["ground"], "weights": "others/float32"}} for r in found.trials]
    (moved,) = sheets(by_task(other))
    assert not {strip.file for strip in sheet.strips} & {strip.file for strip in moved.strips}


def test_other_weights_are_refused(found: Gathered, tmp_path: Path) -> None:
    (sheet,) = sheets(by_task(found.trials))
    with pytest.raises(Mismatch, match="rest on the weights others/float32, and tiny has"):
        draw(replace(sheet, weights="others/float32"), load("tiny"), found.edits, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_large_pictures_are_shrunk_and_gaps_are_transparent() -> None:
    strip = joined(torch.full((3, 3, 512, 512), 200, dtype=torch.uint8))
    assert strip.size == (3 * pictures.LARGEST + 2 * GAP, pictures.LARGEST)
    assert strip.getpixel((pictures.LARGEST, 5)) == (0, 0, 0, 0)
    assert strip.getpixel((pictures.LARGEST - 1, 5)) == (200, 200, 200, 255)


def test_the_edit_of_an_attack_on_the_same_fit_is_the_trials_own(tmp_path: Path) -> None:
    """A sweep of attacks keeps the edits that it fitted; another seed's is another fit."""
    erasure, other = TRIALS[0], TRIALS[1]
    attack = Trial.of("tiny", "uce", "cat", 0, "attacks", options=Options(attack="seed_search(seeds=1)", limit=1))
    run([erasure, other], tmp_path / "erasures", load=load, setup=prepare)
    for path in (tmp_path / "erasures/edits").iterdir():
        path.unlink()
    assert gather([tmp_path / "erasures"]).edits == {}
    run([attack], tmp_path / "attacks", load=load, setup=prepare)
    (path,) = (each for each in (tmp_path / "attacks/edits").iterdir() if ".trace" not in each.name)
    assert gather([tmp_path / "erasures", tmp_path / "attacks"]).edits == {erasure.hash: path, attack.hash: path}


def test_a_contact_sheet_has_a_row_for_each_strip_and_says_which(found: Gathered, tmp_path: Path) -> None:
    (sheet,) = sheets(by_task(found.trials), found.edits)
    draw(sheet, load("tiny"), found.edits, tmp_path)
    page = contact(sheet, tmp_path)
    for row, strip in enumerate(sheet.strips):
        pictures = Image.open(tmp_path / strip.file).convert("RGBA")
        size = pictures.height
        left, top = page.width - MARGIN - pictures.width, page.height - MARGIN - (len(sheet.strips) - row) * (size + GAP)
        there = np.asarray(page.crop((left, top, left + size, top + size)))
        assert np.array_equal(there, np.asarray(pictures.convert("RGB"))[:, :size])
        label = np.asarray(page.crop((0, top, left - 1, top + size)))
        assert (label < 200).any(), f"{strip.label} has no label"


def test_long_headings_are_wrapped_and_cut() -> None:
    font = ImageFont.load_default(10)
    lines = list(_wrapped("a cat beside a very long list of other things that nobody would ever read to its end, honestly", 64, font))
    assert len(lines) == TALL
    assert lines[-1].endswith("…")
    assert all(font.getlength(line.rstrip("…")) <= 64 for line in lines)
    assert list(_wrapped("a cat", 64, font)) == ["a cat"]

"""The page stands alone, says what the result says, and believes no text that it is given."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efface.bench.result import Result
from efface.core.edit import Chain, Patch, SamplingEdit, WeightEdit
from efface.core.evidence import Sighting
from efface.core.rules import NegativePrompt
from efface.ops.ridge import RightFactor
from efface.report import page, wording

from .conftest import Run

COMMAND = "efface erase cat --keep dog,tiger --method ap --out runs/no-cat"
VOID = {"meta", "img", "br", "path", "use", "image"}


class Reader(HTMLParser):
    """Collects what a browser would fetch or run, and complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action") and not (v or "").startswith("#")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_is_fetched_and_nothing_runs(run: Run) -> None:
    html = page.render(run.result, edit=run.edit, command=COMMAND)
    reader = Reader(html)
    assert reader.fetched
    assert all(uri.startswith("data:image/") for uri in reader.fetched)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert not re.search(r"url\((?!#)|@import", html)  # url(#…) is a clip path of a figure
    assert "default-src 'none'" in html


def test_it_says_what_the_result_says(run: Run) -> None:
    text = " ".join(Reader(page.render(run.result, edit=run.edit, command=COMMAND)).text.split())
    assert wording.verdict(run.result) in text
    for line in run.result.lines:
        assert line.title in text
        assert line.explanation in text
        for score in (line.contrast.before, line.contrast.after, line.contrast.change):
            assert wording.value(score) in text
            assert wording.interval(score) in text
    for part in (
        COMMAND,
        run.edit.card.method,
        run.edit.threat,
        run.result.settings.prompts,
        "DDIMScheduler, 2 steps, guidance 2",
        "untrained",
    ):
        assert part in text
    assert all(shot.prompt in text for shot in run.result.before.shots)


def test_the_pictures_are_those_of_the_result(run: Run) -> None:
    assert run.result.pictures is not None
    html = page.render(run.result, edit=run.edit, command=COMMAND)
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(embedded) == 2 * len(run.result.pictures.rows)
    for uri, tensor in zip(embedded[:2], (run.result.pictures.before[0], run.result.pictures.after[0]), strict=True):
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
        assert np.array_equal(found, tensor.permute(1, 2, 0).numpy())


def test_large_pictures_are_shrunk() -> None:
    uri = page.uri(torch.full((3, 512, 512), 127, dtype=torch.uint8))
    assert uri.startswith("data:image/webp;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (page.LARGEST, page.LARGEST)


def test_it_believes_no_text(run: Run) -> None:
    evil = "<script>alert('1')</script>"
    shots = tuple(replace(shot, prompt=evil, concept=evil) for shot in run.result.before.shots)
    seen = tuple(Sighting((evil,), (1.0,)) for _ in shots)
    samples = [replace(side, shots=shots, sightings=seen) for side in (run.result.before, run.result.after)]
    concepts = tuple(replace(line, concept=evil) for line in run.result.concepts)
    result = replace(run.result, task=evil, model=evil, before=samples[0], after=samples[1], concepts=concepts, unmeasured=(evil,))
    trace = run.edit.extras["trace"]
    words = {target: [f"{evil}$x_1$" for _ in names] for target, names in trace.info["candidates"].items()}
    info = {**trace.info, "candidates": words, "words": [evil for _ in trace.info["words"]]}
    edit = replace(run.edit, extras={"trace": replace(trace, info=info)})  # type: ignore[type-var]
    html = page.render(result, edit=edit, command=evil)
    assert "<script" not in html
    assert Reader(html).text.count(evil) > len(shots)


def test_without_a_detector_it_says_so(run: Run) -> None:
    reader = Reader(page.render(run.bare, edit=run.edit, command=COMMAND))
    text = " ".join(reader.text.split())
    assert "“cat”: not judged" in text
    assert "no detector looked" in text
    assert "ESR" not in text
    assert "How far the pictures moved" in text


def test_an_edit_of_any_kind_and_without_a_trace(run: Run) -> None:
    assert isinstance(run.edit, WeightEdit)
    plain = Reader(page.render(run.result, edit=replace(run.edit, extras={}), command=COMMAND))
    assert "svg" not in plain.tags
    assert page.trained(run.edit).endswith(f"parameters in {len(run.edit.deltas)} tensors")
    hook = SamplingEdit(NegativePrompt("cat"), run.edit.card)
    assert page.trained(hook) == "no weights: 1 sampling hook"
    assert page.trained(Chain((run.edit, hook), run.edit.card)) == f"{page.trained(run.edit)}; no weights: 1 sampling hook"


def test_one_matrix_for_many_maps_counts_as_it_is_stored(run: Run) -> None:
    factors = RightFactor(torch.zeros(32, 3), torch.zeros(3, 32)), RightFactor(torch.zeros(32, 32))
    thin, whole = (WeightEdit({}, run.edit.card, patches=(Patch(("a", "b", "c"), factor),)) for factor in factors)
    assert page.trained(thin) == "192 stored numbers for 3 tensors"
    assert page.trained(whole) == "1,024 stored numbers for 3 tensors"
    both = replace(whole, deltas={"d": torch.zeros(5, 2)})
    assert page.trained(both) == "1,034 stored numbers for 4 tensors"
    assert "192 stored numbers for 3 tensors" in page.render(run.result, edit=thin, command=COMMAND)
    assert page.trained(replace(both, patches=())) == "10 parameters in 1 tensors"  # the control: without the matrix


def test_a_result_read_from_json_has_a_page_without_pictures(run: Run) -> None:
    again = Result.from_json(run.result.json())
    reader = Reader(page.render(again, edit=run.edit, command=COMMAND))
    assert "img" not in reader.tags
    assert wording.verdict(again) in " ".join(reader.text.split())


def test_it_is_written_whole_or_not_at_all(run: Run, tmp_path: Path) -> None:
    path = page.write(run.result, tmp_path / "new" / "report.html", edit=run.edit, command=COMMAND)
    assert path.read_text(encoding="utf-8") == page.render(run.result, edit=run.edit, command=COMMAND)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    taken = tmp_path / "taken"
    (taken / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        page.write(run.result, taken, edit=run.edit, command=COMMAND)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "taken"]


def test_a_protocol_with_a_finding_of_its_own_says_it_and_bars_are_of_shares_alone(run: Run) -> None:
    """Its first line has another unit; the same result without a finding is the control."""
    first, *rest = run.result.lines
    score = replace(first.contrast.after, unit="CLIP", value=24.06)
    other = replace(first, headline=True, contrast=replace(first.contrast, before=score, after=score, change=score))
    settings = replace(run.result.settings, protocol="artists/emoji/quick")
    result = replace(run.result, lines=(other, *rest), settings=settings, finding="it went as it went")
    found, plain = (page.render(each, edit=run.edit, command=COMMAND) for each in (result, run.result))
    assert '<p class="lead">It went as it went.</p>' in found
    assert "in the protocol “artists”" in found
    assert found.count('<div class="track">') == plain.count('<div class="track">') - 1
    assert "<strong>24.1</strong>" in found
    assert "The other lines" in found
    assert "The other lines" not in plain
    Reader(found)

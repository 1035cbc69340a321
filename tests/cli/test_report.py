"""`efface report`: a folder of pages from a real sweep, with pictures, and the documents' pages."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from benchparts import prepare

from efface.bench.run import run
from efface.bench.trial import Trial
from efface.core import catalog
from efface.models.load import load


@pytest.fixture(scope="module")
def sweep(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    trials = [Trial.of(str(model_folder), method, "cat") for method in ("uce", "negative_prompt")]
    run(trials, folder, load=load, setup=prepare)
    return folder


def test_pages_with_pictures_that_a_second_report_keeps(sweep: Path, efface: Callable) -> None:
    outcome = efface("report", sweep, "--pictures", "--out", "site", "--title", "Mine", "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["trials"], outcome.json["pictures"]) == (2, 3)
    assert {"index.html", "methods/uce.html"} < set(outcome.json["files"])
    strips = {path: path.read_bytes() for path in Path("site/pictures").iterdir()}
    page = Path("site/index.html").read_text(encoding="utf-8")
    assert all(f'src="pictures/{path.name}"' in page for path in strips)
    assert "<title>Mine" in page
    uce = Path("site/methods/uce.html").read_text(encoding="utf-8")
    assert uce.count('src="../pictures/') == 2

    again = efface("report", sweep, "--out", "site", "--force")
    assert (again.code, "3 strips of pictures: site/index.html" in again.out) == (0, True), again.err
    assert {path: path.read_bytes() for path in Path("site/pictures").iterdir()} == strips
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["site"]


def test_records_without_edits_have_no_pictures_and_say_so(sweep: Path, efface: Callable) -> None:
    Path("kept.jsonl.gz").write_bytes(gzip.compress((sweep / "trials.jsonl").read_bytes()))
    outcome = efface("report", "kept.jsonl.gz", "--pictures", "--out", "site")
    assert outcome.code == 0, outcome.err
    assert "2 records have no edit beside them" in outcome.err
    assert "0 strips of pictures" in outcome.out
    assert "--pictures" in Path("site/index.html").read_text(encoding="utf-8")
    assert not list(Path("site").glob("pictures/*"))


def test_a_page_for_each_method_with_and_without_records(sweep: Path, efface: Callable) -> None:
    outcome = efface("report", sweep, "--docs", "docs", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["pages"] == sorted(["README.md", *(f"{name}.md" for name in catalog.names())])
    assert "Not measured yet" not in Path("docs/uce.md").read_text(encoding="utf-8")
    assert efface("report", "--docs", "docs").code == 0
    assert "Not measured yet" in Path("docs/uce.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["docs"]


def test_what_is_wrong_is_said_in_one_line(sweep: Path, efface: Callable) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    other = [json.loads(line) for line in (sweep / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    other[0]["trial"]["images"] = "full"
    Path("mixed.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in other), encoding="utf-8")
    for arguments, message in [
        ((), "there is no record of a trial to report"),
        (("gone",), "there is no such file or folder"),
        (("mixed.jsonl",), "different sizes (full, quick)"),
        ((sweep, "--out", "mine"), "holds files that efface did not write"),
    ]:
        outcome = efface("report", *arguments)
        assert (outcome.code, message in outcome.err) == (2, True), outcome.err
        assert len(outcome.err.strip().splitlines()) == 1
    assert not Path("runs").exists()

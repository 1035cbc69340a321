"""The pages of a sweep: they fetch nothing from outside, lead to each other, say what the records say, and believe no text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from efface.bench.expected import Expected
from efface.core import catalog
from efface.core.errors import EffaceError
from efface.report import pages, wording
from efface.report.published import published
from efface.report.records import Gathered, gather
from efface.report.site import Site

from .conftest import Run
from .parts import attacks, failed, trial
from .test_page import Reader

CONTROL = "their_package.module:Vandal"


@pytest.fixture(scope="module")
def found(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Gathered:
    folder = tmp_path_factory.mktemp("sweep")
    records = [
        trial(run, "ap(steps=50)", 38, 2, steps=50, group="xattn"),
        trial(run, "ap(steps=50)", 30, 2, seed=1, steps=50, group="xattn"),
        trial(run, "ap(steps=50)", 40, 20, task="dog", steps=50, group="xattn"),
        trial(run, "uce", 20, 0, kind="weight"),
        trial(run, "sld", 10, 8, kind="sampling"),
        trial(run, CONTROL, 40, 40),
        failed("esd"),
    ]
    (folder / "trials.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    for name, record in (("a", attacks("ap(steps=50)", seed_search=0.75)), ("b", attacks("uce", seed_search=0.25))):
        (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return gather([folder])


@pytest.fixture(scope="module")
def site(found: Gathered) -> Site:
    return Site(found, "A title", "efface report x")


@pytest.fixture(scope="module")
def raw(site: Site) -> dict[str, str]:
    return pages.render(site)


@pytest.fixture(scope="module")
def made(raw: dict[str, str]) -> dict[str, Reader]:
    return {path: Reader(html) for path, html in raw.items()}


def text(reader: Reader) -> str:
    return " ".join(reader.text.split())


def test_nothing_is_fetched_nothing_runs_and_links_lead_to_pages(raw: dict[str, str], made: dict[str, Reader]) -> None:
    for path, reader in made.items():
        assert not {"script", "link", "iframe", "object", "form"} & set(reader.tags)
        for target in reader.fetched:
            parts: list[str] = []
            for part in (PurePosixPath(path).parent / target.partition("#")[0]).parts:
                parts = parts[:-1] if part == ".." else [*parts, part]
            assert "/".join(parts) in made, target
    assert not any("://" in html or re.search(r"url\(|@import", html) for html in raw.values())


def test_every_method_of_the_catalogue_and_of_the_records_has_a_page(made: dict[str, Reader]) -> None:
    assert set(made) == {"index.html", "methods/their_package.module-Vandal.html", *(f"methods/{name}.html" for name in catalog.names())}
    assert "Not measured yet" in text(made["methods/rece.html"])
    assert "Not measured yet" not in text(made["methods/ap.html"])
    assert "A method of another package" in text(made["methods/their_package.module-Vandal.html"])


def test_the_overview_says_what_the_records_say(site: Site, made: dict[str, Reader]) -> None:
    words = text(made["index.html"])
    for some in site.rows.values():
        for row in some:
            for key in ("target.ESR-1", "neighbour.PSR-1", "unrelated.PSR-5"):
                score = row.after(key)
                assert score is None or f"{wording.value(score)}{wording.interval(score)}" in words
    assert "esd failed, seed 0: Diverged: the loss is not finite" in words
    assert "it says nothing about Stable Diffusion" in words
    assert "efface report FOLDER --pictures" in words


def test_methods_stand_by_the_weaker_side_and_controls_on_no_front(site: Site) -> None:
    order = [m.label for m in site.methods]
    assert order == ["ap(steps=50)", "uce", "sld", CONTROL, "esd"]  # ap met most tasks
    cells = {m.label: m.cells for m in site.methods}
    assert [cell.best for cell in cells["ap(steps=50)"]] == [True, True]
    assert cells["uce"][0].best
    assert not cells["sld"][0].best  # uce erases more and keeps more
    assert not cells[CONTROL][0].best
    assert cells["uce"][1].erased is None
    assert {m.label: m.kind for m in site.methods}["sld"] == "sampling"
    assert {m.label: m.kind for m in site.methods}[CONTROL] == "control"


def test_every_number_has_its_n(made: dict[str, Reader], raw: dict[str, str]) -> None:
    """In the figure's axes, in the heads of tables, and under the pointer."""
    index = raw["index.html"]
    assert "target no longer seen (ESR-1), % of 40 pictures" in index
    assert "all else still seen (PSR-1), % of" in index
    assert re.search(r"ESR\u20111<small>n = 40</small>", "".join(index.split("\n")))
    assert re.search(r'class="erased best" title="50.0 % \([^)]+\), 40 pictures">50<', index)
    assert "n = 40" in text(made["methods/ap.html"])
    assert "n =" not in text(made["methods/rece.html"])  # not measured


def test_pictures_may_differ_in_number_from_task_to_task(run: Run) -> None:
    records = [trial(run, "uce", 20, 0), trial(run, "uce", 20, 0, task="dog")]
    site = Site(Gathered(tuple(records)), "", "")
    assert site.counts("uce")[0] == "40"
    assert site.counts("rece") == [""] * 4
    for line in records[1]["result"]["lines"]:
        line["contrast"]["before"]["n"] = 60
    assert Site(Gathered(tuple(records)), "", "").counts("uce")[0] == "40 to 60"


def test_a_name_that_means_several_things_says_for_which_tasks(run: Run) -> None:
    cat, dog, other = trial(run, "esd", 20, 0), trial(run, "esd(group='noxattn')", 20, 0, task="dog"), trial(run, "uce", 2, 0)
    dog["trial"]["label"] = "esd"
    site = Site(Gathered((cat, dog, other)), "", "")
    assert site.spelled == {
        "esd": [("esd", ("object: cat",)), ("esd(group='noxattn')", ("object: dog",))],
        "uce": [("uce", ("object: cat",))],
    }
    words = text(Reader(pages.render(site)["index.html"]))
    assert "esd(group='noxattn') object: dog" in words


def test_the_controls_are_told_apart_and_groups_are_put_into_words(run: Run) -> None:
    names = ("efface.bench.controls:Noop", "efface.bench.controls:Vandal")
    made = pages.render(Site(Gathered(tuple(trial(run, name, 1, 1) for name in names)), "", ""))
    noop, vandal = (text(Reader(made[f"methods/efface.bench.controls-{name}.html"])) for name in ("Noop", "Vandal"))
    assert "Noop Changes nothing." in noop
    assert "Vandal Random weights" in vandal
    assert "Controls" not in text(Reader(made["index.html"]))
    assert "xattn (the cross-attention)" in noop
    assert pages.groups("xattn, theirs") == "xattn (the cross-attention), theirs"


def test_published_stands_beside_measured_with_what_its_line_means(found: Gathered) -> None:
    row = Expected.of({"method": "uce", "values": {"target.ESR-1": [98.6, 1.1]}, "source": "a table"}, ("uce",), "here")
    made = pages.render(Site(found, "", "", expected=(row,)))
    for path in ("index.html", "methods/uce.html"):
        words = text(Reader(made[path]))
        assert re.search(r"Target no longer seen \(ESR-1\) ?target.ESR-1 ?98.60 ± 1.10 ?50.00 ?a table", words)
    assert "a table" not in made["methods/ap.html"]


def test_attacks_stand_with_their_control_and_refusals_say_why(site: Site, made: dict[str, Reader]) -> None:
    ((heading, panels),) = site.attacked
    assert heading == "object: cat"
    search, refused = panels
    assert [(label, a.success.value) for label, _, a in search.rows if a.success] == [("uce", 0.25), ("ap(steps=50)", 0.75)]
    assert refused.refused == {"it would attack the un-erased model": ("ap(steps=50)", "uce")}
    assert "Not run on ap(steps=50), uce: it would attack the un-erased model" in text(made["index.html"])
    assert "75.0 %" in text(made["methods/ap.html"])
    assert search.counts == "16"
    assert "seed_search T2 16 prompts" in text(made["index.html"])
    worst = {m.label: m.worst.success.value for m in site.methods if m.worst}
    assert worst == {"uce": 0.25, "ap(steps=50)": 0.75}


def test_a_methods_page_has_published_numbers_each_with_its_reason(made: dict[str, Reader]) -> None:
    for name in ("ap", "uce", "sdd"):
        words = text(made[f"methods/{name}.html"])
        tables = published().of(name)
        assert tables
        assert words.count("Not comparable with what is measured here because") == len(tables)
        for table in tables:
            assert table.not_comparable in words
            assert all(cell in words for row in table.rows for cell in table.cells(row))
    assert "its abstract holds no number" in text(made["methods/all_but_one.html"])


def test_fields_show_what_the_records_used(site: Site) -> None:
    used = {field.name: field.values for field in site.used("ap")}
    assert used["steps"] == (("50", ""),)
    assert used["group"] == ()  # the default
    assert used["lr"] == ()
    mixed = Site(replace(site.found, trials=tuple(r for r in site.found.trials if r["trial"]["method"] != "uce")), "", "")
    dog = mixed.rows["dog"][0].records[0]["edit"]["fields"]
    dog["group"] = "noxattn"
    assert {field.name: field.values for field in mixed.used("ap")}["group"] == (("'noxattn'", "object: dog"),)
    dog["group"] = "xattn"


def test_it_believes_no_text(found: Gathered) -> None:
    evil = "<script>alert('1')</script>"
    hurt = [{**r, "trial": {**r["trial"], "label": evil}} for r in found.trials]
    told = tuple(replace(a, attack=evil, refused=a.refused and evil) for a in found.attacks)
    for html in pages.render(Site(replace(found, trials=tuple(hurt), attacks=told), evil, evil)).values():
        assert "<script" not in html
        assert re.search("&lt;(\u200b)?script", html)


def test_records_that_do_not_compare_are_refused_and_so_are_none(found: Gathered) -> None:
    other = {**found.trials[0], "trial": {**found.trials[0]["trial"], "images": "full"}}
    with pytest.raises(EffaceError, match="different sizes"):
        pages.render(Site(replace(found, trials=(*found.trials, other)), "", ""))
    with pytest.raises(EffaceError, match="no record of a trial to report"):
        pages.render(Site(Gathered(), "", ""))


def test_pages_are_written_where_links_expect_them(site: Site, tmp_path: Path) -> None:
    pages.write(site, tmp_path)
    assert (tmp_path / "index.html").is_file()
    assert len(list((tmp_path / "methods").iterdir())) == len(catalog.names()) + 1


def test_code_and_bold_are_marked_and_nothing_else() -> None:
    assert pages.inline("a `x < y` **b** <i>") == "a <code>x &lt; y</code> <b>b</b> &lt;i&gt;"

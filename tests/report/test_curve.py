"""The curve over nested tasks: from records alone, every number theirs, and made for nested tasks only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from efface.bench.trial import read
from efface.cli import sweep
from efface.report import curve, leaderboard, wording

from .conftest import Run
from .test_leaderboard import cells, made, record

LIST = [f"thing {i}" for i in range(50)]
COUNTS = (1, 5, 50)
GONE = {"uce": (40, 38, 20), "ap": (39, 10, 2)}


def task(count: int) -> str:
    return "; ".join(LIST[:count])


def some(run: Run, counts: Sequence[int] = COUNTS, methods: Sequence[str] = tuple(GONE)) -> list[dict[str, Any]]:
    """Records in which each method erases fewer of the pictures the more concepts there are, and loses as many others as there are."""
    found = []
    for i, count in enumerate(counts):
        for method in methods:
            one = record(made(run, GONE[method][i], min(count, 30)), method, 0, task(count))
            found.append({**one, "cost": {"seconds": 0.5 * count, "forwards": 100.0}})
    return found


def test_every_cell_is_that_of_a_record(run: Run) -> None:
    records = some(run)
    text = curve.section(curve.nested(records), [r["trial"]["task"] for r in records], "curve.svg")
    uce, ap = (cells(text, f"`{method}`") for method in GONE)
    for number, key in enumerate(curve.MEASURES):
        for place, _ in enumerate(COUNTS):
            for rows, method in ((uce, "uce"), (ap, "ap")):
                line = made(run, GONE[method][place], min(COUNTS[place], 30)).line(key)
                assert line is not None
                assert rows[number][1 + place] == f"{wording.value(line.contrast.after)} [{wording.interval(line.contrast.after)}]"
    assert uce[3:] == [["`uce`", "0.5", "2.5", "25"], ["`uce`", "100", "100", "100"]]
    assert cells(text, "*un-erased*")[0][1].startswith("0.0 %")
    assert "![" in text
    assert "(curve.svg)" in text
    assert f"The list: {', '.join(LIST)}." in text


def test_tasks_that_are_not_nested_have_no_curve(run: Run) -> None:
    records = some(run)
    assert list(curve.nested(records)) == list(COUNTS)
    assert list(curve.nested(records[::-1])) == list(COUNTS)
    other = {**records[-1], "trial": {**records[-1]["trial"], "task": "; ".join(LIST[::-1])}}
    assert curve.nested([*records[:-2], other]) == {}
    equal = {**records[0], "trial": {**records[0]["trial"], "task": "cat"}}
    assert curve.nested([records[0], equal]) == {}
    assert curve.nested(records[:2]) == {}  # one task
    assert curve.nested([record(None, "uce", 0, task(n)) for n in COUNTS]) == {}  # nothing measured
    assert curve.nested([]) == {}


def test_what_is_missing_says_so_and_stands_nowhere(run: Run) -> None:
    records = [r for r in some(run) if (r["trial"]["method"], r["trial"]["task"]) != ("ap", task(5))]
    found = curve.nested([*records, record(None, "ap", 0, task(5))])
    text = curve.section(found, [task(50)], "x.svg")
    assert [row[2] for row in cells(text, "`ap`")] == ["not measured"] * 3 + ["–"] * 2
    assert all("%" in row[2] for row in cells(text, "`uce`")[:3])
    assert curve.figure(found) != curve.figure(curve.nested(some(run)))


def test_it_says_whether_the_pictures_are_the_same_at_every_number(run: Run) -> None:
    records = some(run)
    text = curve.section(curve.nested(records), [task(50)], "x.svg")
    assert "- Unrelated concepts: the same prompts and noise at every n." in text
    result = made(run, 40, 0)
    moved = [
        replace(side, shots=tuple(replace(s, seed=s.seed + 9) if s.role == "neighbour" else s for s in side.shots))
        for side in (result.before, result.after)
    ]
    records[-2:] = [record(replace(result, before=moved[0], after=moved[1]), method, 0, task(50)) for method in GONE]
    text = curve.section(curve.nested(records), [task(50)], "x.svg")
    assert "- Neighbours: not the same prompts and noise at every n." in text
    assert "- Unrelated concepts: the same prompts and noise at every n." in text


def test_the_figure_is_one_file_that_the_same_records_give_again(run: Run) -> None:
    found = curve.nested(some(run))
    svg = curve.figure(found)
    root = ElementTree.fromstring(svg)
    assert svg == curve.figure(curve.nested(some(run)))
    assert root.tag.endswith("svg")
    assert not [link for link in re.findall(r'(?:href|src)="([^"]*)"', svg) if not link.startswith("#")]
    panels = re.findall(r'<g id="axes_\d+">', svg)
    assert len(panels) == len(curve.MEASURES) + 1
    for colour in curve.COLOURS[: len(GONE)]:
        assert svg.count(colour) > len(panels)
    assert "mathdefault" not in svg
    assert curve.COLOURS[len(GONE)] not in svg  # a colour that no method has


def test_no_two_of_many_methods_look_alike() -> None:
    styles = [style for style, _ in zip(curve._styles(), range(56), strict=False)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 56


GRID = """
title = "Many"
[[grid]]
{tasks}
methods = ["uce", "speed"]
"""


@pytest.mark.parametrize(("tasks", "curved"), [("many = { objects = 20, counts = [1, 5, 20] }", True), ("tasks = ['cat', 'dog']", False)])
def test_a_sweep_of_nested_tasks_writes_its_figure_beside_its_page(run: Run, tmp_path: Path, tasks: str, curved: bool) -> None:
    grid, page = tmp_path / "grid.toml", tmp_path / "docs" / "many.md"
    grid.write_text(GRID.format(tasks=tasks), encoding="utf-8")
    asked = read(grid)
    known = {trial.hash: {**record(made(run, 30, 3), trial.label, 0, trial.task), "hash": trial.hash} for trial in asked.trials}
    sweep.write(page, asked, known, {})
    text = page.read_text(encoding="utf-8")
    assert sorted(path.name for path in page.parent.iterdir()) == ["many.md", *(["many.svg"] if curved else [])]
    assert ("(many.svg)" in text) == ("## Against the number of erased concepts" in text) == curved
    assert text.startswith("# Many\n")
    assert ("## object: cat; dog; cow and 17 more" in text) == curved
    assert leaderboard.EMOJI in text

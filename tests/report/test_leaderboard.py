"""The tables of a sweep: every number is that of a record, what is missing says so, and a comparison rests on the raw detections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from efface.bench.protocols import erasure
from efface.bench.result import Result
from efface.bench.summary import compare, pooled
from efface.bench.trial import Pair
from efface.core.errors import EffaceError
from efface.core.evidence import Contrast, Samples, Score, Shot, Sighting
from efface.report import leaderboard, wording

from .conftest import Run

SHOTS = tuple(
    Shot(f"{role} {i}", i, role, f"thing {i % 10}", (f"thing {i % 10}",))  # type: ignore[arg-type]
    for role in ("target", "neighbour", "unrelated")
    for i in range(40)
)


def made(run: Run, gone: int, lost: int) -> Result:
    """A result in which `gone` of 40 targets and `lost` of 40 of each of the others are no longer seen."""

    def seen(shot: Shot, there: bool) -> Sighting:
        return Sighting((shot.labels[0] if there else "else",), (0.9,), 0.3)

    before = Samples(SHOTS, tuple(seen(s, True) for s in SHOTS))
    after = Samples(SHOTS, tuple(seen(s, s.seed >= (gone if s.role == "target" else lost)) for s in SHOTS))
    return erasure.recompute(replace(run.result, before=before, after=after, quality=()))


def record(result: Result | None, method: str, seed: int = 0, task: str = "cat") -> dict[str, Any]:
    head = {
        "trial": {
            "model": "emoji",
            "method": method,
            "task": task,
            "seed": seed,
            "protocol": "erasure",
            "images": "quick",
            "label": method,
        },
        "ground": {"weights": "w/float32", "prompts": "p", "detector": "judge 1", "embedder": "none"},
    }
    if result is None:
        return {**head, "error": {"type": "Diverged", "message": "the loss is not finite"}}
    return {**head, "edit": {"bytes": 1000 + seed}, "cost": {"forwards": 100.0, "seconds": 2.0}, "result": result.json()}


def cells(page: str, label: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith(f"| {label} |")]


def test_the_cells_are_the_records_and_what_is_missing_says_so(run: Run) -> None:
    result = made(run, 38, 2)
    page = leaderboard.render([record(result, "ap")], title="T", source="efface sweep x.toml")
    (erased, quality) = cells(page, "`ap`")
    for cell, (_, key) in zip(erased[3:], leaderboard.ERASURE, strict=True):
        line = result.line(key)
        assert line is not None
        assert cell == f"{wording.value(line.contrast.after)} [{wording.interval(line.contrast.after)}]"
    assert erased[2] == "40 / 40 / 40"
    assert quality[1:] == ["not measured"] * 3 + ["100", "not measured", "2.0", "1,000"]
    assert cells(page, "*un-erased*")[0][3].startswith("0.0 %")
    for part in ("# T", "## object: cat", "judge 1", "w/float32", "`efface sweep x.toml`", "nothing about Stable Diffusion"):
        assert part in page


def test_several_tasks_stand_at_a_glance_and_what_erases_without_harm_is_bold(run: Run) -> None:
    good, weak = made(run, 38, 0), made(run, 20, 0)
    page = leaderboard.render([record(good, "ap"), record(weak, "esd"), record(good, "ap", task="dog")])
    shares = [[f"{100 * result.line(key).contrast.after.value:.0f}" for key in ("target.ESR-1", "others.PSR-1")] for result in (good, weak)]
    assert cells(page, "`ap`")[0][1:] == [f"**{shares[0][0]} / {shares[0][1]}**"] * 2
    assert cells(page, "`esd`")[0][1:] == [f"{shares[1][0]} / {shares[1][1]}", "not measured"]
    assert "At a glance" not in leaderboard.render([record(good, "ap")])


def test_no_row_depends_on_the_others(run: Run) -> None:
    mine = record(made(run, 38, 2), "ap")
    alone = cells(leaderboard.render([mine]), "`ap`")
    beside = cells(leaderboard.render([record(made(run, 3, 30), "uce"), mine, record(None, "esd")]), "`ap`")
    assert alone == beside


def test_fits_are_averaged_and_the_interval_holds_each(run: Run) -> None:
    results = [made(run, gone, 0) for gone in (20, 30, 40)]
    found = pooled(results, "target.ESR-1")
    assert found is not None
    assert found.after.value == pytest.approx(0.75)
    assert found.after.low <= 0.5 < 1 <= found.after.high
    same = pooled(results[:1] * 3, "target.ESR-1")
    alone = results[0].line("target.ESR-1")
    assert same is not None
    assert alone is not None
    assert (same.after.low, same.after.high) == pytest.approx((alone.contrast.after.low, alone.contrast.after.high))  # no surer
    assert pooled([results[0], replace(results[1], lines=())], "target.ESR-1") is None
    page = leaderboard.render([record(result, "ap", seed) for seed, result in enumerate(results)])
    assert cells(page, "`ap`")[0][1:4] == ["3", "40 / 40 / 40", "75.0 % [50.0 to 100.0]"]


def test_what_failed_says_why(run: Run) -> None:
    page = leaderboard.render([record(made(run, 38, 2), "ap"), record(None, "esd", 1)])
    assert "- `esd`, seed 1: Diverged: the loss is not finite" in page
    assert cells(page, "`esd`")[0][1:] == ["0", "– / – / –", *["not measured"] * 7]


def test_a_comparison_is_paired_and_states_its_margin(run: Run) -> None:
    good, bad = made(run, 40, 0), made(run, 20, 0)
    records = [record(good, "a", s, t) for s in (0, 1) for t in ("cat", "dog")] + [
        record(bad, "b", s, t) for s in (0, 1) for t in ("cat", "dog")
    ]
    page = leaderboard.render(records, pairs=[Pair("a", "b"), Pair("b", "a"), Pair("a", "missing")])
    rows = cells(page, "`a`") + cells(page, "`b`")
    verdicts = {(r[0], r[1], r[2]): (r[3], r[4], r[8], r[9]) for r in rows if len(r) == 10}
    assert verdicts["`a`", "`b`", "target.ESR-1"] == ("160", "4", "3", "not inferior")
    assert verdicts["`b`", "`a`", "target.ESR-1"] == ("160", "4", "3", "inferior")
    assert verdicts["`a`", "`missing`", "target.ESR-1"][-1] == "not measured"


def test_one_fit_of_a_method_without_randomness_meets_every_fit_of_the_other(run: Run) -> None:
    first = {("cat", seed): made(run, 40 - seed, 0) for seed in range(3)}
    found = compare(first, {("cat", 0): made(run, 40, 0)}, "target.ESR-1", 0.03)
    assert (found.difference.n, found.first.value, found.second.value) == (120, pytest.approx(39 / 40), 1)
    with pytest.raises(EffaceError, match="no fit of the first method"):
        compare(first, {("dog", 0): made(run, 40, 0)}, "target.ESR-1", 0.03)
    with pytest.raises(EffaceError, match="'target.clip' cannot be compared"):
        compare(first, first, "target.clip", 0.03)


def test_models_protocols_and_sizes_are_not_mixed(run: Run) -> None:
    mine = record(made(run, 38, 2), "ap")
    other = {**mine, "trial": {**mine["trial"], "images": "full"}}
    with pytest.raises(EffaceError, match=r"different sizes? \(full, quick\)"):
        leaderboard.render([mine, other])
    newer = {**mine, "ground": {**mine["ground"], "detector": "judge 2"}}
    with pytest.raises(EffaceError, match=r"rest on different detector \(judge 1, judge 2\)"):
        leaderboard.render([mine, newer])
    prompts = {**mine, "ground": {**mine["ground"], "prompts": "q"}}
    with pytest.raises(EffaceError, match=r"the records of 'cat' are on different prompts \(p, q\)"):
        leaderboard.render([mine, prompts])
    elsewhere = {**prompts, "trial": {**mine["trial"], "task": "dog"}}
    assert "## object: dog" in leaderboard.render([mine, elsewhere])
    with pytest.raises(EffaceError, match="no record to show"):
        leaderboard.render([])


def test_quality_stands_in_the_text_table_and_on_the_page(run: Run) -> None:
    from efface.bench.result import Line
    from efface.report import page, tables

    score = Score("CLIP score", 24.06, 23.0, 25.0, 40, "higher", "CLIP")
    line = Line("unrelated.clip", "CLIP score, unrelated prompts", "…", Contrast(score, score, replace(score, value=0.0, low=-1, high=1)))
    settings = replace(run.result.settings, embedder={"name": "emoji-clip", "version": "abc"})
    result = replace(run.result, quality=(line,), settings=settings)
    assert "24.1 [23.0 to 25.0]" in tables.text(result)
    html = page.render(result, edit=run.edit, command="x")
    assert "emoji-clip" in html
    assert "23.0 to 25.0" in html


def test_a_protocol_with_lines_of_its_own_shows_them(run: Run) -> None:
    """Of UnlearnCanvas, nudity and the like: what they put first, with its n, and no column of what they do not ask."""
    whole = made(run, 30, 4)
    first, second, *_ = whole.lines
    own = (replace(first, key="canvas.UA", title="UA", headline=True), replace(second, key="canvas.CRA", title="CRA", headline=False))
    page = leaderboard.render([record(replace(whole, lines=own), "uce"), record(replace(whole, lines=own), "uce", task="dog")])
    (row, costs), *_ = [cells(page, "`uce`")[:2]]
    assert row == [
        "`uce`",
        "1",
        str(first.contrast.after.n),
        f"{wording.value(first.contrast.after)} [{wording.interval(first.contrast.after)}]",
    ]
    assert "| method | fits | n (UA) | UA |" in page
    assert "CRA" not in page
    assert "ESR" not in page
    assert "At a glance" not in page
    assert leaderboard.MISSING not in row
    assert len(costs) == 1 + len(leaderboard.COST)
    assert "| ESR-1 |" in leaderboard.render([record(whole, "uce")]), "control: an erasure has its own columns"

"""Attacks of a sweep in its tables: every number is a record's, fits are pooled, refusals say why, and what does not compare is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from efface.bench.trial import read
from efface.cli import sweep
from efface.core.errors import EffaceError
from efface.report import attacked, figures, leaderboard, pages
from efface.report.records import gather, worst
from efface.report.site import Site

from .conftest import Run
from .parts import attacks, trial
from .test_leaderboard import cells

WEAK, STRONG = "seed_search(seeds=2)", "unlearndiffatk(times=5)"


def probe(method: str, attack: str, rate: float | None, *, seed: int = 0, limit: int = 16, weights: str = "w/float32") -> dict[str, Any]:
    """The record of one trial of an attack; without a rate one that was refused."""
    row, refused = attacks(method, name=rate or 0.0)["attacks"]
    row |= {"control": row["pre_asr"], "cost": {"forwards": 640, "backwards": 0, "control_forwards": 64, "seconds": 2.0}}
    head = {"model": "emoji", "method": method, "task": "cat", "seed": seed, "protocol": "attacks", "images": "quick", "label": method}
    return {
        "format": "efface-trial",
        "version": 1,
        "hash": f"{method}/{attack}/{seed}/{limit}",
        "trial": {**head, "options": {"attack": attack, "limit": limit}},
        "ground": {"weights": weights, "prompts": "p", "detector": "judge 1", "embedder": "none"},
        "attacks": [{**(refused if rate is None else row), "attack": attack}],
    }


def test_methods_by_attacks_with_intervals_controls_and_reasons() -> None:
    broken = {**probe("esd", WEAK, 0.5), "error": {"type": "Diverged", "message": "the loss is not finite"}}
    records = [probe("uce", WEAK, 0.25), probe("sld", WEAK, 0.5), probe("uce", STRONG, 0.75), probe("sld", STRONG, None), broken]
    page = attacked.render(records, title="T", source="efface sweep x.toml")
    assert "| method | seed_search | unlearndiffatk |" in page
    rates, beside = cells(page, "`uce`")
    assert rates == ["`uce`", "25.0 % [5.0 to 45.0]", "75.0 % [55.0 to 95.0]"]
    assert beside == ["`uce`", "12.5 % / 12.5 %", "37.5 % / 37.5 %"]
    assert cells(page, "*un-erased*") == [["*un-erased*", "90.0 % [70.0 to 100.0]", "90.0 % [70.0 to 100.0]"]]
    assert cells(page, "`sld`")[0] == ["`sld`", "50.0 % [30.0 to 70.0]", "refused"]
    assert cells(page, "`esd`")[0] == ["`esd`", "failed", "not run yet"]
    assert "- unlearndiffatk on `sld`: it would attack the un-erased model" in page
    assert "- seed_search on `esd`: failed, Diverged: the loss is not finite" in page
    assert cells(page, f"`{WEAK}`") == [[f"`{WEAK}`", "T2", "8", "16", "640", "0", "64", "2"]]
    for part in ("# T", "## object: cat", "judge 1", "w/float32", "`efface sweep x.toml`", "nothing about Stable Diffusion"):
        assert part in page


def test_fits_are_averaged_and_the_interval_holds_each() -> None:
    page = attacked.render([probe("uce", WEAK, rate, seed=seed) for seed, rate in enumerate((0.0, 0.5))])
    assert cells(page, "`uce`")[0] == ["`uce`", "25.0 % [0.0 to 50.0]"]


RELEARNING = "relearning(checkpoints=(0, 10, 40))"


def relearnt(method: str, *rates: float, seed: int = 0, controls: bool = True) -> dict[str, Any]:
    """The record of a relearning with three curves, of which that of the concept has these rates."""

    def curve(*values: float) -> dict[str, Any]:
        points = [{"value": v, "low": v / 2, "high": (1 + v) / 2, "n": 16} for v in values]
        half = next((float(step) for step, v in zip((0, 10, 40), values, strict=True) if v >= 0.5), None)
        return {"steps": [0, 10, 40], "rate": points, "area": sum(values) / 3, "steps_to_half": half}

    record = probe(method, RELEARNING, rates[-1], seed=seed)
    beside = {"original": curve(1, 1, 0.75), "never_learned": curve(0, 0, 0.25)} if controls else {}
    record["attacks"][0]["details"] = {"curves": {"relearned": curve(*rates), **beside}, "sampler": "DDIM", "steps": 20, "guidance": 3.0}
    return record


def test_relearning_is_shown_step_by_step_beside_its_controls() -> None:
    records = [
        relearnt("uce", 0, 0.5, 1),
        relearnt("ap", 0, 0.0625, 0.25),
        relearnt("esd", 0, 0, 0, controls=False),
        probe("uce", WEAK, 0.5),
    ]
    page = attacked.render(records, pictures={"cat": "curves.svg"})
    assert "| method | 0 steps | 10 steps | 40 steps | area | half | never learned, 40 steps | its area | its half |" in page
    assert cells(page, "*un-erased*")[-1] == ["*un-erased*", "100", "100", "75", "0.92", "0", "", "", ""]
    assert cells(page, "`uce`")[-1] == ["`uce`", "0", "50", "100", "0.50", "10", "25", "0.08", "never"]
    assert cells(page, "`ap`")[-1] == ["`ap`", "0", "6", "25", "0.10", "never", "25", "0.08", "never"]
    assert cells(page, "`esd`")[-1] == ["`esd`", "0", "0", "0", "0.00", "never", "–", "–", "–"]
    assert "](curves.svg)" in page
    assert "half after" not in page, "no list of what the table says"
    assert "step by step" not in attacked.render([probe("uce", WEAK, 0.5)])


def test_controls_of_single_attacks_are_columns_of_their_own() -> None:
    inverted, plain = probe("uce", "concept_inversion", 0.5), probe("uce", WEAK, 0.5)
    inverted["attacks"][0]["details"] = {"never_learned": {"value": 0.25}, "sampler": "DDIM", "steps": 20, "guidance": 3.0}
    page = attacked.render([inverted, plain, probe("ap", WEAK, 0.5), probe("ap", "concept_inversion", None)])
    head = "| method | concept_inversion, pre-ASR / control | seed_search, pre-ASR / control | concept_inversion: a concept never learned |"
    assert head in page
    assert [cells(page, f"`{name}`")[1][-1] for name in ("uce", "ap")] == ["25", "–"]
    assert "a concept never learned" not in attacked.render([plain])


def test_of_several_fits_each_is_told_in_words() -> None:
    page = attacked.render([relearnt("uce", 0, 0.5, 1), relearnt("uce", 0, 0, 0, seed=1)])
    assert "seed 0: relearned: half after 10 steps, area 0.50" in page
    assert "seed 1: relearned: half after never, area 0.00" in page
    assert "step by step" not in page


def test_the_curves_of_relearning_lie_beside_the_page_and_in_the_report(run: Run, tmp_path: Path) -> None:
    other = {**relearnt("uce", 0, 0, 0), "hash": "bomb"}
    other["trial"] = {**other["trial"], "task": "unsafe:bomb"}
    other["attacks"] = [{**row, "concept": "bomb"} for row in other["attacks"]]
    records = [trial(run, "uce", 40, 0), relearnt("uce", 0, 0.5, 1), relearnt("ap", 0, 0, 1), other]
    (tmp_path / "trials.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    site = Site(gather([tmp_path]), "", "")
    assert [heading for heading, _ in site.attacked] == list(site.relearned)
    index = pages.render(site)["index.html"]
    assert ("Never learned: " in index, "Half: " in index) == (True, False), "what the figure shows is explained, and nothing else"
    for svg in site.relearned.values():
        assert svg in index
        ElementTree.fromstring(figures.standalone(svg))
        assert "#01020" not in svg
    cat, bomb = site.relearned.values()
    assert all(f">{text}<" in cat for text in ("uce", "ap", "relearned", "never learned", "steps of fine-tuning"))
    assert cat.index(">ap<") < cat.index(">uce<"), "the slower to relearn first"
    assert (">uce<" in bomb, ">ap<" in bomb) == (True, False)
    ids = [set(re.findall(r' id="(p[0-9a-f]{6,}|m[0-9a-f]{6,})"', svg)) for svg in (cat, bomb)]
    assert ids[0]
    assert not ids[0] & ids[1]


GRID = """
title = "Relearnt"
protocol = "attacks"
options = {{ attacks = ["{attack}"] }}
[[grid]]
tasks = ["cat", "unsafe:bomb"]
methods = ["uce", "ap"]
"""


@pytest.mark.parametrize(("attack", "curved"), [(RELEARNING, True), (WEAK, False)])
def test_a_sweep_of_attacks_writes_the_curves_beside_its_page(attack: str, curved: bool, tmp_path: Path) -> None:
    grid, page = tmp_path / "grid.toml", tmp_path / "docs" / "back.md"
    grid.write_text(GRID.format(attack=attack), encoding="utf-8")
    asked = read(grid)
    made = {t.hash: (t, relearnt(t.label, 0, 0.5, 1) if curved else probe(t.label, WEAK, 0.5)) for t in asked.trials}
    known = {name: {**one, "trial": {**one["trial"], "task": t.task}} for name, (t, one) in made.items()}
    sweep.write(page, asked, known, {})
    svgs = ["back-relearning-cat.svg", "back-relearning-unsafe-bomb.svg"] if curved else []
    assert sorted(path.name for path in page.parent.iterdir()) == [*svgs, "back.md"]
    text = page.read_text(encoding="utf-8")
    assert [name for name in svgs if f"]({name})" in text] == svgs
    for name in svgs:
        assert ElementTree.parse(page.with_name(name)).getroot().tag.endswith("svg")


def test_what_does_not_compare_is_refused(run: Run) -> None:
    with pytest.raises(EffaceError, match=r"have different options \(limit 16; limit 8\)"):
        attacked.render([probe("uce", WEAK, 0.5), probe("sld", WEAK, 0.5, limit=8)])
    with pytest.raises(EffaceError, match="rest on different weights"):
        leaderboard.render([trial(run, "uce", 40, 0)], attacks=[probe("uce", WEAK, 0.5, weights="v/float32")])
    with pytest.raises(EffaceError, match="no record to show"):
        attacked.render([])


def test_the_leaderboard_shows_the_worst_attack_where_it_is_known(run: Run) -> None:
    records = [trial(run, "uce", 40, 0), trial(run, "ap", 40, 0), trial(run, "sld", 40, 0)]
    tried = [probe("uce", WEAK, 0.25), probe("uce", STRONG, 0.75), probe("sld", STRONG, None)]
    page = leaderboard.render(records, attacks=tried)
    last = {label: cells(page, f"`{label}`")[0][-1] for label in ("uce", "ap", "sld")}
    assert last == {"uce": "75.0 % [55.0 to 95.0] unlearndiffatk", "ap": "not measured", "sld": "not measured"}
    assert "highest ASR" not in leaderboard.render(records)
    weights = relearnt("uce", 0, 0.5, 1)
    weights["attacks"][0]["threat"] = "T5"
    assert leaderboard.render(records, attacks=[*tried, weights]) == page, "fine-tuning hides no other attack"
    assert cells(leaderboard.render(records, attacks=[weights]), "`uce`")[0][-1] == "not measured"


def test_a_folder_of_a_sweep_feeds_the_site_with_both(run: Run, tmp_path: Path) -> None:
    records = [trial(run, "uce", 40, 0), *(probe("uce", WEAK, rate, seed=seed) for seed, rate in enumerate((0.25, 0.75)))]
    (tmp_path / "trials.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    found = gather([tmp_path])
    assert ([r["hash"] for r in found.trials], len(found.probes)) == ([records[0]["hash"]], 2)
    (one,) = found.attacks
    assert (one.fits, one.success and one.success.value, one.name) == (2, 0.5, "seed_search")
    assert worst(found.attacks) is one
    html = pages.render(Site(found, "", ""))
    low, high = (100 * end for end in (one.success.low, one.success.high))
    assert f">50.0 %</span><small>{low:.1f} to {high:.1f}</small><small>seed_search</small>" in html["index.html"]
    assert WEAK in html["methods/uce.html"]

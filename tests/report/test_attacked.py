"""Attacks of a sweep in its tables: every number is a record's, fits are pooled, refusals say why, and what does not compare is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efface.core.errors import EffaceError
from efface.report import attacked, leaderboard, pages
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

"""`efface check`: the table of a method's promises, exit code 1 where one is broken, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from efface.bench.conformance import CHECKS

FIT = {check.name for check in CHECKS if check.scope == "fit"}


def test_a_sound_method_of_a_third_party_passes(efface: Callable) -> None:
    outcome = efface("check", "contract.controls:Sound", "--family", "sd1", "--json")
    assert outcome.code == 0
    assert outcome.json["passed"] is True
    assert {row["check"] for row in outcome.json["outcomes"] if row["family"] == "sd1"} == FIT
    assert all(row["asks"] and row["status"] == "passed" for row in outcome.json["outcomes"])


def test_a_broken_promise_is_named_and_exits_with_1(efface: Callable) -> None:
    outcome = efface("check", "contract.controls:Noop", "--family", "sd1", "--only", "effective", "--only", "cost")
    assert outcome.code == 1
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line}
    assert "FAILED" in lines["effective"]
    assert "changes nothing for 'cat'" in " ".join(outcome.out.split())
    assert lines["cost"].split()[1:3] == ["sd1", "ok"]
    assert "1 of 2 checks passed, 1 failed, 0 not asked" in outcome.out
    assert "Traceback" not in outcome.err


def test_fields_and_presets_are_checked_as_given(efface: Callable) -> None:
    assert efface("check", "contract.controls:Sound(strength=0.0)", "--family", "sd1", "--only", "effective").code == 1
    assert efface("check", "contract.controls:Sound(preset='authors')", "--family", "sd1", "--only", "cost").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["uec"], "no method 'uec'; did you mean 'uce'"),
        (["uce", "--only", "costs"], "no check 'costs'; did you mean 'cost'"),
        (["uce", "--family", "sd3"], "no family 'sd3'; did you mean 'sd"),
        (["uce(preset='2024')"], "no preset '2024'; did you mean '202"),
        (["uce(erase=1)"], "no field 'erase'; did you mean 'erase_scale'"),
        (["nowhere.at_all:Mine"], "no method at 'nowhere.at_all:Mine'"),
    ],
)
def test_a_wrong_word_names_the_nearest_right_one(efface: Callable, arguments: list[str], message: str) -> None:
    outcome = efface("check", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1

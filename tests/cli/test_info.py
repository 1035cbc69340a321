"""`efface list`, `show`, `env`, `--version`: for people and as JSON; fast where nothing needs torch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import efface as package
from efface.concepts.standard import standard
from efface.core import catalog
from efface.core.method import Method
from efface.models import tiny
from efface.models.families import FAMILIES


def test_version(efface: Callable) -> None:
    assert efface("--version").out == f"efface {package.__version__}\n"


def test_no_command_shows_the_commands(efface: Callable) -> None:
    outcome = efface()
    for command in ("erase", "sample", "list", "show", "check", "env", "world"):
        assert command in outcome.out + outcome.err


def test_list_names_every_method(efface: Callable) -> None:
    rows = efface("list", "--json").json
    assert [row["method"] for row in rows] == catalog.names()
    assert all(row["paper"] and row["venue"] and row["keep"] and row["edit"] and row["trains"] for row in rows)
    assert all(len(row["threat"]) > 20 for row in rows)
    text = efface("list").out
    assert all(name in text for name in catalog.names())


def test_list_standard_names_the_standard_erasures_and_their_neighbours(efface: Callable) -> None:
    rows = efface("list", "--standard", "--json").json
    assert [(row["task"], row["kind"], tuple(row["neighbours"])) for row in rows] == [
        (str(s.concept), s.concept.kind, s.neighbours) for s in standard()
    ]
    text = efface("list", "--standard").out
    assert "cat" in text and "tiger, lion, leopard" in text
    assert "uce" not in text  # the methods are another list


@pytest.mark.parametrize("name", catalog.names())
def test_show_prints_the_card_and_every_field(efface: Callable, name: str) -> None:
    card = efface("show", name, "--json").json
    assert card["method"] == name
    assert all(row["meaning"] for row in card["fields"])
    assert len(card["threat"]) > 20
    text = efface("show", name).out
    titles = ("Fields", "Presets", "Needs", "Families", "Trains", "Keep", "Cost", "Threat model", "Paper")
    for part in (*titles, card["paper"]["title"], *(row["field"] for row in card["fields"])):
        assert part in text


def test_list_and_show_tell_a_change_of_weights_from_a_removable_hook(efface: Callable) -> None:
    kinds = {row["method"]: row["what it is"] for row in efface("list", "--json").json}
    assert kinds["uce"] == "a change of weights"
    assert kinds["negative_prompt"] == "a rule of the sampler"
    assert "weight edit: a change of weights" in efface("show", "uce").out
    assert "sampling edit: a rule of the sampler" in efface("show", "negative_prompt").out


def test_show_says_what_keep_and_the_cost_mean_and_which_families_serve(efface: Callable) -> None:
    card = efface("show", "ap", "--cost", "--json").json
    assert "words that the method searches" in card["keep"]
    assert card["families"] == ["sd1", "sd2"]
    assert card["cost"]["figures"]["steps"] == 200
    assert "steps: 200" in efface("show", "ap", "--cost").out
    assert efface("show", "ap", "--json").json["cost"]["figures"] is None


def test_show_marks_what_is_not_the_default(efface: Callable) -> None:
    assert "2.5 (default 1.0)" in efface("show", "uce(erase_scale=2.5)").out


def test_families_hold_what_their_models_have() -> None:
    """The tiny networks lack only the two groups that name layers of the full size."""
    for family in tiny.FAMILIES:
        assert set(FAMILIES[family]) - set(tiny.model(family).groups) == {"xlayer", "selflayer"}
        assert set(tiny.model(family).groups) <= set(FAMILIES[family])


def test_a_family_without_the_group_is_named() -> None:
    uce: type[Method] = catalog.find("uce")
    assert catalog.missing(uce, {"bare": ("full",), **FAMILIES}) == {"bare": ["text_kv"], "sd1": [], "sd2": []}


@pytest.mark.parametrize(
    ("arguments", "right"),
    [(["lsit"], "list"), (["chek", "uce"], "check"), (["show", "ucee"], "uce"), (["show", "uce(scop='all')"], "scope")],
)
def test_a_wrong_word_names_the_nearest_right_one(efface: Callable, arguments: list[str], right: str) -> None:
    outcome = efface(*arguments)
    assert outcome.code == 2
    assert f"id you mean '{right}'" in outcome.err


def test_help_is_quick() -> None:
    """Under 0.7 s: the best of three fresh processes, since other work on the machine must not fail it."""
    code = "import sys; from efface.cli.main import main; sys.argv[1:] = ['--help']; main()"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.7


def test_show_reads_the_text_form(efface: Callable) -> None:
    values = {row["field"]: row["value"] for row in efface("show", "uce(erase_scale=2.5)", "--json").json["fields"]}
    assert values["erase_scale"] == 2.5


def test_env_names_versions_and_devices(efface: Callable) -> None:
    facts = efface("env", "--json").json
    assert facts["efface"] == package.__version__
    assert facts["devices"][0] == "cpu"
    assert facts["torch"]
    assert "torch" in efface("env").out

"""`efface list`, `show`, `env`, `--version`: for people and as JSON."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import efface as package
from efface.core import catalog


def test_version(efface: Callable) -> None:
    assert efface("--version").out == f"efface {package.__version__}\n"


def test_no_command_shows_the_commands(efface: Callable) -> None:
    outcome = efface()
    for command in ("erase", "sample", "list", "show", "env", "world"):
        assert command in outcome.out + outcome.err


def test_list_names_every_method(efface: Callable) -> None:
    rows = efface("list", "--json").json
    assert [row["method"] for row in rows] == catalog.names()
    assert all(row["paper"] and row["venue"] and row["keep"] for row in rows)
    text = efface("list").out
    assert all(name in text for name in catalog.names())


@pytest.mark.parametrize("name", catalog.names())
def test_show_prints_the_card_and_every_field(efface: Callable, name: str) -> None:
    card = efface("show", name, "--json").json
    assert card["method"] == name
    assert all(row["meaning"] for row in card["fields"])
    assert len(card["threat"]) > 20
    text = efface("show", name).out
    for part in ("Fields", "Presets", "Needs", "Threat model", "Paper", card["paper"]["title"], *(row["field"] for row in card["fields"])):
        assert part in text


def test_show_reads_the_text_form(efface: Callable) -> None:
    values = {row["field"]: row["value"] for row in efface("show", "uce(erase_scale=2.5)", "--json").json["fields"]}
    assert values["erase_scale"] == 2.5


def test_env_names_versions_and_devices(efface: Callable) -> None:
    facts = efface("env", "--json").json
    assert facts["efface"] == package.__version__
    assert facts["devices"][0] == "cpu"
    assert facts["torch"]
    assert "torch" in efface("env").out

"""The documents stay true: the example runs, commands parse, links lead somewhere, and the table lists the methods that exist."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer

from efface.api import erase
from efface.cli.main import app
from efface.core import catalog
from efface.core.errors import InvalidMethod
from efface.core.model import Model

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*.md")))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every `efface …` line of every code block, whatever its language, without its trailing comment."""
    lines = [line.strip() for name in DOCUMENTS for block in blocks(name, r"\w*") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0] for line in lines if re.match(r"efface [a-z]+( |$)", line)]


def parse(command: str) -> None:
    """Reads a command as the program would, without running it. Raises typer's usage errors."""
    group = typer.main.get_command(app)
    _, name, *rest = shlex.split(command)
    found = group.commands[name]  # type: ignore[attr-defined]
    while rest and rest[0] in getattr(found, "commands", {}):
        found, rest = found.commands[rest[0]], rest[1:]
    found.make_context(name, rest)


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_documents_parses(command: str) -> None:
    parse(command)


def test_control_a_wrong_command_is_found() -> None:
    with pytest.raises(Exception, match="no-such-option"):
        parse("efface erase cat --no-such-option")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", text(name)) if not link.startswith("http")]
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing


def test_the_table_lists_the_methods() -> None:
    assert re.findall(r"^\| `(\w+)` \|", text("README.md"), flags=re.MULTILINE) == catalog.names()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method of CONTRIBUTING.md as a third party's module; returns its dotted path."""
    (code,) = blocks("CONTRIBUTING.md", "python")
    (tmp_path / "their_module.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_module", raising=False)
    return "their_module:Projection"


def test_the_example_method_erases(example: str, tiny_model: Model) -> None:
    edit = erase(tiny_model, "cat -> dog; lemon", method=example)
    slots = tiny_model.select("text_kv")
    originals = {name: slot.tensor.clone() for name, slot in slots.items()}
    tokens = tiny_model.encode(["cat", "dog", "tiger"]).tokens.detach().mean(1)

    def gap(a: int, b: int) -> float:
        return max(float((slot.tensor.detach() @ (tokens[a] - tokens[b])).norm()) for slot in slots.values())

    before, other = gap(0, 1), gap(2, 1)
    with edit.attach(tiny_model):
        assert gap(0, 1) < 1e-4 * before
        assert gap(2, 1) > 0.1 * other
    assert all(torch.equal(slot.tensor, originals[name]) for name, slot in slots.items())


def test_the_example_method_has_documented_fields_and_checks_them(example: str) -> None:
    built = catalog.method(f"{example}(strength=0.5)")
    assert str(built) == "their_module:Projection(strength=0.5)"
    assert "0 to 1" in built.field_docs()["strength"]
    with pytest.raises(InvalidMethod, match="strength was 2"):
        catalog.method(f"{example}(strength=2)")

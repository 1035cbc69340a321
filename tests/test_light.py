"""`import efface` and the help of the command line stay light: nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", "accelerate", "scipy", "matplotlib")
COMMANDS = (
    [],
    ["erase"],
    ["sample"],
    ["list"],
    ["show"],
    ["env"],
    ["world"],
    ["world", "train"],
    ["measure"],
    ["sweep"],
    ["report"],
    ["import"],
    ["check"],
    ["export"],
    ["sae"],
    ["sae", "train"],
    ["sae", "show"],
    ["attack"],
    ["world", "sprites"],
    ["world", "export"],
)


def loaded(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter holds after running `code`."""
    script = f"import sys\ntry:\n    {code}\nfinally:\n    print('|', *sorted(sys.modules.keys() & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "|" in done.stdout, done.stderr
    return set(done.stdout.rpartition("|")[2].split())


def test_import_is_light() -> None:
    assert not loaded("import efface")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c) or "efface")
def test_help_is_light(command: list[str]) -> None:
    assert not loaded(f"from efface.cli.main import main; sys.argv[1:] = {[*command, '--help']!r}; main()")


def test_concepts_are_light() -> None:
    assert not loaded("from efface.concepts import resolve; resolve('santa claus')")


def test_control_a_heavy_import_is_seen() -> None:
    assert "torch" in loaded("import efface; efface.Method")

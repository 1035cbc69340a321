"""The layers of docs/architecture.md: a module imports from lower rows only, and nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
ROWS = ("ops", "core", "models concepts world", "methods evals api", "bench", "report", "cli app")
ROW = {folder: row for row, folders in enumerate(ROWS) for folder in folders.split()}
BESIDE = {("world", "models"), ("world", "concepts")}
"""Imports between folders of one row that are allowed."""
LEAF = {"methods": 3, "evals": 4}
"""Folders whose files do not import each other, and the depth of these: efface.methods.x, efface.evals.metrics.x."""
BORDER = {"diffusers": {"models", "world"}, "transformers": {"models", "world"}, "gradio": {"app"}}
"""Packages of the outside world, and the only folders that may import them."""


def modules(source: Path) -> dict[str, Path]:
    """Every module under `source/efface` by dotted name."""
    names = {path: path.relative_to(source).with_suffix("").parts for path in sorted((source / "efface").rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a file, wherever it stands; `from package import module` gives the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"(relative import).{base}"
            yield from ((node.lineno, name if (name := f"{base}.{alias.name}") in known else base) for alias in node.names)


def complaint(module: str, target: str) -> str:
    """What is wrong with one import; empty where nothing is."""
    here, there = (name.split(".") for name in (module, target))
    folder = here[1] if len(here) > 1 else ""
    if there[0] in BORDER and folder not in BORDER[there[0]]:
        return f"{there[0]} may be imported in {', '.join(sorted(BORDER[there[0]]))} only"
    if there[0] == "(relative import)":
        return "imports are written in full, from efface on"
    if there[0] != "efface" or not folder:  # the package's own __init__ only names what is imported on first use
        return ""
    if len(there) == 1:
        return "" if ROW[folder] == max(ROW.values()) else "import from the module that defines it, not from the package's front door"
    if folder == there[1]:
        sibling = len(there) == LEAF.get(folder) and here[:-1] == there[:-1] and here != there
        return "siblings do not import each other; move what they share down to ops" if sibling else ""
    if ROW[there[1]] < ROW[folder] or (folder, there[1]) in BESIDE:
        return ""
    return f"{folder} (row {ROW[folder]}) imports from lower rows only, and {there[1]} is row {ROW[there[1]]}"


def complaints(source: Path) -> list[str]:
    """Every import that breaks a rule, as "module:line imports target: why"."""
    known = modules(source)
    unplaced = [name for name in known if name != "efface" and name.split(".")[1] not in ROW]
    return [f"{name}: give its folder a row in tests/test_layers.py" for name in unplaced] or [
        f"{module}:{line} imports {target}: {why}"
        for module, path in known.items()
        for line, target in imports(path, known)
        if (why := complaint(module, target))
    ]


def cycle(source: Path) -> list[str]:
    """The modules of one import cycle; empty where there is none."""
    known = modules(source)
    inner = set(known) - {"efface"}
    graph = {module: {target for _, target in imports(known[module], known)} & inner for module in inner}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_layers() -> None:
    assert not complaints(SOURCE), "\n".join(complaints(SOURCE))


def test_no_cycles() -> None:
    assert not cycle(SOURCE), " -> ".join(cycle(SOURCE))


def test_every_folder_of_modules_is_a_package() -> None:
    bare = {str(path.parent) for path in (SOURCE / "efface").rglob("*.py") if not (path.parent / "__init__.py").is_file()}
    assert not bare, f"without __init__.py, and so left out of the wheel: {sorted(bare)}"


BAD = {
    "upward": ("core/a.py", "from efface.models import load", "core.a:1 imports efface.models: core (row 1)"),
    "beside": ("models/a.py", "def f():\n    import efface.world.b", "models.a:2 imports efface.world.b"),
    "method sibling": ("methods/a.py", "from efface.methods.b import loss", "siblings"),
    "metric sibling": ("evals/metrics/a.py", "from efface.evals.metrics.b import score", "siblings"),
    "border": ("methods/a.py", "from diffusers import UNet2DModel", "diffusers may be imported in models, world only"),
    "front door": ("bench/a.py", "from efface import load", "front door"),
    "relative": ("ops/a.py", "from . import b", "written in full"),
    "unplaced": ("extras/a.py", "", "give its folder a row"),
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "efface" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("case", BAD)
def test_control_a_bad_import_is_found(case: str, tmp_path: Path) -> None:
    name, text, expected = BAD[case]
    (found,) = complaints(tree(tmp_path, {"methods/b.py": "", "evals/metrics/b.py": "", "world/b.py": "", "ops/b.py": "", name: text}))
    assert expected in found


def test_control_a_cycle_is_found(tmp_path: Path) -> None:
    tree(tmp_path, {"ops/a.py": "from efface.ops import b", "ops/b.py": "import efface.ops.c", "ops/c.py": "import efface.ops.a"})
    assert set(cycle(tmp_path)) == {"efface.ops.a", "efface.ops.b", "efface.ops.c"}

"""What a command prints and writes: results on stdout, progress on stderr, folders whole or not at all."""

from __future__ import annotations

import json as jsonlib
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from efface.core.errors import EffaceError
from efface.core.whole import whole_folder

RECORD = "record.json"


def emit(data: Any, text: str, json: bool) -> None:
    """Prints a result: as JSON, or as the text for people."""
    print(jsonlib.dumps(data, indent=2, default=str, ensure_ascii=False) if json else text)


def note(text: str) -> None:
    """One line for people, on stderr."""
    print(f"efface: {text}", file=sys.stderr)


def columns(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], *, header: bool = False) -> str:
    """Rows as aligned text; the last column is wrapped to the terminal's width. Empty for no rows."""
    if not rows:
        return ""
    width = shutil.get_terminal_size((140, 24)).columns
    cells = [*([list(keys)] if header else []), *([str(row[key]) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys) - 1)]
    indent = " " * (sum(widths) + 2 * len(widths) + 2)
    room = max(30, width - len(indent))
    lines = []
    for line in cells:
        head = "  " + "".join(f"{cell:<{w}}  " for cell, w in zip(line, widths, strict=False))
        first, *rest = textwrap.wrap(line[-1], room, break_long_words=False) or [""]
        lines += [head + first, *(indent + part for part in rest)]
    return "\n".join(line.rstrip() for line in lines)


def bar(unit: str, total: int | None, description: str) -> Any:
    """A progress bar on stderr; nothing is drawn where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, file=sys.stderr, disable=None, dynamic_ncols=True)


def check_free(out: Path, force: bool) -> None:
    """Raises EffaceError when `out` is in the way: any file, a folder of others' files, or without `force` an earlier result."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise EffaceError(f"--out {out} is a file; give a folder")
    if not (out / RECORD).is_file():
        raise EffaceError(f"--out {out} holds files that efface did not write (it has no {RECORD}); give another folder")
    if not force:
        raise EffaceError(f"--out {out} holds an earlier result; give another folder, or --force to replace it")


@contextmanager
def result_folder(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end; after an error or Ctrl-C nothing is left of it."""
    check_free(out, force)
    with whole_folder(out) as folder:
        yield folder


def write_json(path: Path, data: Any) -> None:
    path.write_text(jsonlib.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")

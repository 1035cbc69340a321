"""Lists of words in files: candidate vocabularies and lists of exclusions."""

from __future__ import annotations

import csv
from pathlib import Path

from efface.core.errors import InvalidTask

COLUMN = "word"


def words(path: str | Path) -> tuple[str, ...]:
    """The words of a file, in its order; a word that stands twice counts once.

    The file is UTF-8 and holds one word or phrase a line, or is a CSV file with a column `word`. Blank lines and lines that start
    with "#" are skipped. Raises InvalidTask, with the line where one is to blame.
    """
    path = Path(path)
    lines = _lines(path)
    if not lines:
        raise InvalidTask(f"{path} holds no word; write one a line")
    first, header = lines[0]
    columns = [cell.strip() for cell in header.split(",")]
    if COLUMN in columns:
        found = [_cell(path, number, line, columns) for number, line in lines[1:]]
    elif len(columns) > 1:
        raise InvalidTask(f"{path}, line {first}: a CSV file needs a column {COLUMN!r} in its header, which holds {', '.join(columns)}")
    else:
        found = [_single(path, number, line) for number, line in lines]
    if not found:
        raise InvalidTask(f"{path} has the header {header!r} and no word under it")
    return tuple(dict.fromkeys(found))


def _lines(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of every line that says something."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidTask(f"cannot read the word list {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InvalidTask(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    return [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")]


def _cell(path: Path, number: int, line: str, columns: list[str]) -> str:
    cells = next(csv.reader([line]))
    if len(cells) != len(columns):
        raise InvalidTask(f"{path}, line {number}: {len(cells)} cells, and the header has {len(columns)} ({', '.join(columns)})")
    word = cells[columns.index(COLUMN)].strip()
    if not word:
        raise InvalidTask(f"{path}, line {number}: the column {COLUMN!r} is blank")
    return word


def _single(path: Path, number: int, line: str) -> str:
    if "," in line:
        raise InvalidTask(f"{path}, line {number}: {line!r} holds a comma; write one word a line, or a CSV file with a column {COLUMN!r}")
    return line

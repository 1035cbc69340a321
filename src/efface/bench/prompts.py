"""Reads the field's prompt files: I2P, Imagenette and artist lists, Ring-A-Bell, UnlearnDiffAtk, MACE, COCO captions, plain text.

They are all one table with columns of several names; a column that is none of these is left alone. Names are compared without case.

    prompt, text, caption                               the text, and the one column that must be there
    case_number, image_id, coco_id, the nameless first  the number that a prompt goes by; otherwise its place in the file, from 0
    evaluation_seed, sd_seed, seed                      of the initial noise
    evaluation_guidance, sd_guidance_scale, …           guidance scale
    sd_image_width, sd_image_height, width, height      pixels
    label_str, class, artist, concept, object           the concept that the prompt asks for
    categories                                          of I2P, separated by commas
    type                                                of MACE: "erased", or what must stay ("retained", "others")

A `.txt` file holds one prompt a line. A file may be gzipped. Cells that are empty, or "nan" as pandas writes it, hold no value.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from efface.core.errors import EffaceError, suggest

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "text": ("prompt", "text", "caption"),
    "case": ("case_number", "image_id", "coco_id", ""),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    "width": ("sd_image_width", "image_width", "width"),
    "height": ("sd_image_height", "image_height", "height"),
    "concept": ("label_str", "class", "artist", "concept", "object"),
    "categories": ("categories",),
    "type": ("type",),
}
"""Our names, and theirs; the first that a file has is taken."""
ABSENT = ("", "nan", "none", "null")
MINORS = re.compile(
    r"\b(child|children|childlike|kids?|toddlers?|infants?|bab(y|ies)|newborns?|minors?|under-?age|preteens?|teen(s|age|aged|agers?)?"
    r"|adolescents?|school-?(girl|boy|child)(s|ren)?|(little|young|small|tiny) (girl|boy)s?|loli(ta)?s?|shotas?"
    r"|(1[0-7]|[1-9])[ -]?(years?[ -]?olds?|yo|y/o))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Prompt:
    """One row."""

    text: str
    case: int
    """The number that the file gives it, or its place from 0."""
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    concept: str = ""
    categories: tuple[str, ...] = ()
    type: str = ""
    place: int = 0
    """Its place in the file, from 0: of the row, whatever number it goes by."""


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts."""

    path: Path
    rows: tuple[Prompt, ...]
    digest: str
    """The first 16 hexadecimal digits of the SHA-256 of what was read, unzipped."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Which of its columns was taken for what."""

    def subset(self, limit: int | None) -> tuple[Prompt, ...]:
        """At most `limit` rows, evenly spaced, so that a file sorted by concept keeps all of them. Raises ValueError for less than 1."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit was {limit}; expected at least one prompt")
        if limit is None or limit >= len(self.rows):
            return self.rows
        return tuple(self.rows[i * len(self.rows) // limit] for i in range(limit))


def read(path: str | Path) -> PromptFile:
    """Reads a file of prompts.

    Raises EffaceError, with file, line and column: a file that is not there or no text, no column of prompts, a column that stands twice,
    a row of another length, a number that is none, a blank prompt, no prompt at all."""
    path = Path(path)
    data = _bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EffaceError(f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8, or give another file") from error
    plain = path.name.removesuffix(".gz").endswith(".txt")
    columns, rows = ({"text": "line"}, _lines(text)) if plain else _table(path, text)
    if not rows:
        raise EffaceError(f"{path} holds no prompt; give a file with one prompt a line, or a CSV with a column 'prompt'")
    return PromptFile(path, tuple(rows), hashlib.sha256(data).hexdigest()[:16], columns)


def names_minors(text: str) -> bool:
    """Whether a prompt speaks of minors. Protocols that look for nudity never draw such a prompt, whatever the file or the model."""
    return MINORS.search(text) is not None


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EffaceError(f"cannot read the prompts {path}: {reason}; efface ships none, download the file first") from error


def _lines(text: str) -> list[Prompt]:
    found = [line.strip() for line in text.splitlines()]
    return [Prompt(line, number, place=number) for number, line in enumerate(line for line in found if line)]


def _table(path: Path, text: str) -> tuple[dict[str, str], list[Prompt]]:
    delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = _columns(path, header)
        return {ours: header[i] for ours, i in columns.items()}, list(_rows(path, reader, header, columns))
    except csv.Error as error:
        raise EffaceError(f"{path}, line {reader.line_num}, is no CSV ({error}); repair the line, or save the file again") from error


def _columns(path: Path, header: Sequence[str]) -> dict[str, int]:
    """The number of the column for each of our names."""
    names = [name.casefold() for name in header]
    known = [name for spellings in COLUMNS.values() for name in spellings if name]
    for name in known:
        if names.count(name) > 1:
            raise EffaceError(f"{path} has the column {name!r} twice; rename or remove one")
    found = {ours: names.index(name) for ours, spellings in COLUMNS.items() for name in reversed(spellings) if name in names}
    if "case" in found and not names[found["case"]] and found["case"] != 0:
        del found["case"]  # only pandas' index, which comes first, is a number
    if "text" not in found:
        raise EffaceError(f"{path} has no column 'prompt'; {suggest('prompt', [n for n in header if n] or ['(no columns)'])}")
    return found


def _rows(path: Path, reader: Iterator[list[str]], header: Sequence[str], columns: Mapping[str, int]) -> Iterator[Prompt]:
    for number, cells in enumerate(row for row in reader if row):
        line = reader.line_num  # type: ignore[attr-defined]
        if len(cells) != len(header):
            raise EffaceError(
                f"{path}, line {line}, has {len(cells)} cells, and the header {len(header)}; put a text with commas in quotes"
            )
        values = {ours: cells[i].strip() for ours, i in columns.items()}
        where = {ours: f"{path}, line {line}, column {header[i]!r}" for ours, i in columns.items()}
        if not values["text"]:
            raise EffaceError(f"{where['text']}, is blank; remove the row, or write the prompt")
        case = _number(values, where, "case")
        yield Prompt(
            values["text"],
            number if case is None else int(case),
            _whole(values, where, "seed"),
            _number(values, where, "guidance"),
            _whole(values, where, "width", 1),
            _whole(values, where, "height", 1),
            values.get("concept", ""),
            tuple(name.strip() for name in values.get("categories", "").split(",") if name.strip()),
            values.get("type", ""),
            number,
        )


def _number(values: Mapping[str, str], where: Mapping[str, str], name: str) -> float | None:
    text = values.get(name, "")
    if text.casefold() in ABSENT:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise EffaceError(f"{where[name]}, holds {text!r}; expected a number")
    return value


def _whole(values: Mapping[str, str], where: Mapping[str, str], name: str, least: int = 0) -> int | None:
    value = _number(values, where, name)
    if value is None:
        return None
    if value != int(value) or value < least:
        raise EffaceError(f"{where[name]}, holds {values[name]!r}; expected an integer of at least {least}")
    return int(values[name]) if values[name].isdigit() else int(value)  # digits past 2⁵³ do not survive a float

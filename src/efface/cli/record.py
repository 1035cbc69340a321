"""`record.json`: everything that is needed to run an erasure again, and what came out of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efface.bench.result import Result
    from efface.core.edit import Edit
    from efface.core.method import Resources
    from efface.core.model import Model

VERSION = 1
"""Of the record's form."""


def command() -> str:
    """The command line of this process, as a shell takes it."""
    return shlex.join(["efface", *sys.argv[1:]])


def record(edit: Edit, model: Model, files: Sequence[str], resources: Resources, vocabulary: str, result: Result | None) -> dict[str, Any]:
    """JSON values. `method` is the text form with every field that is not the default, whatever preset it came from."""
    card = edit.card
    words = list(resources.vocabulary) or model.words()
    return {
        "format": "efface-record",
        "version": VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "method": card.method,
        "task": card.task,
        "seed": card.seed,
        "model": {
            "id": card.model,
            "family": card.family,
            "fingerprint": card.fingerprint.digest,
            "dtype": card.fingerprint.dtype,
            "device": str(model.device),
        },
        "vocabulary": {"source": vocabulary, "words": len(words), "sha256": digest(words), "exclude": list(resources.exclude)},
        "edit": {"kind": edit.kind, "threat": edit.threat},
        "cost": dict(card.cost),
        "versions": dict(card.versions),
        "files": list(files),
        "scores": scores(result),
        "result": None if result is None else result.json(),
    }


def measurement(result: Result, files: Sequence[str], *, original: Model, changed: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values of a measurement alone: what was measured, on which model, and every raw detection.

    Args:
        changed: what was measured: an edit with its card, or another model."""
    from efface.core.card import Fingerprint, versions

    found = Fingerprint.of(original)
    return {
        "format": "efface-measurement",
        "version": VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "method": result.method,
        "task": result.task,
        "model": {
            "id": original.id,
            "family": original.family,
            "fingerprint": found.digest,
            "dtype": found.dtype,
            "device": str(original.device),
        },
        "changed": dict(changed),
        "versions": versions(),
        "files": list(files),
        "scores": scores(result),
        "result": result.json(),
    }


def read_result(path: Path) -> Result:
    """The result in a record, or in the folder that holds one. Raises EffaceError where there is none, OSError for no such file."""
    from efface.bench.result import Result
    from efface.core.errors import EffaceError

    path = path / "record.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EffaceError(f"{path} is no JSON ({error}); give a record.json of `efface erase` or `efface measure`") from error
    found = data.get("result") if isinstance(data, dict) else None
    if found is None:
        raise EffaceError(f"{path} holds no measurement; it was made with --images none, or is no record of efface")
    return Result.from_json(found)


def scores(result: Result | None) -> dict[str, Any]:
    """The lines of the table by key: before, after and change, each with its 95 % interval and n."""
    if result is None:
        return {}
    parts = ("before", "after", "change")
    lines = (*result.lines, *result.quality)
    return {line.key: {part: _numbers(getattr(line.contrast, part)) for part in parts} for line in lines}


def _numbers(score: Any) -> dict[str, Any]:
    values = dataclasses.asdict(score)
    return {name: values[name] for name in ("value", "low", "high", "n", "undetermined", "unit")}


def digest(words: Sequence[str]) -> str:
    """SHA-256 of a word list, one word a line."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()

"""`record.json`: everything that is needed to run an erasure again, and what came out of it."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
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


def scores(result: Result | None) -> dict[str, Any]:
    """The lines of the table by key: before, after and change, each with its 95 % interval and n."""
    if result is None:
        return {}
    parts = ("before", "after", "change")
    return {line.key: {part: _numbers(getattr(line.contrast, part)) for part in parts} for line in result.lines}


def _numbers(score: Any) -> dict[str, Any]:
    values = dataclasses.asdict(score)
    return {name: values[name] for name in ("value", "low", "high", "n", "undetermined", "unit")}


def digest(words: Sequence[str]) -> str:
    """SHA-256 of a word list, one word a line."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()

"""Records of trials in one file of JSON lines: a line is appended whole, and a half line that a crash left is dropped.

A file whose name ends in .gz is read as well, which is how records are kept for good: they shrink to a tenth.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efface.core.errors import EffaceError

FORMAT, VERSION = "efface-trial", 1


@dataclass(frozen=True)
class Log:
    """The file of records. One process writes it at a time."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        """Every whole record; none where there is no file.

        Raises EffaceError for a line in the middle that is none of ours, or is of another version."""
        if not self.path.is_file():
            return []
        raw = self.path.read_bytes()
        text = (gzip.decompress(raw) if self.path.suffix == ".gz" else raw).decode("utf-8", errors="replace")
        whole, _, _ = text.rpartition("\n")
        lines = whole.split("\n")  # not splitlines(): a prompt may hold what that takes for the end of a line as well
        return [self._record(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line and waits until the disk has it; half a line at the end, which a crash left, is cut off first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=str)
        with self.path.open("ab+") as file:
            file.truncate(self._whole())
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole(self) -> int:
        """The number of bytes up to the end of the last whole line."""
        return self.path.read_bytes().rfind(b"\n") + 1

    def _record(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise EffaceError(f"{self.path}, line {number}, is no JSON ({error}); remove the line, and its trial is run again") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
            raise EffaceError(f"{self.path}, line {number}, is no record of a trial of version {VERSION}; move the file away and run again")
        return record

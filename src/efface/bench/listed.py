"""Plans from a file of prompts: the same prompts, seeds and guidance as whoever published them, and what was not taken over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from efface.bench import prompts
from efface.bench.options import ROW, Options
from efface.bench.plan import FIRST_SEED, Plan
from efface.bench.prompts import Prompt, PromptFile
from efface.bench.questions import Asks
from efface.core.errors import EffaceError
from efface.core.evidence import Shot

QUICK = 64
"""Prompts of a file that a quick measurement draws."""
LATER = 1_000_003
"""Between the seeds of the pictures of one prompt, where `each` asks for several; a prime far above the spacing of any file's seeds."""


@dataclass(frozen=True)
class Rows:
    """What is to be drawn of a file."""

    file: PromptFile
    chosen: tuple[Prompt, ...]
    notes: tuple[str, ...]
    """What is left out, in sentences."""

    @classmethod
    def of(cls, protocol: str, size: str, options: Options, *, wanted: Callable[[Prompt], bool] = lambda row: True, why: str = "") -> Rows:
        """Reads the file of the options.

        Args:
            size: "quick" draws at most `QUICK` prompts, unless the options limit them.
            wanted: which rows may be drawn at all; `why` completes "N prompts …" about the others.

        Raises EffaceError without a file, for one that cannot be read, or where no row is wanted."""
        if not options.prompts:
            raise EffaceError(
                f"the protocol {protocol!r} draws a file of prompts, and none was given; give one, with --prompts FILE or prompts = 'FILE'"
            )
        file = prompts.read(options.prompts)
        fine = tuple(row for row in file.rows if wanted(row))
        if not fine:
            raise EffaceError(f"none of the {len(file.rows)} prompts of {file.path} can be drawn: all {why}")
        limit = options.limit if options.limit is not None else QUICK if size == "quick" else None
        chosen = replace(file, rows=fine).subset(limit)
        notes = [f"{len(file.rows) - len(fine)} of the {len(file.rows)} prompts of the file {why}."] if len(fine) < len(file.rows) else []
        if len(chosen) < len(fine):
            notes.append(f"A subset: {len(chosen)} of {len(fine)} prompts, evenly spaced.")
        return cls(file, chosen, tuple(notes))

    def plan(self, name: str, size: str, options: Options, asks: Asks, shots: Callable[[Prompt], list[Shot]]) -> Plan:
        """The plan of what `shots` makes of each row, without seeds; a row without a seed takes the protocol's own, by its place in
        the file, so that it has the same noise however few of the rows are drawn.

        The guidance is the options'; each row's own is taken where they say "row". Sizes are never taken over."""
        drawn = [(shot, row, _seed(row, copy)) for row in self.chosen for copy in range(options.each) for shot in shots(row)]
        by_row = options.guidance == ROW
        return Plan(
            f"{name}/{self.file.path.name}/{size}",
            tuple(replace(shot, seed=seed) for shot, _, seed in drawn),
            0,
            options.steps,
            None if by_row else options.guidance,  # type: ignore[arg-type]
            (*self.notes, *self._ignored(by_row)),
            asks,
            tuple(row.guidance for _, row, _ in drawn) if by_row else (),
            tuple(row.case for _, row, _ in drawn),
            {"file": self.file.path.name, "sha256": self.file.digest, "rows": len(self.file.rows), "columns": dict(self.file.columns)},
        )

    def _ignored(self, by_row: bool) -> list[str]:
        found = []
        if not by_row and any(row.guidance is not None for row in self.chosen):
            found.append("The guidance of each row is not taken: all have the same.")
        if any(row.width or row.height for row in self.chosen):
            found.append("The size of each row is not taken: every picture has the model's own.")
        return found


def _seed(row: Prompt, copy: int) -> int:
    return (FIRST_SEED + row.place if row.seed is None else row.seed) + LATER * copy

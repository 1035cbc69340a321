"""What is drawn to judge an edit: a fixed list of prompts and seeds, the same before and after, and the same for every method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from efface.bench.questions import ERASURE, Asks
from efface.core.evidence import Role, Shot

FIRST_SEED = 1_000_000
"""Pictures are numbered from here, far from the seeds that fits are given, so that no fit has seen their noise."""
SEED_STRIDE = 100_000
"""Between the first pictures of two seeds of a protocol."""
ROLES: tuple[Role, ...] = ("target", "implied", "neighbour", "kept", "unrelated", "pair")


@dataclass(frozen=True)
class Plan:
    """The pictures of a protocol."""

    name: str
    """The protocol with its variant: "erasure/emoji/quick"."""
    shots: tuple[Shot, ...]
    seed: int = 0
    steps: int | None = None
    """Of the sampler; None takes the model's own."""
    guidance: float | None = None
    """None takes the model's own."""
    unmeasured: tuple[str, ...] = ()
    """What this plan leaves out, in sentences for the report."""
    asks: Asks = ERASURE
    """What is asked of the pictures."""
    guidances: tuple[float | None, ...] = ()
    """A guidance for each shot, in place of `guidance`; empty where all have the same."""
    cases: tuple[int, ...] = ()
    """The number by which each shot goes in its prompt file; empty where there is none."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The prompt file, as JSON values."""

    @property
    def digest(self) -> str:
        """Recognises the list of prompts and seeds: 16 hexadecimal digits of SHA-256."""
        scales = self.guidances or ((),) * len(self.shots)
        rows = [[shot.prompt, shot.seed, *([scale] if self.guidances else [])] for shot, scale in zip(self.shots, scales, strict=True)]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]

    def only(self, rows: Sequence[int]) -> Plan:
        """Some of the shots."""
        scales = tuple(self.guidances[i] for i in rows) if self.guidances else ()
        cases = tuple(self.cases[i] for i in rows) if self.cases else ()
        return replace(self, shots=tuple(self.shots[i] for i in rows), guidances=scales, cases=cases)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that occur, in the order of `ROLES`."""
        return tuple(role for role in ROLES if any(shot.role == role for shot in self.shots))

    def first(self, each: int) -> tuple[int, ...]:
        """The first `each` shots of every role."""
        rows = {role: [i for i, shot in enumerate(self.shots) if shot.role == role] for role in self.roles}
        return tuple(i for indices in rows.values() for i in indices[:each])

    def shown(self, each: int = 8) -> tuple[int, ...]:
        """The shots whose pictures are kept for people to look at: the first `each` of every role, and no picture twice, since several
        questions may be asked of one."""
        first: dict[tuple[str, int], int] = {}
        for i in self.first(each):
            first.setdefault((self.shots[i].prompt, self.shots[i].seed), i)
        return tuple(first.values())


def numbered(shots: Sequence[Shot], seed: int) -> tuple[Shot, ...]:
    """The shots with a seed of their own each. Raises ValueError for a negative seed, or more shots than `SEED_STRIDE`."""
    if seed < 0:
        raise ValueError(f"seed was {seed}; expected an integer of at least 0")
    if len(shots) > SEED_STRIDE:
        raise ValueError(f"{len(shots)} shots were planned; expected at most {SEED_STRIDE}, so that seeds do not meet")
    first = FIRST_SEED + SEED_STRIDE * seed
    return tuple(Shot(s.prompt, first + i, s.role, s.concept, s.labels, s.kind, s.partner) for i, s in enumerate(shots))


def shares(total: int, parts: int) -> list[int]:
    """Splits `total` into `parts` whole numbers that differ by one at most, the larger first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def interleave(lists: Iterable[Sequence[Shot]]) -> list[Shot]:
    """The first of each list, then the second of each, and so on: so that the first few show many concepts."""
    columns = [list(shots) for shots in lists]
    longest = max(map(len, columns), default=0)
    return [column[i] for i in range(longest) for column in columns if i < len(column)]

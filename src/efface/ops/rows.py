"""Which rows of an encoded text stand for it: a text of n tokens is start, its words, the first end-of-text at n − 1, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

Scope = Literal["last_subject", "last_subject_to_end", "end", "all", "all_but_start"]
SCOPES: tuple[str, ...] = get_args(Scope)


def last_subject(length: int) -> int:
    """The index of the last token before the first end-of-text one; that of the start token for an empty text."""
    return length - 2


def cut(tokens: Float[Tensor, "l d"], length: int, scope: str) -> Float[Tensor, "r d"]:
    """The rows of a text of `length` tokens that a scope names. Raises ValueError for an unknown scope."""
    last = last_subject(length)
    bounds = {
        "last_subject": slice(last, last + 1),
        "last_subject_to_end": slice(last, None),
        "end": slice(length - 1, length),
        "all": slice(None),
        "all_but_start": slice(1, None),
    }
    if scope not in bounds:
        raise ValueError(f"the scope was {scope!r}; expected one of {', '.join(bounds)}")
    return tokens[bounds[scope]]


def paired(context: Float[Tensor, "n d"], target: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "r d"], Float[Tensor, "r d"]]:
    """Two blocks of rows, the longer one cut at its tail to the length of the other."""
    rows = min(len(context), len(target))
    return context[:rows], target[:rows]


def find(part: Sequence[int], whole: Sequence[int]) -> int | None:
    """Where a run of token ids first stands in a longer one."""
    part, whole = list(part), list(whole)
    starts = range(len(whole) - len(part) + 1)
    return next((i for i in starts if whole[i : i + len(part)] == part), None) if part else None


def aligned(first: Sequence[int], second: Sequence[int], total: int) -> tuple[list[int], list[int]]:
    """Positions of the words that two texts share around the place where they differ: equally many on both sides.

    Each is given by its token ids, start and end-of-text included and padding not. Shared are the longest common prefix, the longest
    common suffix of the rest, and the padding behind, up to `total` positions for the longer text (MACE, `src/cfr_utils.py`)."""
    short = min(len(first), len(second))
    head = next((i for i in range(short) if first[i] != second[i]), short)
    tail = next((i for i in range(short - head) if first[-1 - i] != second[-1 - i]), short - head)
    padding = total - max(len(first), len(second))

    def positions(length: int) -> list[int]:
        return [*range(head), *range(length - tail, length + padding)]

    return positions(len(first)), positions(len(second))

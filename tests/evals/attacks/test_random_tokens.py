"""Random tokens: the prompt stays as it is behind k words, which are others for each prompt, candidate and seed."""

from __future__ import annotations

import attackparts as parts
import pytest
from attackparts import CAT

from efface.core import search, tokens
from efface.core.errors import InvalidAttack
from efface.core.model import Model


def tried(before: Model, after: Model, text: str, seed: int = 0) -> list[str]:
    found = search.attack(text).search(before, after, CAT, parts.Bright(2), budget=10**6, seed=seed)
    assert found.success is not None
    assert found.before is not None
    assert found.success.value == found.before.value == 0
    return [row["candidate"] for row in found.details["seen"] if any(text in row["candidate"] for text in CAT.texts)]


def test_what_is_drawn_is_the_prompt_behind_k_words(before: Model, after: Model) -> None:
    told = tried(before, after, "random_tokens(k=2, candidates=3)")
    assert len(told) == 3 * len(CAT.texts)
    bodies = tokens.bodies(before, told)
    for i, body in enumerate(bodies):
        (own,) = tokens.bodies(before, [CAT.texts[i % len(CAT.texts)]])
        assert body[2:] == own
    assert len({tuple(body[:2]) for body in bodies}) > len(bodies) // 2
    assert tried(before, after, "random_tokens(k=2, candidates=3)") == told
    assert tried(before, after, "random_tokens(k=2, candidates=3)", seed=1) != told


def test_what_cannot_be_drawn_is_refused() -> None:
    for text in ("random_tokens(k=0)", "random_tokens(candidates=0)", "random_tokens(alphabet='letters')"):
        with pytest.raises(InvalidAttack, match="random_tokens's"):
            search.attack(text)

"""Cards taken apart: every method has an idea, a cost and limits, and no paragraph is lost."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest

from efface.core import catalog
from efface.report.profiles import LIMITS, flowing, is_code, profile


def words(text: str) -> Counter[str]:
    return Counter(text.casefold().split())


@pytest.mark.parametrize("name", catalog.names())
def test_every_card_says_what_a_page_needs_and_nothing_is_lost(name: str) -> None:
    found = profile(name)
    assert found is not None
    assert found.title
    assert found.idea.endswith(".")
    assert found.cost
    assert found.limits
    assert found.kinds
    assert found.uses
    _, _, card = (importlib.import_module(f"efface.methods.{name}").__doc__ or "").partition(": ")
    assert words(" ".join([found.idea, *found.workings, *found.cost, found.limits])) == words(card.replace(LIMITS, ""))
    assert set(found.fields) == set(found.defaults)


def test_reconstructions_are_marked() -> None:
    marked = {name for name in catalog.names() if (p := profile(name)) and p.reconstruction}
    assert {"all_but_one", "degeneration_tuning", "dumo", "kpop"} <= marked
    assert not {"esd", "uce", "ap"} & marked


def test_a_method_that_is_not_there_has_no_profile() -> None:
    assert profile("their_package.module:Mine") is None


def test_a_paragraph_flows_and_a_list_does_not() -> None:
    assert flowing("one\ntwo") == "one two"
    assert flowing("Ours:\n- a b\n  c\n- d\nAnd e\nf") == "Ours:\n- a b c\n- d\n\nAnd e f"
    assert flowing("1. a\n   b\n2. c") == "1. a b\n2. c"
    assert is_code("    W = x\n\n    V = y")
    assert not is_code("with W = x,\n    V = y")

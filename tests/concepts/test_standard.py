"""The standard erasures are the first of their kind, and never chosen."""

from __future__ import annotations

import pytest

from efface.concepts import vocabulary
from efface.concepts.standard import KINDS, standard
from efface.concepts.vocabulary import read
from efface.core.errors import InvalidTask
from efface.core.task import Task

WORLD = read()


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_the_first_of_its_kind_in_the_list(kind: str) -> None:
    (found,) = [s for s in standard() if s.concept.kind == kind]
    if kind == "style":
        first, *others = [style.name for style in WORLD.styles]
    else:
        first, *others = next(group for group in WORLD.groups if group.kind == kind).objects
    assert (found.concept.name, found.neighbours) == (first, tuple(others))


def test_one_of_each_kind_that_a_group_of_the_world_has() -> None:
    assert tuple(s.concept.kind for s in standard()) == KINDS
    assert {group.kind for group in WORLD.groups} | {"style"} == set(KINDS)


def test_their_tasks_are_read_back() -> None:
    for found in standard():
        assert Task.parse(found.task).targets == (found.concept,)
        assert not Task.parse(found.task).keep


def test_the_file_is_no_vocabulary() -> None:
    with pytest.raises(InvalidTask, match="Valid: emoji$"):
        vocabulary("standart")

"""Concepts, swaps and tasks: their text form, and the tasks that mean nothing."""

import pytest

from efface.core.errors import InvalidTask
from efface.core.task import Concept, Swap, Task


@pytest.mark.parametrize(
    "text",
    ["cat", "style:van gogh -> a painting", "cat; dog | keep tiger, style:retro", "identity:santa claus; unsafe:bomb -> apple"],
)
def test_the_text_form_round_trips(text):
    task = Task.parse(text)
    assert str(task) == text
    assert Task.parse(str(task)) == task


def test_the_parts_of_a_text():
    task = Task.of("style:van gogh -> a painting", keep="monet, dog")
    assert task.erase == (Swap(Concept("van gogh", "style"), Concept("a painting")),)
    assert [c.name for c in task.keep] == ["monet", "dog"]
    assert Task.of(["cat", Concept("bomb", "unsafe")]).targets == (Concept("cat"), Concept("bomb", "unsafe"))


def test_nothing_is_the_empty_prompt_and_only_an_anchor():
    assert Concept.nothing().texts == ("",)
    assert Concept.nothing() == Concept.nothing() != Concept("cat")
    with pytest.raises(InvalidTask, match="target of an erasure was empty"):
        Swap(Concept.nothing())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Concept(" "), "name, and it was blank"),
        (lambda: Concept("a, b"), "holds ','"),
        (lambda: Concept("cat", "animal"), "unknown kind 'animal'.*Valid: identity, object"),
        (lambda: Concept.parse("stile:monet"), "did you mean 'style'"),
        (lambda: Task(()), "without a target"),
        (lambda: Task.of("cat; CAT"), "more than once in `erase`"),
        (lambda: Task.of("cat", ["dog", "Dog"]), "more than once in `keep`"),
        (lambda: Task.of("cat", ["Cat"]), "also in `keep`"),
        (lambda: Task.of("cat -> cat"), "replaced by itself"),
        (lambda: Task.of(""), "no target to erase"),
        (lambda: Task.of("cat | dog"), "expected 'keep a, b'"),
    ],
)
def test_bad_tasks_say_what_is_wrong(make, message):
    with pytest.raises(InvalidTask, match=message):
        make()


def test_keep_is_added_to_that_of_a_task():
    task = Task.parse("cat -> animal | keep dog")
    assert Task.of(task, "tiger, lion") == Task.parse("cat -> animal | keep dog, tiger, lion")
    assert Task.of(task, [Concept("tiger")]) == Task.parse("cat -> animal | keep dog, tiger")
    assert Task.of(task) is task
    for again in ("dog", "cat"):
        with pytest.raises(InvalidTask, match=f"'{again}'"):
            Task.of(task, again)

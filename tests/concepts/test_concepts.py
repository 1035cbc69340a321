"""Kinds by name, the words of the bundled model, and word lists in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from efface.concepts import resolve, vocabulary, words
from efface.concepts.vocabulary import check, parse, read
from efface.core.errors import InvalidTask
from efface.core.task import Concept, Task


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("cat", "object"),
        ("Santa Claus", "identity"),
        ("bomb", "unsafe"),
        ("weapon", "unsafe"),
        ("retro", "style"),
        ("blue", "other"),
        ("van gogh", "style"),
        ("Nudity", "unsafe"),
        ("a word that nobody listed", "object"),
    ],
)
def test_known_names_get_their_kind(text: str, kind: str) -> None:
    assert resolve(text) == Concept(text, kind)  # type: ignore[arg-type]


def test_a_written_kind_wins() -> None:
    assert resolve("object:bomb") == Concept("bomb", "object")


def test_spaces_are_tidied() -> None:
    assert resolve("  santa   claus ") == Concept("santa claus", "identity")


@pytest.mark.parametrize("text", ["", "  ", "colour:red"])
def test_what_is_no_concept_is_refused(text: str) -> None:
    with pytest.raises(InvalidTask):
        resolve(text)


def test_a_task_resolves_its_concepts() -> None:
    task = Task.of("bomb -> apple", "retro, dog", resolve=resolve)
    assert str(task) == "unsafe:bomb -> apple | keep style:retro, dog"


def test_the_vocabulary_names_everything_once() -> None:
    names = vocabulary("emoji")
    assert {"cat", "feline", "retro", "blue", "santa claus"} <= set(names)
    assert len(names) == len(set(names))
    assert names[: len(read().objects)] == read().objects


def test_an_unknown_vocabulary_names_the_known() -> None:
    with pytest.raises(InvalidTask, match="did you mean 'emoji'"):
        vocabulary("emojis")


def test_neighbours_are_of_the_same_group() -> None:
    world = read()
    assert "tiger" in world.neighbours("cat")
    assert "cat" not in world.neighbours("cat")
    assert world.phrase("owl") == "an owl"
    assert world.phrase("cat", "retro") == "a retro cat"
    with pytest.raises(KeyError, match="no object"):
        world.neighbours("spaceship")


WORLD = """
name = "tiny"
[[group]]
name = "feline"
kind = "object"
objects = ["cat", "tiger"]
[[style]]
name = "flat"
set = "flat"
[[background]]
name = "white"
rgb = [255, 255, 255]
share = 1.0
"""


def test_a_sound_world_passes() -> None:
    check(parse(WORLD))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tiger"', '"cat"', "stand twice: cat"),
        ('kind = "object"', 'kind = "thing"', "kind 'thing'"),
        ("share = 1.0", "share = 0.9", "sum to 0.9"),
        ('name = "tiny"', 'name = "tiny"\nbare = ["milk"]', "no object or group: milk"),
    ],
)
def test_a_world_that_contradicts_itself_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(parse(WORLD.replace(old, new)))


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("cat\nhot dog\n", ("cat", "hot dog")),
        ("# animals\n\n cat \ndog\ncat\n", ("cat", "dog")),
        ("word\ncat\ndog", ("cat", "dog")),
        ('id,word\n1,cat\n2,"hot dog"\n', ("cat", "hot dog")),
        ("\ufeffcat\r\ndog\r\n", ("cat", "dog")),
    ],
)
def test_word_lists(content: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    assert words(write(tmp_path, content)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no word"),
        ("# only a comment\n", "holds no word"),
        ("word\n", "no word under it"),
        ("cat\ndog, tiger\n", "line 2: 'dog, tiger' holds a comma"),
        ("id,name\n1,cat\n", "line 1: a CSV file needs a column 'word'"),
        ("id,word\n1,cat\n2\n", "line 3: 1 cells, and the header has 2"),
        ("id,word\n1,\n", "line 2: the column 'word' is blank"),
        (b"cat\n\xff\xfe\n", "line 2: not UTF-8"),
    ],
)
def test_a_bad_word_list_names_the_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidTask, match=message):
        words(write(tmp_path, content))


def test_a_missing_word_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidTask, match=r"nowhere\.txt: No such file"):
        words(tmp_path / "nowhere.txt")

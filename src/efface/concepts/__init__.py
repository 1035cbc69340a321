"""What concepts are called: their kinds by name, the words of the bundled model, and lists of words in files. Light to import."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources

from efface.concepts.vocabulary import read
from efface.concepts.words import words
from efface.core.errors import InvalidTask, suggest
from efface.core.task import Concept

__all__ = ["resolve", "vocabulary", "words"]


def resolve(text: str) -> Concept:
    """The concept of a text: "kind:name" as it says; else the kind that is known for the name, case aside; else an object.

    "santa claus" is an identity, "bomb" and "nudity" are unsafe, "retro" and "van gogh" are styles. The kind chooses a method's
    preset. Raises InvalidTask for a blank name or an unknown kind.
    """
    if ":" in text:
        return Concept.parse(text)
    name = " ".join(text.split())
    return Concept(name, _kinds().get(name.casefold(), "object"))  # type: ignore[arg-type]


def vocabulary(name: str = "emoji") -> tuple[str, ...]:
    """Every word that a bundled world knows: objects, groups, styles, background colours. Raises InvalidTask for an unknown name."""
    try:
        return tuple(read(name).kinds)
    except FileNotFoundError as error:
        raise InvalidTask(f"there is no bundled vocabulary {name!r}; {suggest(name, _worlds())}") from error


def _worlds() -> list[str]:
    folder, others = resources.files("efface") / "concepts", ("canvas.toml", "known.toml", "standard.toml")
    return [f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml") and f.name not in others]


@cache
def _kinds() -> dict[str, str]:
    """Kind by casefolded name: the lists of `known.toml`, then the words of the bundled model."""
    text = (resources.files("efface") / "concepts" / "known.toml").read_text(encoding="utf-8")
    known = {name.casefold(): kind for kind, names in tomllib.loads(text).items() for name in names}
    return known | {name.casefold(): kind for name, kind in read().kinds.items()}

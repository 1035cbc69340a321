"""The words of a bundled world: objects in neighbour groups, drawing styles and background colours, read from `<name>.toml`.

Everything that numbers them (sprite cache, judge, scenes) uses the order of the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

KINDS = ("object", "identity", "unsafe")


@dataclass(frozen=True)
class Group:
    """A neighbour group: its name stands in captions for any of its objects ("a fruit")."""

    name: str
    kind: str
    """One of `KINDS`."""
    objects: tuple[str, ...]


@dataclass(frozen=True)
class Style:
    """A drawing style, which is one vendor's icon set."""

    name: str
    set: str
    """The npm package is `@iconify-json/<set>`."""


@dataclass(frozen=True)
class Background:
    """A plain background colour."""

    name: str
    rgb: tuple[int, int, int]
    """sRGB, 0 to 255."""
    share: float
    """Share of the scenes that have it; all shares sum to one."""


@dataclass(frozen=True)
class Vocabulary:
    """All words of one world."""

    name: str
    groups: tuple[Group, ...]
    styles: tuple[Style, ...]
    backgrounds: tuple[Background, ...]
    icons: dict[str, str]
    """Icon names, where they are not the object's name with hyphens."""
    bare: frozenset[str]
    """Names that take no article."""

    @cached_property
    def kinds(self) -> Mapping[str, str]:
        """Every name and its concept kind: objects, then groups, then styles ("style"), then backgrounds ("other")."""
        objects = {name: group.kind for group in self.groups for name in group.objects}
        groups = {group.name: group.kind for group in self.groups}
        return objects | groups | {s.name: "style" for s in self.styles} | {b.name: "other" for b in self.backgrounds}

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """All objects, group after group: the numbering that everything shares."""
        return tuple(name for group in self.groups for name in group.objects)

    def group_of(self, name: str) -> Group:
        """The neighbour group of an object.

        Raises:
            KeyError: if the world has no such object.
        """
        for group in self.groups:
            if name in group.objects:
                return group
        raise KeyError(f"{name!r} is no object of the world {self.name!r}; its objects are: {', '.join(self.objects)}")

    def neighbours(self, name: str) -> tuple[str, ...]:
        """The other objects of the group of `name`."""
        return tuple(other for other in self.group_of(name).objects if other != name)

    def kind(self, name: str) -> str:
        """The concept kind of an object or of a group: one of `KINDS`."""
        for group in self.groups:
            if group.name == name:
                return group.kind
        return self.group_of(name).kind

    def icon(self, name: str) -> str:
        """The name of an object's icon in every icon set."""
        return self.icons.get(name, name.replace(" ", "-"))

    def phrase(self, name: str, adjective: str = "") -> str:
        """A noun phrase with the right article: "a cat", "an owl", "grapes", "a retro owl"."""
        words = f"{adjective} {name}".strip()
        if name in self.bare:
            return words
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@cache
def read(name: str = "emoji") -> Vocabulary:
    """Reads `concepts/<name>.toml`.

    Raises:
        FileNotFoundError: if there is no such world.
        ValueError: if the file contradicts itself (an object that stands twice, an unknown kind, shares that do not sum to 1).
    """
    file = resources.files("efface") / "concepts" / f"{name}.toml"
    if not file.is_file():
        raise FileNotFoundError(f"no vocabulary {name!r}: expected the file {file}; the bundled world is 'emoji'")
    vocabulary = parse(file.read_text(encoding="utf-8"))
    check(vocabulary)
    return vocabulary


def parse(text: str) -> Vocabulary:
    """A vocabulary from the text of its TOML file."""
    data = tomllib.loads(text)
    return Vocabulary(
        name=data["name"],
        groups=tuple(Group(g["name"], g["kind"], tuple(g["objects"])) for g in data["group"]),
        styles=tuple(Style(s["name"], s["set"]) for s in data["style"]),
        backgrounds=tuple(Background(b["name"], tuple(b["rgb"]), float(b["share"])) for b in data["background"]),
        icons=dict(data.get("icons", {})),
        bare=frozenset(data.get("bare", ())),
    )


def check(vocabulary: Vocabulary) -> None:
    """Raises ValueError where the vocabulary contradicts itself."""
    names = [*vocabulary.objects, *(g.name for g in vocabulary.groups)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"vocabulary {vocabulary.name!r}: each name may stand once, but these stand twice: {', '.join(twice)}")
    for group in vocabulary.groups:
        if group.kind not in KINDS:
            raise ValueError(f"group {group.name!r} has kind {group.kind!r}; expected one of {', '.join(KINDS)}")
    unknown = sorted((set(vocabulary.icons) | set(vocabulary.bare)) - set(names))
    if unknown:
        raise ValueError(f"vocabulary {vocabulary.name!r}: `icons` or `bare` name what is no object or group: {', '.join(unknown)}")
    total = sum(b.share for b in vocabulary.backgrounds)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"vocabulary {vocabulary.name!r}: background shares sum to {total:.6f}; expected 1")

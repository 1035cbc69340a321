"""Captions: what a scene holds, in words.

A caption names the object (or in a share of them its group: "a fruit"), in some the style and the background, in one of
several templates. Scenes of two objects are "a cat beside a dog", left one first. Whatever a caption says is true of its
scene; what it leaves out is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efface.concepts.vocabulary import Vocabulary, read
from efface.world.scenes import Scenes

TEMPLATES = ("{}", "an emoji of {}", "a picture of {}", "an image of {}", "a drawing of {}", "an icon of {}")
PLAIN = 0.5
"""Share of captions in the first template; the others share the rest equally."""
RELATIONS = ("beside", "next to", "and")
BESIDE = 0.6
"""Share of pairs that use the first relation; the others share the rest equally."""
STYLED = 0.55
"""Share of captions that name the style; half of those of single objects as an adjective, the others as a suffix."""
COLOURED = 0.5
"""Share of captions that name the background."""
GROUPED = 0.12
"""Share of captions of single objects that name the group in place of the object."""


@dataclass(frozen=True)
class Captions:
    """Captions with their meaning, so that one can tell which pictures a caption is true of."""

    texts: tuple[str, ...]
    objects: Tensor
    """(b, 2) int64: the objects named; -1 where there is none. For a group word the first is the group's number."""
    grouped: Tensor
    """(b,) bool: whether the caption names the group."""
    style: Tensor
    """(b,) int64; -1 where the caption leaves it out."""
    background: Tensor
    """(b,) int64; -1 where the caption leaves it out."""


def share(u: Tensor, first: float, count: int) -> Tensor:
    """Maps uniform `u` in [0, 1) to 0 with probability `first`, and evenly to 1..count-1 otherwise."""
    rest = ((u - first) / (1 - first) * (count - 1)).long().clamp(0, count - 2) + 1
    return torch.where(u < first, 0, rest)


def describe(scenes: Scenes, generator: torch.Generator, vocabulary: Vocabulary | None = None) -> Captions:
    """Draws one caption for each scene."""
    vocabulary = vocabulary or read()
    u = torch.rand(len(scenes), 6, generator=generator)
    paired = scenes.objects[:, 1] >= 0
    grouped = (u[:, 0] < GROUPED) & ~paired
    style = torch.where(u[:, 1] < STYLED, scenes.style, -1)
    background = torch.where(u[:, 2] < COLOURED, scenes.background, -1)
    objects = scenes.objects.clone()
    objects[:, 0] = torch.where(grouped, groups(vocabulary)[objects[:, 0]], objects[:, 0])
    columns = [
        objects.tolist(),
        grouped.tolist(),
        style.tolist(),
        background.tolist(),
        (u[:, 3] < 0.5).tolist(),
        share(u[:, 4], PLAIN, len(TEMPLATES)).tolist(),
        share(u[:, 5], BESIDE, len(RELATIONS)).tolist(),
    ]
    texts = tuple(phrase(vocabulary, *row) for row in zip(*columns, strict=True))
    return Captions(texts, objects, grouped, style, background)


def phrase(
    vocabulary: Vocabulary,
    objects: tuple[int, int],
    grouped: bool,
    style: int,
    background: int,
    adjective: bool,
    template: int,
    relation: int,
) -> str:
    """One caption from its parts; see `Captions` for their meaning."""
    first, second = objects
    name = vocabulary.groups[first].name if grouped else vocabulary.objects[first]
    word = vocabulary.styles[style].name if style >= 0 else ""
    as_adjective = adjective and second < 0
    text = vocabulary.phrase(name, word if as_adjective else "")
    if second >= 0:
        text = f"{text} {RELATIONS[relation]} {vocabulary.phrase(vocabulary.objects[second])}"
    text = TEMPLATES[template].format(text)
    if word and not as_adjective:
        text = f"{text} in {word} style"
    if background >= 0:
        text = f"{text} on {vocabulary.phrase('background', vocabulary.backgrounds[background].name)}"
    return text


def groups(vocabulary: Vocabulary) -> Tensor:
    """(objects,) int64: the number of each object's group."""
    return torch.tensor([number for number, group in enumerate(vocabulary.groups) for _ in group.objects])


def true_of(captions: Captions, scenes: Scenes, vocabulary: Vocabulary | None = None) -> Tensor:
    """(captions, scenes) bool: whether each caption is true of each scene, order of pairs included."""
    vocabulary = vocabulary or read()
    shown = scenes.objects
    shown_group = torch.where(shown[:, 1] < 0, groups(vocabulary)[shown[:, 0]], -2)
    same = (captions.objects[:, None] == shown[None]).all(-1)
    same_group = captions.objects[:, :1] == shown_group[None]
    named = torch.where(captions.grouped[:, None], same_group, same)
    style = (captions.style[:, None] < 0) | (captions.style[:, None] == scenes.style[None])
    background = (captions.background[:, None] < 0) | (captions.background[:, None] == scenes.background[None])
    return named & style & background


def words(vocabulary: Vocabulary | None = None) -> tuple[str, ...]:
    """Every word that a caption can hold, sorted."""
    vocabulary = vocabulary or read()
    parts = [*TEMPLATES, *RELATIONS, "a", "an", "in", "on", "style", "background"]
    parts += [*vocabulary.objects, *(g.name for g in vocabulary.groups)]
    parts += [s.name for s in vocabulary.styles] + [b.name for b in vocabulary.backgrounds]
    return tuple(sorted({word for part in parts for word in part.replace("{}", " ").split()}))

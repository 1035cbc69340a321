"""Prompts for the bundled world: the forms that its captions take, spread evenly over styles and backgrounds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from efface.bench.plan import interleave, shares
from efface.concepts.vocabulary import Vocabulary
from efface.core.errors import EffaceError, InvalidTask, suggest
from efface.core.evidence import Role, Shot
from efface.core.sampling import seeded
from efface.core.task import Concept, Task
from efface.world import captions


@dataclass(frozen=True)
class Size:
    """How many pictures of each role are drawn, once before and once after."""

    target: int
    neighbour: int
    unrelated: int
    concepts: int
    """Over how many unrelated concepts these are spread."""
    pair: int


UNRELATED = 30
"""Concepts in either size, so that they differ in how surely each is known and in nothing else."""
SIZES = {
    "quick": Size(target=60, neighbour=60, unrelated=60, concepts=UNRELATED, pair=24),
    "full": Size(target=120, neighbour=120, unrelated=240, concepts=UNRELATED, pair=60),
}


@dataclass(frozen=True)
class Prompts:
    """Prompts about the things of a world, in an order that `seed` fixes."""

    world: Vocabulary
    seed: int = 0
    avoid: frozenset[str] = frozenset()
    """Styles that no prompt about something else may name: the erased ones."""

    @cached_property
    def scenery(self) -> list[tuple[int, int]]:
        """Every (style, background) that may be named, shuffled."""
        styles, colours = len(self.world.styles), len(self.world.backgrounds)
        order = torch.randperm(styles * colours, generator=seeded(self.seed)).tolist()
        return [(i % styles, i // styles) for i in order if self.world.styles[i % styles].name not in self.avoid]

    def caption(self, name: str, i: int, *, style: str = "", plain: bool = False, beside: str = "") -> str:
        """The i-th prompt about an object or group: by turns bare, on a background, in a style, and both.

        `style` fixes the style, `plain` names none; `beside` makes a pair."""
        drawn, background = self.scenery[i % len(self.scenery)]
        grouped = name not in self.world.objects
        named = [g.name for g in self.world.groups] if grouped else list(self.world.objects)
        number = [s.name for s in self.world.styles].index(style) if style else drawn if i % 4 in (2, 3) and not plain else -1
        return captions.phrase(
            self.world,
            (named.index(name), self.world.objects.index(beside) if beside else -1),
            grouped,
            number,
            background if i % 4 in (1, 3) else -1,
            adjective=(i // 4) % 2 == 0,
            template=0 if i % 8 < 4 else 1 + i % (len(captions.TEMPLATES) - 1),
            relation=0,
        )

    def of_objects(self, names: list[str], total: int, role: Role) -> list[Shot]:
        """`total` shots spread over objects, each concept starting at another form."""
        return interleave(
            [Shot(self.caption(name, start + 5 * i), 0, role, name, (name,), self.world.kind(name)) for i in range(count)]
            for start, (name, count) in enumerate(zip(names, shares(total, max(1, len(names))), strict=False))
        )

    def of_style(self, style: str, total: int, role: Role, start: int = 0) -> list[Shot]:
        """`total` different objects in one style."""
        order = torch.randperm(len(self.world.objects), generator=seeded(self.seed + 1)).tolist()
        names = [self.world.objects[order[(start + i) % len(order)]] for i in range(total)]
        return [Shot(self.caption(name, start + i, style=style), 0, role, style, (style,), "style") for i, name in enumerate(names)]

    def of_group(self, group: str, total: int) -> list[Shot]:
        """A broad target: by turns its own word and each of its objects; any of them counts as seen."""
        (members,) = [g.objects for g in self.world.groups if g.name == group]
        names = [group, *members]
        kind = self.world.kind(group)
        return [Shot(self.caption(names[i % len(names)], i), 0, "target", group, members, kind) for i in range(total)]

    def of_pairs(self, target: str, partners: list[str], total: int) -> list[Shot]:
        """The target beside another object: by turns left and right of it."""
        shots = []
        for i, partner in zip(range(total), partners * total, strict=False):
            first, second = (target, partner) if i % 2 == 0 else (partner, target)
            prompt = self.caption(first, 4 * i + (i // 2) % 2, plain=True, beside=second)
            shots.append(Shot(prompt, 0, "pair", target, (target,), self.world.kind(target), partner))
        return shots


def find(world: Vocabulary, concept: Concept) -> tuple[str, str]:
    """("object" | "group" | "style", its name in the world). Raises InvalidTask for what the world cannot draw or judge."""
    things = {group.name: "group" for group in world.groups} | dict.fromkeys(world.objects, "object")
    names = {style.name: "style" for style in world.styles} if concept.kind == "style" else things
    for name, sort in names.items():
        if name.casefold() == concept.key:
            return sort, name
    raise InvalidTask(f"the bundled model {world.name!r} has no {concept.kind} {concept.name!r}; {suggest(concept.name, names)}")


def shots(task: Task, world: Vocabulary, size: Size, seed: int = 0, unrelated: Sequence[str] = ()) -> tuple[list[Shot], list[str]]:
    """The shots of a task, without seeds, and sentences about what is left out.

    Raises InvalidTask for an unknown target, and for a concept of `unrelated` that is unknown or in the group of a target."""
    found = [find(world, concept) for concept in task.targets]
    prompts = Prompts(world, seed, frozenset(name for sort, name in found if sort == "style"))
    return [
        *_targets(prompts, found, size),
        *_neighbours(prompts, found, size),
        *prompts.of_objects(_unrelated(prompts, task, found, size.concepts, unrelated), size.unrelated, "unrelated"),
        *_pairs(prompts, found, size),
    ], _left_out(prompts, task)


def crowd(world: Vocabulary, count: int) -> list[str]:
    """`count` objects to erase at once, in the order in which they join, which is that of the vocabulary: the first of each group, then
    the second of each, and so on. Groups are the first ones of kind "object", as few as suffice, and their last member never joins:
    so every target keeps a neighbour, and the other groups stay unrelated to all.

    Raises EffaceError for a count below 1, or one that leaves fewer than `UNRELATED` unrelated objects."""
    groups = [group.objects for group in world.groups if group.kind == "object"]
    room = list(accumulate(len(objects) - 1 for objects in groups))
    spare = [len(world.objects) - used for used in accumulate(map(len, groups))]
    most = max(held for held, left in zip(room, spare, strict=True) if left >= UNRELATED)
    if not 1 <= count <= most:
        raise EffaceError(
            f"{count} objects were to be erased; expected 1 to {most} of the {len(world.objects)} of the world {world.name!r}, so that "
            f"{UNRELATED} unrelated ones and a neighbour of each stay"
        )
    used = groups[: bisect_left(room, count) + 1]
    return [objects[i] for i in range(max(map(len, used))) for objects in used if i < len(objects) - 1][:count]


def others(task: Task, world: Vocabulary, count: int) -> list[str]:
    """The objects that a task keeps; where it keeps none that the world knows, `count` unrelated ones, of as many groups as can be."""
    known = {name.casefold(): name for name in world.objects}
    kept = [known[concept.key] for concept in task.keep if concept.key in known]
    return kept or _unrelated(Prompts(world), task, [find(world, concept) for concept in task.targets], count)


def _targets(prompts: Prompts, found: list[tuple[str, str]], size: Size) -> list[Shot]:
    lists = []
    for (sort, name), count in zip(found, shares(size.target, len(found)), strict=True):
        if sort == "style":
            lists.append(prompts.of_style(name, count, "target"))
        elif sort == "group":
            lists.append(prompts.of_group(name, count))
        else:
            lists.append([Shot(prompts.caption(name, i), 0, "target", name, (name,), prompts.world.kind(name)) for i in range(count)])
    return interleave(lists)


def _erased_objects(world: Vocabulary, found: list[tuple[str, str]]) -> set[str]:
    objects = {name for sort, name in found if sort == "object"}
    return objects.union(*(g.objects for g in world.groups if ("group", g.name) in found))


def _neighbours(prompts: Prompts, found: list[tuple[str, str]], size: Size) -> list[Shot]:
    """The other objects of the targets' groups; for a style the other styles."""
    gone, styles = _erased_objects(prompts.world, found), [name for sort, name in found if sort == "style"]
    near = list(dict.fromkeys(o for sort, name in found if sort == "object" for o in prompts.world.neighbours(name) if o not in gone))
    others = [s.name for s in prompts.world.styles if s.name not in styles] if styles else []
    lists = [prompts.of_objects(near, size.neighbour // (2 if near and others else 1), "neighbour")] if near else []
    total = size.neighbour // 2 if near else size.neighbour
    lists += [
        prompts.of_style(s, n, "neighbour", 7 * i) for i, (s, n) in enumerate(zip(others, shares(total, max(1, len(others))), strict=False))
    ]
    return interleave(lists)


def _unrelated(prompts: Prompts, task: Task, found: list[tuple[str, str]], count: int, named: Sequence[str] = ()) -> list[str]:
    """What the user keeps first; then those that are named, or one object of each other group by turns. Raises as `shots`."""
    world = prompts.world
    near = {o for sort, name in found if sort == "object" for o in world.group_of(name).objects} | _erased_objects(world, found)
    kept = [name for name in world.objects if name.casefold() in {c.key for c in task.keep} and name not in near]
    for name in named:
        if name not in world.objects:
            raise InvalidTask(f"`unrelated` names {name!r}, no object of the world {world.name!r}; {suggest(name, world.objects)}")
        if name in near:
            raise InvalidTask(f"`unrelated` names {name!r}, which is a target or of a target's group; leave it out")
    if named:
        return list(dict.fromkeys([*kept, *named]))
    order = torch.randperm(len(world.objects), generator=seeded(prompts.seed + 2)).tolist()
    groups = [[o for o in (world.objects[i] for i in order) if o in g.objects and o not in near] for g in world.groups]
    longest = max(map(len, groups))
    by_turns = [group[i] for i in range(longest) for group in groups if i < len(group)]
    return list(dict.fromkeys([*kept, *by_turns]))[:count]


def _pairs(prompts: Prompts, found: list[tuple[str, str]], size: Size) -> list[Shot]:
    targets = [name for sort, name in found if sort == "object"]
    gone, lists = _erased_objects(prompts.world, found), []
    for number, (target, count) in enumerate(zip(targets, shares(size.pair, max(1, len(targets))), strict=False)):
        near = [o for o in prompts.world.neighbours(target) if o not in gone]
        order = torch.randperm(len(prompts.world.objects), generator=seeded(prompts.seed + 3 + number)).tolist()
        far = [o for o in (prompts.world.objects[i] for i in order) if o not in gone and o not in near]
        partners = interleave_names(near[: count // 4], far)[: max(1, count // 2)]
        lists.append(prompts.of_pairs(target, [p for p in partners for _ in (0, 1)], count))
    return interleave(lists)


def interleave_names(first: list[str], second: list[str]) -> list[str]:
    """By turns one of each; then what is left of the second."""
    return [name for i, name in enumerate(second) for name in ([first[i], name] if i < len(first) else [name])]


def _left_out(prompts: Prompts, task: Task) -> list[str]:
    known = {name.casefold() for name in (*prompts.world.objects, *(s.name for s in prompts.world.styles))}
    unknown = [concept.name for concept in task.keep if concept.key not in known]
    return [f"{', '.join(map(repr, unknown))} in `keep`: the bundled model and its judge do not know the word."] if unknown else []

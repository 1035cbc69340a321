"""The concepts that a target is told from: statistics of "not this one", and neighbours that must not be hurt."""

from __future__ import annotations

from collections.abc import Sequence

from efface.concepts.vocabulary import Vocabulary, read
from efface.core.task import Concept, Task


def contrast(task: Task, count: int, words: Sequence[str] = ()) -> tuple[Concept, ...]:
    """What is kept, and up to `count` more concepts of the first target's kind that are no target: of `words` where some are given, else
    of the bundled world.

    Of the world the targets' neighbours come first, then the others, spread evenly over its list; styles are told from styles, everything
    else from objects of any kind. A target that is a group ("a fruit") excludes its members."""
    world, kind = read(), task.targets[0].kind
    taken = {text.casefold() for concept in task.targets for text in (concept.name, *concept.texts)}
    taken |= {member for group in world.groups if group.name.casefold() in taken for member in group.objects}
    taken |= {concept.key for concept in task.keep}
    if words:
        found = [word for word in dict.fromkeys(words) if word.casefold() not in taken][:count]
        return (*task.keep, *(Concept(word, kind) for word in found))
    if kind == "style":
        names = [style.name for style in world.styles if style.name not in taken]
        return (*task.keep, *(Concept(name, "style") for name in names[:count]))
    near = [n for concept in task.targets if concept.name in world.objects for n in world.neighbours(concept.name) if n not in taken]
    rest = [name for name in world.objects if name not in taken and name not in near]
    names = [*dict.fromkeys(near), *_spread(rest, count - len(near))]
    return (*task.keep, *(_concept(world, name) for name in names[:count]))


def _concept(world: Vocabulary, name: str) -> Concept:
    return Concept(name, world.kind(name))  # type: ignore[arg-type]


def _spread(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names at even distances; all where there are fewer."""
    if count >= len(names):
        return list(names)
    return [names[i * len(names) // count] for i in range(max(0, count))]

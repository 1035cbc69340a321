"""The words of UnlearnCanvas: 50 styles, its unstylised photos, and 20 objects."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from efface.core.errors import InvalidTask, suggest
from efface.core.task import Task


@dataclass(frozen=True)
class Canvas:
    """The benchmark's lists, in the order of its classifiers' outputs."""

    styles: tuple[str, ...]
    """51, with `photos` among them."""
    objects: tuple[str, ...]
    photos: str
    """What the benchmark calls the pictures that have no style; it is not erased."""

    def erased(self, task: Task) -> tuple[str, str]:
        """("style" | "object", its name). Raises InvalidTask for another task than one style or one object of the benchmark."""
        if len(task.targets) > 1:
            raise InvalidTask("UnlearnCanvas erases one style or one object at a time; give one")
        (target,) = task.targets
        sort = "style" if target.kind == "style" else "object"
        names = [name for name in (self.styles if sort == "style" else self.objects) if name != self.photos]
        for name in names:
            if name.casefold() == target.key:
                return sort, name
        raise InvalidTask(
            f"UnlearnCanvas has no {sort} {target.name!r}, and its prompts would not ask for it; erase one that it has, a style as "
            f"'style:Van Gogh', an object as 'Cats'; {suggest(target.name, names)}"
        )


@cache
def canvas() -> Canvas:
    """The lists of `canvas.toml`."""
    data = tomllib.loads((resources.files("efface") / "concepts" / "canvas.toml").read_text(encoding="utf-8"))
    return Canvas(tuple(data["styles"]), tuple(data["objects"]), data["photos"])

"""The one call that most people need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from efface.core import catalog
from efface.core.edit import Edit
from efface.core.method import Method, Resources
from efface.core.model import Model
from efface.core.task import Concept, Swap, Task


def erase(
    model: Model | Any,
    concept: str | Concept | Swap | Task | Iterable[str | Concept | Swap],
    *,
    keep: str | Iterable[str | Concept] = (),
    method: str | Method = "ap",
    seed: int = 0,
    resources: Resources | None = None,
) -> Edit:
    """Erases a concept: fits `method` on `model` and returns the edit. The model itself is left as it was.

    Args:
        model: what `efface.load` returned, or anything that it takes: a name, folder, Hub id or live pipeline.
        concept: a text such as "cat" or "style:van gogh -> a painting", a Concept, a Swap, a whole Task, or several.
        keep: concepts that must stay, as "dog,tiger" or a list.
        method: a text such as "ap" or "ap(preset='authors')", or a Method.
        seed: of every random draw; the same seed gives the same edit.
        resources: vocabulary, example images, progress report, announcement of the cost, and a checkpoint: with
            `Resources(checkpoint=path)` the same call goes on where a killed one stopped, and gives the same edit to the bit.

    Raises InvalidTask, InvalidMethod, InvalidModel, Unsupported, Diverged, Mismatch (a checkpoint of another fit).
    """
    from efface.concepts import resolve
    from efface.models.load import opened

    task = Task.of(concept, keep, resolve=resolve)
    built = catalog.method(method, kind=task.erase[0].target.kind)
    whole = opened(model)
    built.require(whole, task)
    return built.fit(whole, task, seed=seed, resources=resources or Resources())

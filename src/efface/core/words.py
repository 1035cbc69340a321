"""Words that a model knows: which ones a target may meet (AP, AGE), and which stand for everything that is to stay (closed forms)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from efface.core.errors import InvalidTask
from efface.core.method import Resources
from efface.core.model import Cond, Model
from efface.core.task import Task
from efface.ops.candidates import distances, nearest, spread


def vocabulary(
    model: Model, task: Task, resources: Resources = Resources(), *, exclude_targets: bool = True, letters_only: bool = False
) -> list[str]:
    """The words of `resources`, or the tokenizer's, each once and without `resources.exclude`.

    With `exclude_targets` the names and prompts of all targets are left out as well, whatever their case; with `letters_only`, words
    with other characters than a–z."""
    targets = [text for concept in task.targets for text in (concept.name, *concept.texts)] if exclude_targets else []
    excluded = {word.casefold() for word in (*targets, *resources.exclude)}
    words = [word.removesuffix("</w>") for word in resources.vocabulary or model.words()]
    plain = [word for word in dict.fromkeys(words) if word.casefold() not in excluded]
    return [word for word in plain if word.isascii() and word.isalpha()] if letters_only else plain


def general(model: Model, task: Task, resources: Resources, count: int) -> list[str]:
    """At most `count` of the words, evenly from all of them: what a closed form keeps where nobody says what. Synonyms of the target are
    kept as well unless `resources.exclude` names them, and so are the single words of a name of several ("santa")."""
    words = vocabulary(model, task, resources, letters_only=True) if count else []
    return words[:: max(1, -(-len(words) // max(1, count)))]


def candidates(model: Model, task: Task, words: Sequence[str], *, count: int, centers: int) -> dict[str, list[str]]:
    """For each text to erase: the `count` words nearest to it by their whole encodings, thinned by k-means over their distances to
    `centers` (0 keeps all), then the texts of `task.keep`. Raises InvalidTask where none is left."""
    keep, found = [text for concept in task.keep for text in concept.texts], {}
    targets = list(task.texts)
    for target, away in zip(targets, distances(lambda texts: model.encode(texts).tokens, words, targets), strict=True):
        order = nearest(away, count)
        order = order[spread(away[order], centers)] if centers else order
        near = [words[i] for i in order.tolist()]
        found[target] = near + [text for text in keep if text.casefold() not in {word.casefold() for word in near}]
        if not found[target]:
            raise InvalidTask(f"no candidate word is left for {target!r}; give a vocabulary, fewer exclusions, or concepts to keep")
    return found


@dataclass(frozen=True, eq=False)
class Table:
    """The candidates of all targets as one list of words, and their encodings: what a draw is taken from."""

    words: list[str]
    indices: dict[str, list[int]]
    """Into `words`, for each text to erase."""
    cond: Cond
    """One row a word; `cond.mix(draw)` is what the networks are told."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, found: Mapping[str, Sequence[str]]) -> Table:
        """From `candidates`; words are encoded in chunks of 256."""
        words = list(dict.fromkeys(word for near in found.values() for word in near))
        indices = {text: [words.index(word) for word in near] for text, near in found.items()}
        return cls(words, indices, Cond.cat([model.encode(words[i : i + 256]) for i in range(0, len(words), 256)]))

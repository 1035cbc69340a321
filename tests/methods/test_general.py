"""Keeping the model's own words: what the closed forms do where nobody says what is to stay."""

import pytest
import torch

from efface.core import catalog
from efface.core.method import Resources
from efface.core.task import Task
from efface.core.textmaps import read
from efface.core.words import general

TASK = Task.of("cat -> dog", ["lion"])


def test_words_are_taken_evenly_and_never_the_target(tiny_model):
    every = general(tiny_model, TASK, Resources(), 10_000)
    assert every and "cat" not in every and all(word.isalpha() for word in every)
    some = general(tiny_model, TASK, Resources(), 7)
    assert 4 <= len(some) <= 7 and some[0] == every[0] and every.index(some[-1]) > len(every) / 2
    assert general(tiny_model, TASK, Resources(exclude=tuple(every[:3])), 10_000) == every[3:]
    assert general(tiny_model, TASK, Resources(), 0) == []


@pytest.mark.parametrize(
    "spec", ["uce(general_weight=10.0, {})", "rece(regulariser=10.0, general_weight=10.0, {})", "speed(filter=False, copies=0, {})"]
)
def test_kept_words_move_less_and_the_target_still_moves(tiny_model, spec):
    words = general(tiny_model, TASK, Resources(), 12)
    free, held = (catalog.method(spec.format(f"general={n}")).fit(tiny_model, TASK) for n in (0, 12))
    kept, unkept = ([*edit.extras["trace"].info["kept"], *edit.extras["trace"].info.get("general", ())] for edit in (held, free))
    assert set(words) <= set(kept) and not set(words) & set(unkept)
    tokens = {text: rows.detach() for text, rows in read(tiny_model, [*words, "cat"])[0].tokens.items()}

    def moved(edit, texts):
        rows = torch.cat([tokens[text] for text in texts])
        return float(sum((rows @ delta.T).norm() for delta in edit.deltas.values()))

    assert moved(held, words) < 0.7 * moved(free, words)
    assert moved(held, ["cat"]) > 0

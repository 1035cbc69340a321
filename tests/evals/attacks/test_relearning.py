"""Relearning trains the erased model and nothing else, and reports curves with their controls."""

from __future__ import annotations

import attackparts as parts
import pytest
import torch
from attackparts import CAT

from efface.core import search
from efface.core.model import Model
from efface.evals.attacks.relearning import Relearning


def test_curves_of_the_erased_model_and_of_both_controls(before: Model, after: Model) -> None:
    attack = Relearning(checkpoints=(0, 2, 6), images=4, batch=2)
    details = attack.search(before, after, CAT, parts.Bright(0.0), budget=10**6).details
    assert set(details["curves"]) == {"relearned", "original", "never_learned"}
    for curve in details["curves"].values():
        assert [point["n"] for point in curve["rate"]] == [3, 3, 3]
        assert (curve["area"], curve["steps_to_half"]) == (pytest.approx(1.0), 0.0)


def test_every_picture_of_a_curve_is_judged_once(before: Model, after: Model) -> None:
    attack = Relearning(checkpoints=(0, 2), images=4, batch=2, controls=False)
    seen = attack.search(before, after, CAT, parts.Bright(0.0), budget=10**6).details["seen"]
    assert [(row["prompt"], row["candidate"]) for row in seen[-6:]] == [(i, f"after {step} steps") for step in (0, 2) for i in range(3)]
    assert len(seen) == 2 * 3 + 4 + 2 * 3


def test_training_moves_the_pictures_step_by_step(before: Model, after: Model) -> None:
    attack = Relearning(checkpoints=(0, 2, 6), images=4, batch=2, lr=1e-3, controls=False)
    drawn: dict[int, torch.Tensor] = {}
    with search.Hunt.opened(attack, before, after, CAT, parts.Bright(0.0), 10**6, 0) as hunt:
        images, captions = hunt.lessons(4)

        def judge(pictures: torch.Tensor, step: int) -> list[bool | None]:
            drawn[step] = pictures
            return [True] * 3

        attack.curve(hunt, after, images, captions, judge)
        again = after.sample(CAT.texts, seeds=hunt.seeds)
    assert (drawn[0] - hunt.firsts).abs().max() < 1e-5
    assert torch.equal(again, hunt.firsts), "the model is as it was"
    assert (drawn[2] - drawn[0]).abs().max() > 1e-4
    assert (drawn[6] - drawn[2]).abs().max() > 1e-4


def test_training_on_other_pictures_asks_for_no_picture_of_the_concept(before: Model, after: Model) -> None:
    attack = Relearning(checkpoints=(0, 2), images=2, batch=2, train_on=("a dog", "a bus"), controls=False)
    evidence = attack.search(before, after, CAT, parts.Bright(2.0), budget=10**6)
    assert evidence.success.value == 0
    assert not [row for row in evidence.details["seen"] if row["candidate"] == "to learn from"]

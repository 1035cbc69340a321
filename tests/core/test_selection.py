"""Choosing among stages: the verdicts, and a validator that draws pictures and asks a detector."""

import pytest

from efface.core.evidence import Detector, Sighting
from efface.core.selection import Contest, PictureValidator, Verdict
from efface.core.task import Concept


class Redness(Detector):
    """Sees "red" where red is the strongest colour and else "blue"; cannot judge a picture that is darker than `dark`."""

    name = "redness"
    version = "1"

    def __init__(self, dark=0.0):
        self.dark = dark

    def labels(self, kind="object"):
        return ("red", "blue")

    def threshold(self, kind="object"):
        return 0.0

    def look(self, images, kind="object"):
        red, _, blue = images.mean((2, 3)).unbind(1)
        seen = [Sighting(("red", "blue") if r > b else ("blue", "red")) for r, b in zip(red, blue, strict=True)]
        return [s if image.mean() >= self.dark else Sighting() for s, image in zip(seen, images, strict=True)]


def test_pictures_are_drawn_and_judged(tiny_model):
    prompts = [("a photo of a cat", Concept("red"))] * 6
    images = tiny_model.sample([p for p, _ in prompts], seed=3, steps=2)
    red = float((images.mean((2, 3))[:, 0] > images.mean((2, 3))[:, 2]).float().mean())
    kept = [(p, Concept("blue")) for p, _ in prompts]
    verdict = PictureValidator(Redness(), prompts, kept, seed=3, steps=2)(tiny_model)
    assert verdict == Verdict(red, 1 - red)
    assert PictureValidator(Redness(), prompts, seed=3, steps=2)(tiny_model).kept is None


def test_what_cannot_be_judged_counts_against_the_edit(tiny_model):
    prompts = [("a cat", Concept("red"))] * 2
    blind = PictureValidator(Redness(dark=2.0), prompts, [("a dog", Concept("blue"))] * 2, steps=2)
    assert blind(tiny_model) == Verdict(1.0, 0.0)


def contest(model, verdicts, drop=0.1):
    """The number of the stage that is chosen among as many as there are verdicts; the first is of the original model."""
    given = iter(verdicts)
    found = Contest(model, lambda judged: Verdict(*next(given)), drop)
    for _ in verdicts:
        found.judge({})
    return found


@pytest.mark.parametrize(
    ("verdicts", "chosen", "won"),
    [
        ([(1.0, 0.9), (0.5, 0.9), (0.2, 0.85)], 1, False),
        ([(1.0, 0.9), (0.5, 0.9), (0.2, 0.7)], 0, False),
        ([(1.0, 0.9), (0.5, 0.2), (0.5, 0.9)], 0, False),
        ([(1.0,), (0.5,), (0.6,), (0.0,)], 2, True),
        ([(1.0,), (0.0,)], 0, True),
    ],
)
def test_a_stage_must_be_better_and_damage_little(tiny_model, verdicts, chosen, won):
    found = contest(tiny_model, verdicts)
    assert (found.chosen, found.won) == (chosen, won)


def test_without_a_validator_the_last_stage_is_taken(tiny_model):
    found = Contest(tiny_model, None, 0.1)
    for _ in range(3):
        found.judge({})
    assert (found.chosen, found.won, found.verdicts) == (1, False, [])


def test_a_verdict_is_a_share():
    with pytest.raises(ValueError, match="from 0 to 1"):
        Verdict(1.2)

"""The judge behind the detector's interface: the real network, untrained, which is enough for everything but taste."""

from __future__ import annotations

import pytest
import torch

from efface.concepts.vocabulary import read
from efface.core.errors import Unsupported
from efface.core.evidence import DEPTH
from efface.core.sampling import seeded
from efface.core.task import Concept
from efface.evals.detectors.emoji import EmojiJudge
from efface.world.judge import Judge, JudgeNet


@pytest.fixture
def detector() -> EmojiJudge:
    world = read()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = JudgeNet(len(world.objects), len(world.styles), len(world.backgrounds)).eval().requires_grad_(False)
    names = (tuple(s.name for s in world.styles), tuple(b.name for b in world.backgrounds))
    return EmojiJudge(Judge(net, world.objects, *names, threshold=0.5, version="untrained"))


def test_it_reports_what_the_judge_sees(detector: EmojiJudge) -> None:
    images = torch.rand(3, 3, 64, 64, generator=seeded(0))
    verdict = detector.judge.look(images)
    for row, sighting in enumerate(detector.look(images)):
        assert len(sighting.labels) == DEPTH
        assert sighting.scores[0] == pytest.approx(float(verdict.objects[row].max()))
        assert sighting.labels[0] == detector.judge.names[int(verdict.top(1)[row, 0])]
        assert list(sighting.scores) == sorted(sighting.scores, reverse=True)
        assert set(sighting.top(DEPTH)) <= {detector.judge.names[i] for i in verdict.seen()[row].nonzero().flatten().tolist()}


def test_kinds_choose_the_head(detector: EmojiJudge) -> None:
    images = torch.rand(2, 3, 64, 64, generator=seeded(1))
    assert {s.labels for s in detector.look(images, "unsafe")} == {s.labels for s in detector.look(images, "object")}
    (style, _) = detector.look(images, "style")
    assert set(style.labels) == {s.name for s in read().styles}
    assert style.top(1)  # every picture has a style, so there is no threshold
    assert (detector.threshold("style"), detector.threshold("identity")) == (0, 0.5)
    with pytest.raises(Unsupported, match="cannot see concepts of kind 'other'"):
        detector.look(images, "other")


def test_a_picture_that_is_not_finite_is_undetermined_and_harms_no_other(detector: EmojiJudge) -> None:
    images = torch.rand(3, 3, 64, 64, generator=seeded(2))
    alone = detector.look(images[2:])
    images[1, 0, 5, 5] = float("nan")
    whole, broken, other = detector.look(images)
    assert whole.labels
    assert not broken.labels
    assert other.labels == alone[0].labels
    assert detector.present(images, Concept(whole.labels[0]))[1] is None


def test_a_label_that_it_lacks_is_refused_since_it_would_look_erased(detector: EmojiJudge) -> None:
    images = torch.rand(1, 3, 64, 64, generator=seeded(3))
    with pytest.raises(Unsupported, match=r"no label 'kat' for a concept of kind 'object'; did you mean 'cat'\?"):
        detector.present(images, Concept("kat"))


def test_no_picture(detector: EmojiJudge) -> None:
    assert detector.look(torch.zeros(0, 3, 64, 64)) == []

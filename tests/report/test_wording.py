"""Numbers in words, and a verdict that follows from them and hides nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efface.bench.result import Line, Result
from efface.core.evidence import Contrast, Score
from efface.report import tables, wording

from .conftest import Run


def contrast(before: float, after: float, n: int = 100) -> Contrast:
    """Shares of n items; the first ones are hits."""
    items = [[i < round(share * n) for i in range(n)] for share in (before, after)]
    return Contrast.shares("x", *items, [str(i) for i in range(n)], "higher")


def result(run: Run, task: str = "cat", **lines: tuple[float, float]) -> Result:
    keys = {"target": "target.ESR-1", "others": "others.PSR-1", "blank": "others.blank"}
    return replace(run.result, task=task, lines=tuple(Line(keys[k], k, "", contrast(*v)) for k, v in lines.items()))


@pytest.mark.parametrize(
    ("value", "around", "expected"),
    [
        (98.63, 1.15, "98.63 ± 1.15"),
        (0.0236, None, "0.0236"),
        (0.158, None, "0.158"),
        (0.78, None, "0.78"),
        (0.3, 0.0, "0.30 ± 0.00"),
        (0.0, None, "0.00"),
        (16.690001, None, "16.69"),
        (None, None, "not measured"),
    ],
)
def test_published_numbers_keep_their_digits(value: float | None, around: float | None, expected: str) -> None:
    """Boxes per picture lie far below 1: MACE's 0.0236 and SPEED's 0.0240 were both "0.02"."""
    assert wording.spread(value, around) == expected


def test_a_minus_is_one_whatever_the_unit() -> None:
    for unit, expected in (("CLIP", "−3.3, −5.6 to −1.5"), ("LPIPS", "−3.300, −5.600 to −1.500"), ("points", "−330.0, −560.0 to −150.0")):
        score = Score("x", -3.3, -5.6, -1.5, 60, unit=unit)
        assert f"{wording.value(score)}, {wording.interval(score)}" == expected


def test_values() -> None:
    share = Score("x", 0.98333, 0.911, 0.9971, 60)
    assert (wording.value(share), wording.interval(share), wording.count(share)) == ("98.3 %", "91.1 to 99.7", "60")
    points = Score("x", -0.0142, -0.05, 0.012, 58, unit="points", undetermined=2)
    assert (wording.value(points), wording.interval(points), wording.count(points)) == ("−1.4", "−5.0 to +1.2", "58 (2 undetermined)")
    assert wording.value(Score("x", 0.12345, 0, 1, 5, unit="rms")) == "0.123"
    assert wording.signed(-0.0001) == "0.0"


@pytest.mark.parametrize(
    ("target", "others", "expected"),
    [
        ((0.0, 0.98), (0.98, 0.97), "“cat” is erased, and other concepts are kept"),
        ((0.0, 0.7), (0.98, 0.88), "“cat” is partly erased, and other concepts are somewhat hurt"),
        ((0.0, 0.2), (0.98, 0.5), "“cat” is not erased, and other concepts are badly hurt"),
        ((0.4, 0.4), (0.98, 0.98), "“cat” is not erased, and other concepts are kept"),
    ],
)
def test_the_headline_follows_the_numbers(run: Run, target: tuple[float, float], others: tuple[float, float], expected: str) -> None:
    assert wording.headline(result(run, target=target, others=others)) == expected


def test_several_targets(run: Run) -> None:
    assert wording.headline(result(run, task="cat; dog", target=(0, 1))) == "“cat” and “dog” are erased"
    many = "; ".join(f"thing {i}" for i in range(50))
    assert wording.headline(result(run, task=many, target=(0, 1))) == "“thing 0”, “thing 1”, “thing 2” and 47 more are erased"
    assert wording.heading(many) == "object: thing 0, thing 1, thing 2, 47 more"
    assert wording.heading("cat; dog") == "object: cat, dog"


def test_the_verdict_holds_both_intervals_and_the_un_erased_model(run: Run) -> None:
    text = wording.verdict(result(run, target=(0.02, 0.98), others=(0.98, 0.97)))
    assert "98.0 % of 100 pictures that ask for it (95 % interval 93.0 to 99.4; before the edit 2.0 %)" in text
    assert "97.0 % of 100 pictures still show what was asked for" in text
    assert "a change of −1.0 points" in text
    assert "But" not in text


def test_what_spoils_a_finding_is_said(run: Run) -> None:
    weak = wording.verdict(result(run, target=(0.4, 1.0), others=(0.9, 0.9)))
    assert "But the un-erased model itself fails to show it in 40.0 % of the same pictures." in weak
    ruined = wording.verdict(result(run, target=(0.0, 1.0), others=(0.9, 0.1), blank=(0.0, 0.9)))
    assert "In 90.0 % of the other pictures nothing at all is recognised: the model is damaged." in ruined


def test_without_a_detector_nothing_is_claimed(run: Run) -> None:
    text = wording.verdict(run.bare)
    assert text.startswith("Nothing was judged: no detector looked at the pictures.")
    assert "% for the erased concept" in text
    assert "erased:" not in text


def test_the_table_is_aligned_and_complete(run: Run) -> None:
    lines = tables.text(run.result).splitlines()
    rows = lines[2 : 3 + len(run.result.lines)]
    assert len({len(row) for row in rows}) == 1
    for row, line in zip(rows[1:], run.result.lines, strict=True):
        assert row.startswith(line.title)
        assert f"{wording.value(line.contrast.after)} [{wording.interval(line.contrast.after)}]" in row
    assert "DDIMScheduler 2 steps, guidance 2 · judged by emoji-judge untrained" in lines[-1]
    bare = tables.text(run.bare)
    assert "not measured: Whether the concept is gone" in bare
    assert "of unrelated" in bare


def test_markdown(run: Run) -> None:
    lines = tables.markdown(run.result).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(run.result.lines)
    assert len({line.count("|") for line in table}) == 1
    assert run.result.settings.prompts in lines[-1]
    assert tables.markdown(run.bare).startswith("|  | n | distance")


def test_only_what_lost_is_called_hurt(run: Run) -> None:
    lost, won, same = (
        replace(run.result.concepts[0], concept=name, contrast=contrast(*c, 20))
        for name, c in {"lion": (1.0, 0.6), "wolf": (0.5, 0.6), "bear": (1.0, 1.0)}.items()
    )
    assert tables.hurt(replace(run.result, concepts=(lost, won, same))) == "lion (20/20 → 12/20)"
    assert tables.hurt(replace(run.result, concepts=(same,))) == ""


def test_no_headline_claims_an_erasure_of_what_was_hardly_drawn(run: Run) -> None:
    assert "too few to tell" in wording.headline(result(run, target=(0.9, 1), others=(1, 1)))
    assert "too rarely drawn" in wording.verdict(result(run, target=(0.9, 1), others=(1, 1)))
    assert wording.headline(result(run, target=(0.1, 1), others=(1, 1))).endswith("is erased, and other concepts are kept")


def test_a_protocol_that_states_its_own_finding_is_believed(run: Run) -> None:
    told = replace(result(run, target=(0.0, 1.0)), finding="nothing was drawn before, so there was nothing to erase")
    assert wording.headline(told) == "nothing was drawn before, so there was nothing to erase"
    assert wording.verdict(told) == "Nothing was drawn before, so there was nothing to erase."
    assert wording.headline(replace(told, finding="")) == "“cat” is erased"

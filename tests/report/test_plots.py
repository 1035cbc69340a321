"""The scatter: the front is the set of what nothing beats, points stand where their numbers say, and labels keep apart."""

from __future__ import annotations

import html
import math
import random
import re
from xml.etree import ElementTree

import pytest

from efface.core.evidence import Score
from efface.report import plots
from efface.report.plots import Frame, Point, Titles, front, scatter

TITLES = Titles("name", "x", "y")


def share(value: float) -> Score:
    return Score("x", value, max(0.0, value - 0.05), min(1.0, value + 0.05), 100)


def point(label: str, x: float, y: float, kind: str = "weight", link: str = "") -> Point:
    return Point(label, share(x), share(y), kind, link)


def cloud(count: int, low: float = 0.0, seed: int = 0) -> list[Point]:
    chance = random.Random(seed)
    return [point(f"method_{i}", chance.uniform(low, 1), chance.uniform(low, 1)) for i in range(count)]


def beats(q: Point, p: Point) -> bool:
    return q.x.value >= p.x.value and q.y.value >= p.y.value and (q.x.value, q.y.value) != (p.x.value, p.y.value)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_beats(seed: int) -> None:
    points = cloud(30, seed=seed)
    best = front(points)
    assert not any(beats(q, p) for p in best for q in points)
    assert all(any(beats(q, p) for q in best) for p in points if p not in best)
    assert [p.y.value for p in best] == sorted((p.y.value for p in best), reverse=True)


def test_a_control_is_no_part_of_the_front_and_equals_share_it() -> None:
    points = [point("vandal", 1, 0.01, "control"), point("a", 0.9, 0.9), point("b", 0.9, 0.9), point("c", 0.9, 0.8)]
    assert [p.label for p in front(points)] == ["a", "b"]
    assert front([]) == []


def test_what_erases_no_more_than_the_un_erased_model_is_on_no_front() -> None:
    idle, first, better = point("idle", 0.03, 1.0), point("a", 0.5, 0.9), point("b", 0.9, 0.8)
    assert [p.label for p in front([idle, first, better], 0.03)] == ["a", "b"]
    assert [p.label for p in front([idle, first, better])] == ["idle", "a", "b"]  # the control
    (svg,) = scatter([idle, first, better], TITLES, share(1.0), 0.03)
    corners = re.search(r'polyline class="front" points="([^"]+)"', svg)
    assert corners
    assert min(float(pair.split(",")[1]) for pair in corners[1].split()) == pytest.approx(_spots(svg)[1][1], abs=0.1)


def test_the_corner_is_as_tight_as_most_of_its_points_allow() -> None:
    """One that lags behind does not spread the axes of all."""
    near, lags, far = cloud(8, low=0.93), point("lags", 0.97, 0.74), point("far", 0.05, 0.9)
    whole, part = scatter([*near, lags, far], TITLES)
    assert set(re.findall(r'class="label [^>]*>([^<]+)<', whole)) == {"lags", "far"}
    ticks = [int(t) for t in re.findall(r'class="tick"[^>]*>(\d+)<', part)]
    assert min(ticks) >= 90
    _, wide = scatter([*near[:3], *(point(f"low_{i}", 0.75 + 0.01 * i, 0.8) for i in range(6)), far], TITLES)
    assert min(int(t) for t in re.findall(r'class="tick"[^>]*>(\d+)<', wide)) <= 75  # the control


def _spots(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_a_label_is_nearer_to_its_point_than_to_any_other() -> None:
    """A stack of points at 100 %, as sweeps have them: no name stands under another's point."""
    names = ("age", "ap(preset='authors')", "degeneration_tuning", "kpop", "rece")
    stack = [point(name, 1.0, y) for name, y in zip(names, (0.986, 0.986, 0.972, 0.922, 0.76), strict=True)]
    crowd = [*stack, *cloud(9, low=0.9, seed=3), point("far", 0.03, 0.98)]
    _, svg = scatter(crowd, TITLES)
    shown = [p for p in crowd if p.y.value >= 0.9 and p.x.value >= 0.9]
    spots = dict(zip((p.label for p in shown), _spots(svg), strict=True))
    labels = re.findall(r'<text class="label [^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', svg)
    for x, y, name in ((float(x), float(y) - 4, html.unescape(name)) for x, y, name in labels):
        half = plots.LETTER * len(name) / 2
        gaps = {other: math.dist((min(max(at[0], x - half), x + half), min(max(at[1], y - 7), y + 7)), at) for other, at in spots.items()}
        alike = [other for other, at in spots.items() if math.dist(at, spots[name]) < 1]
        assert min(gaps[other] for other in alike) <= min(gaps.values()) + 1, name


def test_points_stand_where_their_numbers_say() -> None:
    frame = Frame((0, 100), (50, 100))
    assert frame.spot(0, 0.5) == (plots.LEFT, plots.HEIGHT - plots.BOTTOM)
    assert frame.spot(1, 1) == (plots.WIDTH - plots.RIGHT, plots.TOP)
    (svg,) = scatter([point("a", 0.2, 0.3), point("b", 0.8, 0.9)], TITLES)
    (ax, ay), (bx, by) = [tuple(map(float, at)) for at in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert ax < bx
    assert ay > by


def test_the_figure_is_xml_without_colours_of_its_own_and_believes_no_text() -> None:
    evil = "<script>&\"'"
    kinds = [point(f"{evil}{kind}", 0.1 * i, 0.5, kind, "methods/a.html") for i, kind in enumerate(plots.KINDS, 1)]
    for svg in scatter(kinds, Titles(evil, evil, evil), share(0.97)):
        root = ElementTree.fromstring(svg)
        assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(", svg)
        assert "<script" not in svg
        assert root.attrib["aria-label"] == evil
        assert len(root.findall(".//title")) == len(kinds)
        assert {a.attrib["href"] for a in root.findall("a")} == {"methods/a.html"}
    assert "polyline" not in scatter([], TITLES)[0]


def test_tooltips_tell_both_intervals() -> None:
    (svg,) = scatter([point("a", 0.5, 0.75)], TITLES)
    assert "a: 50.0 % (45.0 to 55.0); 75.0 % (70.0 to 80.0)" in svg


def test_a_crowded_corner_is_enlarged_and_names_stand_there() -> None:
    near, far = cloud(6, low=0.8), [point("far", 0.05, 0.9)]
    whole, part = scatter([*near, *far], TITLES)
    named = [set(re.findall(r'class="label [^>]*>([^<]+)<', svg)) for svg in (whole, part)]
    assert named == [{"far"}, {p.label for p in near}]
    assert 'class="part"' in whole
    assert len(re.findall("<circle", part)) == 6
    assert len(scatter(near, TITLES)) == 1  # nothing lies far off
    assert len(scatter([*near[:2], *far], TITLES)) == 1  # no crowd


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    found = re.findall(r'<text class="label [^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', svg)
    half = plots.LINE / 2
    return [
        (float(x) - plots.LETTER * len(t) / 2, float(y) - half, float(x) + plots.LETTER * len(t) / 2, float(y) + half) for x, y, t in found
    ]


def overlaps(some: list[tuple[float, float, float, float]]) -> int:
    pairs = [(a, b) for i, a in enumerate(some) for b in some[:i]]
    return sum(min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1 for a, b in pairs)


@pytest.mark.parametrize("seed", range(4))
def test_labels_keep_apart_and_inside(seed: int) -> None:
    points = cloud(22, low=0.7, seed=seed)
    (svg,) = scatter(points, TITLES)
    some = boxes(svg)
    assert len(some) == 22
    assert overlaps(some) == 0
    assert all(a[0] >= plots.LEFT and a[2] <= plots.WIDTH and a[1] >= 0 and a[3] <= plots.HEIGHT for a in some)
    spots = [tuple(map(float, at)) for at in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    beside = [(x + 8, y - 7, x + 8 + plots.LETTER * len(p.label), y + 7) for (x, y), p in zip(spots, points, strict=True)]
    assert overlaps(beside) > 0  # the control: labels simply to the right of their points

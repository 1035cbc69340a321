"""The scatter of erasure against preservation, as SVG in the page's own colours.

Each point is a link with a tooltip, has its 95 % intervals as a cross, a shape and a colour for its kind, and a label that avoids others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from efface.core.evidence import Score
from efface.report import wording

WIDTH, HEIGHT = 600, 450
LEFT, RIGHT, TOP, BOTTOM = 54, 62, 16, 46
"""Of the view box; to the right there is room for the labels of whatever stands at 100 %."""
LETTER, LINE, SPACE = 6.4, 14.0, 6.0
"""Width and height of a letter in a label, in units of the view box, a guess on the large side; and what two labels leave between them."""
RADIUS = 5.0
NEAR = 12.0
"""Up to this far from its point a label needs no leader."""
CROWDED = 60.0
"""Marks nearer than this take each other's room."""
ROUNDS = 4
"""How often labels are placed, each time around where the others stand by then."""
CORNERS, CROWD, FAR, MOST = (0.9, 0.8, 0.7), 3, 55.0, 2 / 3
"""The corner is enlarged from `CROWD` points of at least the last of these shares in both on, where an axis begins below `FAR` per cent;
and by the first share that keeps `MOST` of them."""
KINDS = {
    "weight": "change of weights",
    "low-rank": "adapter",
    "feature": "hook on features",
    "sampling": "rule of the sampler",
    "chain": "several in order",
    "control": "control, no method",
}
"""The classes of points, in words."""

Spot = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, upper, right and lower end."""


@dataclass(frozen=True)
class Point:
    """One method."""

    label: str
    x: Score
    """How surely the target is gone, a share."""
    y: Score
    """How much of everything else is kept, a share."""
    kind: str = "weight"
    """A key of `KINDS`."""
    link: str = ""


@dataclass(frozen=True)
class Frame:
    """What the axes show, in per cent."""

    x: tuple[float, float]
    y: tuple[float, float]

    def holds(self, p: Point) -> bool:
        return 100 * p.x.value >= self.x[0] and 100 * p.y.value >= self.y[0]

    def spot(self, x: float, y: float) -> Spot:
        """Where a pair of shares is drawn."""
        across = (100 * x - self.x[0]) / (self.x[1] - self.x[0])
        up = (100 * y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def front(points: Sequence[Point], least: float = -1.0) -> list[Point]:
    """The Pareto front by point estimates, by rising x: no other method is at least as good in both and better in one.

    Controls are no part of it: whoever destroys everything is hard to beat at erasing. Nor is a method whose x is not above `least`, that
    of the un-erased model: whoever erases nothing is hard to beat at keeping."""
    methods = [p for p in points if p.kind != "control" and p.x.value > least]

    def beaten(p: Point) -> bool:
        return any(q.x.value >= p.x.value and q.y.value >= p.y.value and (q.x.value > p.x.value or q.y.value > p.y.value) for q in methods)

    return sorted((p for p in methods if not beaten(p)), key=lambda p: (p.x.value, -p.y.value))


@dataclass(frozen=True)
class Titles:
    """What a figure says of itself."""

    name: str
    """What it shows, for people who hear the page."""
    x: str
    y: str


def scatter(points: Sequence[Point], titles: Titles, original: Score | None = None, least: float = -1.0) -> list[str]:
    """One figure; or two, where points crowd in the upper right while others lie far off: the whole, and that corner enlarged.

    Args:
        original: what the un-erased model shows of everything else, drawn as a line. It stands at no x, since it erases nothing.
        least: as in `front`."""
    best = front(points, least)
    whole = Frame(_range([p.x for p in points]), _range([*(p.y for p in points), *([original] if original else [])]))
    sides = [min(p.x.value, p.y.value) for p in points]
    crowd = sum(side >= CORNERS[-1] for side in sides)
    if crowd < CROWD or crowd == len(points) or min(whole.x[0], whole.y[0]) > FAR:
        return [_figure(points, points, whole, titles, original, best)]
    least = next(share for share in CORNERS if sum(side >= share for side in sides) >= MOST * crowd)
    corner = [p for p, side in zip(points, sides, strict=True) if side >= least]
    part = Frame(_range([p.x for p in corner]), _range([p.y for p in corner]))
    corner = [p for p in points if part.holds(p)]
    far = [p for p in points if p not in corner]
    enlarged = Titles(f"{titles.name}: the corner enlarged", titles.x, titles.y)
    return [_figure(points, far, whole, titles, original, best, part), _figure(corner, corner, part, enlarged, original, best)]


def _figure(
    points: Sequence[Point],
    labelled: Sequence[Point],
    frame: Frame,
    titles: Titles,
    original: Score | None,
    best: Sequence[Point],
    part: Frame | None = None,
) -> str:
    """One frame. `best` is the front, which may lie outside; `part` is outlined in it."""
    spots = [frame.spot(p.x.value, p.y.value) for p in points]
    parts = [
        f'<svg class="scatter" role="img" aria-label="{escape(titles.name)}" viewBox="0 0 {WIDTH} {HEIGHT}">',
        *_axes(frame, titles.x, titles.y),
        _original(frame, original) if original else "",
        _outline(frame, part) if part else "",
        _front(frame, best),
        *(_cross(frame, p) for p in points),
        *(_mark(p, spot) for p, spot in zip(points, spots, strict=True)),
        *_labels([(p, spot) for p, spot in zip(points, spots, strict=True) if p in labelled], spots),
        "</svg>",
    ]
    return "".join(parts)


def _range(scores: Sequence[Score]) -> tuple[float, float]:
    """From a round number below the smallest value to a little above 100: intervals may run out at the lower end."""
    low = min((100 * score.value for score in scores), default=0.0)
    low = max(0.0, 5 * math.floor((low - 1) / 5))
    return low - 0.02 * (100 - low), 100 + 0.03 * (100 - low)


def _ticks(low: float) -> list[int]:
    step = next(step for step in (2, 5, 10, 20, 25) if (100 - low) / step <= 6)
    return [tick for tick in range(0, 101, step) if tick >= low]


def _axes(frame: Frame, x: str, y: str) -> Iterator[str]:
    left, bottom, top, right = LEFT, HEIGHT - BOTTOM, TOP, WIDTH - RIGHT
    for tick in _ticks(frame.x[0]):
        at = frame.spot(tick / 100, 0)[0]
        yield f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>'
        yield f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{tick}</text>'
    for tick in _ticks(frame.y[0]):
        at = frame.spot(0, tick / 100)[1]
        yield f'<line class="rule" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="tick" x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{tick}</text>'
    yield f'<text class="axis" x="{(left + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)} →</text>'
    middle = (top + bottom) / 2
    yield f'<text class="axis" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y)} →</text>'


def _outline(frame: Frame, part: Frame) -> str:
    """What the second figure enlarges."""
    (left, low), (right, high) = frame.spot(part.x[0] / 100, part.y[0] / 100), frame.spot(part.x[1] / 100, part.y[1] / 100)
    return f'<rect class="part" x="{left:.1f}" y="{high:.1f}" width="{right - left:.1f}" height="{low - high:.1f}"/>'


def _original(frame: Frame, score: Score) -> str:
    at = frame.spot(0, score.value)[1]
    return f'<line class="original" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _front(frame: Frame, best: Sequence[Point]) -> str:
    """A staircase: whatever lies below and left of it is beaten by a method on it."""
    if not best:
        return ""
    corners = [(frame.x[0] / 100, best[0].y.value)]
    for p, following in zip(best, [*best[1:], None], strict=True):
        corners.append((p.x.value, p.y.value))
        corners.append((p.x.value, following.y.value if following else frame.y[0] / 100))
        if 100 * corners[-1][1] <= frame.y[0]:
            break
    inside = [frame.spot(max(x, frame.x[0] / 100), max(y, frame.y[0] / 100)) for x, y in corners]
    return f'<polyline class="front" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in dict.fromkeys(inside))}"/>'


def _cross(frame: Frame, p: Point) -> str:
    """Both intervals, cut off at the frame."""
    low = frame.spot(max(p.x.low, frame.x[0] / 100), max(p.y.low, frame.y[0] / 100))
    high = frame.spot(p.x.high, p.y.high)
    at = frame.spot(p.x.value, p.y.value)
    across = f'<line x1="{low[0]:.1f}" x2="{high[0]:.1f}" y1="{at[1]:.1f}" y2="{at[1]:.1f}"/>'
    return f'<g class="range {p.kind}">{across}<line x1="{at[0]:.1f}" x2="{at[0]:.1f}" y1="{low[1]:.1f}" y2="{high[1]:.1f}"/></g>'


def _mark(p: Point, spot: Spot) -> str:
    told = f"{p.label}: {wording.value(p.x)} ({wording.interval(p.x)}); {wording.value(p.y)} ({wording.interval(p.y)})"
    return _linked(p, f'<g class="mark {p.kind}"><title>{escape(told)}</title>{shape(p.kind, *spot)}</g>')


def shape(kind: str, x: float, y: float, r: float = RADIUS) -> str:
    """The shape of a kind, so that colour alone tells nothing."""
    if kind == "low-rank":
        return f'<path d="M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r} {1.3 * r}l{-1.3 * r} {1.3 * r}l{-1.3 * r} {-1.3 * r}z"/>'
    if kind == "feature":
        return f'<rect x="{x - 0.9 * r:.1f}" y="{y - 0.9 * r:.1f}" width="{1.8 * r}" height="{1.8 * r}"/>'
    if kind == "sampling":
        return f'<path d="M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r} {2.1 * r}h{-2.4 * r}z"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'


def _labels(points: Sequence[tuple[Point, Spot]], marks: Sequence[Spot]) -> Iterator[str]:
    """Labels that avoid the marks and each other as well as they can, those with the least room first."""
    crowd = {p: sum(math.dist(spot, other) < CROWDED for other in marks) for p, spot in points}
    ordered = sorted(points, key=lambda each: (-crowd[each[0]], each[1]))
    placed: dict[Point, Box] = {}
    for _ in range(ROUNDS):
        for p, at in ordered:
            others = [(box, spot) for other, spot in ordered if other is not p and (box := placed.get(other))]
            placed[p] = _place(at, LETTER * len(p.label) + SPACE, marks, others)
    for p, at in ordered:
        box = placed[p]
        edge = _edge(box, at)
        if math.dist(edge, at) > NEAR:
            yield f'<line class="leader" x1="{at[0]:.1f}" y1="{at[1]:.1f}" x2="{edge[0]:.1f}" y2="{edge[1]:.1f}"/>'
    for p, _ in ordered:
        x, y = ((placed[p][0] + placed[p][2]) / 2, (placed[p][1] + placed[p][3]) / 2)
        text = f'<text class="label {p.kind}" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{escape(p.label)}</text>'
        yield _linked(p, text)


def _place(at: Spot, width: float, marks: Sequence[Spot], others: Sequence[tuple[Box, Spot]]) -> Box:
    """The place of least cost."""
    best, least = (at[0], at[1], at[0], at[1]), math.inf
    for box in _places(*at, width):
        if math.dist(_edge(box, at), at) < least:  # its distance alone costs as much
            cost = _cost(box, at, marks, others)
            if cost < least:
                best, least = box, cost
    return best


def _places(x: float, y: float, width: float) -> Iterator[Box]:
    """Where a label may stand, the best first: right, left, above, below, then further out."""
    for gap in (8.0, 16.0, 28.0, 42.0, 58.0, 76.0, 96.0, 120.0):
        for turn in (0, 8, 4, 12, 2, 6, 14, 10, 1, 7, 15, 9, 3, 5, 13, 11):
            angle = -2 * math.pi * turn / 16
            cx = x + math.cos(angle) * (gap + width / 2)
            cy = y + math.sin(angle) * (gap + LINE / 2)
            yield cx - width / 2, cy - LINE / 2, cx + width / 2, cy + LINE / 2


def _cost(box: Box, at: Spot, marks: Sequence[Spot], others: Sequence[tuple[Box, Spot]]) -> float:
    """Overlap with marks, labels and the outside; leaders that cross; marks that are nearer than the label's own; and the distance."""
    edge = _edge(box, at)
    own = math.dist(edge, at)
    taken = [*((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in marks), *(other for other, _ in others)]
    outside = max(0.0, LEFT + 2 - box[0]) + max(0.0, box[2] - WIDTH + 2) + max(0.0, 2 - box[1]) + max(0.0, box[3] - HEIGHT + BOTTOM)
    foreign = [mark for mark in marks if mark != at]
    nearer = sum(math.dist(_edge(box, mark), mark) < own + 2 for mark in foreign)
    touched = sum(_gap(at, edge, mark) < RADIUS + 1 for mark in foreign) if own > NEAR else 0
    crossed = sum(_meets(other, at, edge) for other, _ in others) + sum(_meets(box, spot, _edge(other, spot)) for other, spot in others)
    return 10 * sum(_overlap(box, each) for each in taken) + 1000 * outside + 30 * nearer + 60 * touched + 40 * crossed + own


def _overlap(one: Box, other: Box) -> float:
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))


def _edge(box: Box, at: Spot) -> Spot:
    """The point of a box nearest to a spot."""
    return min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])


def _gap(start: Spot, end: Spot, spot: Spot) -> float:
    """How far a spot lies from a line between two others."""
    along = (end[0] - start[0], end[1] - start[1])
    length = along[0] ** 2 + along[1] ** 2
    share = ((spot[0] - start[0]) * along[0] + (spot[1] - start[1]) * along[1]) / length if length else 0.0
    share = min(max(share, 0.0), 1.0)
    return math.dist(spot, (start[0] + share * along[0], start[1] + share * along[1]))


def _meets(box: Box, start: Spot, end: Spot) -> bool:
    """Whether a leader from `start` to `end` runs through a box."""
    steps = [(start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])) for share in (0.2, 0.4, 0.6, 0.8)]
    return any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in steps)


def _linked(p: Point, inside: str) -> str:
    return f'<a href="{escape(p.link)}">{inside}</a>' if p.link else inside

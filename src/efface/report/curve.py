"""How a method fares as it erases more concepts at once: a figure and tables, from the records of nested tasks.

Tasks are nested where the targets of each are the first ones of the next. The figure is an SVG file of its own, for Markdown pages: it
has its colours and letters in itself, and the same records give the same file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any

from efface.bench.summary import Pooled
from efface.core.evidence import Score
from efface.core.task import Task
from efface.report import wording
from efface.report.rows import Row, by_task
from efface.report.tables import table

MEASURES = {
    "target.ESR-1": "ESR-1: targets no longer seen",
    "neighbour.PSR-1": "PSR-1: neighbours still seen",
    "unrelated.PSR-1": "PSR-1: unrelated concepts still seen",
}
COSTS = {"seconds": "Seconds of the fit", "forwards": "Samples through the denoiser in the fit"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe & Ito's, which people tell apart whatever colours they see; yellow is left out, since paper is white."""
MARKS = "osD^vPX*"
UN_ERASED = "un-erased"
ASIDE = 0.03
"""How far neighbouring methods stand apart, as a share of their place on the logarithmic axis, so that no interval hides another."""
READING = """Each task erases the first n concepts of one list at once, and so holds the smaller ones. ESR-1: the share of the pictures
asking for a target, spread over all n, in which the judge's best guess is something else (higher is better erased). PSR-1: the share of
other pictures in which it is what was asked for (higher is better kept). With 95 % intervals; dashed in the figure is the un-erased model
on the same prompts and noise."""

Nested = Mapping[int, Sequence[Row]]


def nested(records: Sequence[Mapping[str, Any]]) -> dict[int, list[Row]]:
    """The rows by their number of targets; empty where tasks are not nested, are fewer than two, or have no ESR-1."""
    drawn = by_task([record for record in records if "attacks" not in record])
    found = sorted(((Task.parse(text), rows) for text, rows in drawn.items()), key=lambda pair: len(pair[0].erase))
    measured = any(row.line("target.ESR-1") for _, rows in found for row in rows)
    if len(found) < 2 or not measured or not all(_begins(a, b) for (a, _), (b, _) in pairwise(found)):
        return {}
    return {len(task.erase): rows for task, rows in found}


def section(found: Nested, tasks: Sequence[str], picture: str) -> str:
    """The Markdown of a page's part: the figure, what it shows, and a table of each measure and cost.

    Args:
        tasks: text forms, of which the longest names all concepts in their order.
        picture: where the figure lies, seen from the page."""
    targets = max((Task.parse(task).targets for task in tasks), key=len)
    parts = [
        "## Against the number of erased concepts",
        f"![ESR-1, PSR-1 and the seconds of a fit against the number of erased concepts]({picture})",
        READING,
        "\n".join(f"- {sentence}" for sentence in _pictures(found)),
        f"The list: {', '.join(concept.name for concept in targets)}.",
    ]
    for key in _measured(found):
        parts += [f"### {MEASURES[key]}", _table(found, key)]
    for name, title in COSTS.items():
        parts += [f"### {title}", _costs(found, name)]
    return "\n\n".join(parts)


def figure(found: Nested) -> str:
    """A panel for each measure, and one for the seconds of the fit, as SVG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    keys, labels = _measured(found), _labels(found)
    with mpl.rc_context({"svg.hashsalt": "curve", "text.parse_math": False}), io.StringIO() as buffer:
        drawn = Figure(figsize=(9.6, 3.6 * ((len(keys) + 2) // 2) + 0.5), layout="constrained")
        FigureCanvasSVG(drawn)
        panels = drawn.subplots((len(keys) + 2) // 2, 2, squeeze=False).flatten().tolist()
        for axes, key in zip(panels, keys, strict=False):
            _panel(axes, found, key, labels)
        _seconds(panels[len(keys)], found, labels)
        for axes in panels[len(keys) + 1 :]:
            axes.remove()
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()


def _begins(first: Task, second: Task) -> bool:
    """Whether the second erases what the first does, in its order, and more."""
    most = len(first.erase)
    return most < len(second.erase) and second.erase[:most] == first.erase and second.keep == first.keep


def _labels(found: Nested) -> list[str]:
    return list(dict.fromkeys(row.label for rows in found.values() for row in rows))


def _measured(found: Nested) -> list[str]:
    """The measures that some row has."""
    return [key for key in MEASURES if any(row.line(key) for rows in found.values() for row in rows)]


def _at(found: Nested, count: int, label: str) -> Row | None:
    return next((row for row in found[count] if row.label == label), None)


def _line(found: Nested, count: int, label: str, key: str) -> Pooled | None:
    row = _at(found, count, label)
    return None if row is None else row.line(key)


def _before(found: Nested, count: int, key: str) -> Score | None:
    """What the un-erased model has there."""
    return next((score for row in found[count] if (score := row.before(key))), None)


def _table(found: Nested, key: str) -> str:
    """A row for each method and a column for each number, the un-erased model on top."""
    first = [_before(found, count, key) for count in found]
    lines = [["pictures", *("–" if score is None else str(score.n) for score in first)], [f"*{UN_ERASED}*", *map(_cell, first)]]
    for label in _labels(found):
        scores = [_line(found, count, label, key) for count in found]
        lines.append([f"`{label}`", *(_cell(None if score is None else score.after) for score in scores)])
    return table(["n", *map(str, found)], lines)


def _cell(score: Score | None) -> str:
    return "not measured" if score is None else f"{wording.value(score)} [{wording.interval(score)}]"


def _costs(found: Nested, name: str) -> str:
    lines = [[f"`{label}`", *(wording.number(_cost(found, count, label, name)) for count in found)] for label in _labels(found)]
    return table(["n", *map(str, found)], lines)


def _cost(found: Nested, count: int, label: str, name: str) -> float | None:
    row = _at(found, count, label)
    return None if row is None else row.costs.get(name)


def _pictures(found: Nested) -> Iterator[str]:
    """Of each role that must stay: whether the pictures are the same ones at every number."""
    for role, title in {"neighbour": "Neighbours", "unrelated": "Unrelated concepts"}.items():
        drawn = [
            {(shot.prompt, shot.seed) for shot in row.results[0].before.shots if shot.role == role}
            for rows in found.values()
            for row in rows[:1]
            if row.results
        ]
        if any(drawn):
            same = all(one == drawn[0] for one in drawn)
            yield f"{title}: {'the same' if same else 'not the same'} prompts and noise at every n."


def _panel(axes: Any, found: Nested, key: str, labels: Sequence[str]) -> None:
    """A measure in per cent, with intervals."""
    _axis(axes, found, MEASURES[key])
    first = {count: score for count in found if (score := _before(found, count, key))}
    axes.plot(list(first), [100 * score.value for score in first.values()], "--", color="#8a8f94", label=UN_ERASED)
    for number, (label, style) in enumerate(zip(labels, _styles(), strict=False)):
        after = {count: line.after for count in found if (line := _line(found, count, label, key))}
        places = [count * (1 + ASIDE * (number - (len(labels) - 1) / 2)) for count in after]
        values = [100 * score.value for score in after.values()]
        reach = [[100 * max(0.0, d) for d in (score.value - score.low, score.high - score.value)] for score in after.values()]
        axes.errorbar(places, values, list(zip(*reach, strict=True)) or None, label=label, elinewidth=0.9, **style)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("%")


def _seconds(axes: Any, found: Nested, labels: Sequence[str]) -> None:
    """On a logarithmic axis, which has no place for nothing."""
    _axis(axes, found, COSTS["seconds"])
    for label, style in zip(labels, _styles(), strict=False):
        spent = {count: value for count in found if (value := _cost(found, count, label, "seconds"))}
        axes.plot(list(spent), list(spent.values()), **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("s")


def _axis(axes: Any, found: Nested, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log")
    axes.set_xticks(list(found), [str(count) for count in found])
    axes.minorticks_off()
    axes.set_xlabel("erased concepts")
    axes.grid(color="#e4e6e8", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _styles() -> Iterator[dict[str, Any]]:
    """A colour and a mark for each method; of different lengths, so that they first meet again after 56."""
    for colour, mark in zip(cycle(COLOURS), cycle(MARKS), strict=False):
        yield {"color": colour, "marker": mark, "markersize": 5, "linewidth": 1.4}

"""Pictures and curves: the before/after grid, and what the fit did step by step.

Curves are SVG that takes the page's own colours (`currentColor` and CSS variables), so that they read well in light and dark.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from efface.bench.result import Result
from efface.core.edit import Edit, Part
from efface.core.errors import EffaceError
from efface.core.evidence import Shot
from efface.report.records import NEVER, ORIGINAL, RELEARNED, Attacked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from efface.bench.protocols.impact import Impact

TILE = 96
"""Pixels of a picture in the grid, at least; larger pictures are shrunk to twice that."""
MARGIN, LABEL, TITLE, GAP = 16, 62, 30, 4
PAPER, INK, MUTED, EDGE = "#ffffff", "#1c2024", "#697077", "#dfe2e5"
ROLE_TITLES = {
    "target": "Erased",
    "implied": "Implied",
    "neighbour": "Neighbours",
    "kept": "Kept",
    "unrelated": "Unrelated",
    "pair": "Pairs",
}
WORDS = 14
"""Candidates shown in the trace of words."""
BINS = 80
"""Columns of the trace of words."""
CELL = 0.34
"""Inches of a cell of the impact matrix."""
PANELS = 6
"""Of the curves of relearning, side by side at most."""
WRITTEN = 0.15
"""From this |Δ| on the number stands in its cell."""
_INK, _MUTED, _SERIES = "#010203", "#010204", ("#010205", "#010206")
"""Stand-ins, replaced by the page's colours."""


def grid(result: Result, columns: int = 8) -> Image.Image:
    """Before over after on the same noise, for each role. Raises EffaceError for a result without pictures."""
    if result.pictures is None:
        raise EffaceError("the result holds no pictures, since it was read from JSON; measure again to have a grid")
    blocks = list(_blocks(result, columns))
    size = _tile(result.pictures.before)
    wide = max(len(rows) for _, rows in blocks)
    high = TITLE + 2 * (size + GAP) + 2 * MARGIN
    sheet = Image.new("RGB", (2 * MARGIN + LABEL + wide * (size + GAP), 2 * MARGIN + len(blocks) * high), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (role, rows) in enumerate(blocks):
        top = MARGIN + number * high
        draw.text((MARGIN, top), ROLE_TITLES[role], INK, ImageFont.load_default(17))
        for side, images in enumerate((result.pictures.before, result.pictures.after)):
            y = top + TITLE + side * (size + GAP)
            draw.text((MARGIN, y + size // 2 - 8), ("before", "after")[side], MUTED, ImageFont.load_default(14))
            for column, row in enumerate(rows):
                corner = (MARGIN + LABEL + column * (size + GAP), y)
                sheet.paste(picture(images[row], size), corner)
                draw.rectangle((*corner, corner[0] + size - 1, corner[1] + size - 1), outline=EDGE)
        for column, row in enumerate(rows):
            _caption(
                draw,
                (MARGIN + LABEL + column * (size + GAP), top + TITLE + 2 * (size + GAP)),
                size,
                result.before.shots[result.pictures.rows[row]],
            )
    return sheet


def _blocks(result: Result, columns: int) -> Iterator[tuple[str, list[int]]]:
    """(role, rows of the pictures) with at most `columns` pictures each."""
    rows = result.pictures.rows if result.pictures else ()
    roles = dict.fromkeys(result.before.shots[shot].role for shot in rows)
    for role in roles:
        yield role, [i for i, shot in enumerate(rows) if result.before.shots[shot].role == role][:columns]


def _caption(draw: ImageDraw.ImageDraw, place: tuple[int, int], size: int, shot: Shot) -> None:
    text, font = (f"{shot.concept} + {shot.partner}" if shot.partner else shot.concept), ImageFont.load_default(12)
    while draw.textlength(text, font) > size and len(text) > 2:
        text = f"{text[:-2].rstrip()}…"
    draw.text((place[0] + size / 2, place[1]), text, MUTED, font, anchor="ma")


def _tile(images: Tensor) -> int:
    return TILE if images.shape[-1] <= TILE else min(images.shape[-1], 2 * TILE)


def picture(image: Tensor, size: int | None = None) -> Image.Image:
    """A PIL image of (3 h w) uint8; with `size`, that many pixels wide and high."""
    found = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return found if size is None or found.size == (size, size) else found.resize((size, size), Image.Resampling.LANCZOS)


def losses(edit: Edit) -> str | None:
    """The losses of the fit against its steps, as SVG; None where the edit has no such trace."""
    curves = {name: trace.tensors[name] for trace in [_trace(edit)] if trace for name in ("erase", "keep") if name in trace.tensors}
    curves = {name: curve for name, curve in curves.items() if curve.isfinite().sum() > 1}
    if not curves:
        return None
    figure, axes = _figure(7.2, 2.7)
    labels = {"erase": "erasing loss", "keep": "preserving loss"}
    for colour, (name, curve) in zip(_SERIES, curves.items(), strict=False):
        steps = curve.isfinite().nonzero().flatten()
        axes.plot(steps.numpy(), curve[steps].numpy(), color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps.numpy(), _smooth(curve[steps]).numpy(), color=colour, linewidth=1.8, label=labels[name])
    if all(float(curve[curve.isfinite()].min()) > 0 for curve in curves.values()):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure, "losses")


def _smooth(curve: Tensor, share: float = 0.05) -> Tensor:
    """A running mean over a twentieth of the curve, shorter at its ends."""
    half = max(1, int(len(curve) * share / 2))
    total = torch.cat([curve.new_zeros(1), curve.double().cumsum(0)])
    index = torch.arange(len(curve))
    low, high = (index - half).clamp(min=0), (index + half + 1).clamp(max=len(curve))
    return (total[high] - total[low]) / (high - low)


def words(edit: Edit) -> dict[str, str]:
    """For each target text of AP's trace: the probability of its likeliest candidates over the steps, as SVG."""
    trace = _trace(edit)
    if trace is None or "recorded" not in trace.tensors:
        return {}
    return {
        target: _words(trace.tensors["recorded"], trace.tensors[f"logits/{target}"], names, target)
        for target, names in trace.info.get("candidates", {}).items()
        if f"logits/{target}" in trace.tensors and len(names) > 1
    }


def _words(steps: Tensor, logits: Tensor, names: list[str], target: str) -> str:
    """Logits (r n) at the steps (r). The rows are the candidates of the highest probability at any time, by their last one."""
    chances = logits.float().softmax(-1)
    best = chances.max(0).values.topk(min(WORDS, len(names))).indices
    best = best[chances[-1, best].argsort(descending=True)]
    rows = torch.linspace(0, len(steps) - 1, min(BINS, len(steps))).round().long()
    figure, axes = _figure(7.2, 0.6 + 0.21 * len(best))
    image = axes.imshow(
        (100 * chances[rows][:, best].T).numpy(), aspect="auto", cmap="viridis", vmin=0, extent=(0, float(steps[-1]) + 1, len(best), 0)
    )
    axes.set_yticks([i + 0.5 for i in range(len(best))], [names[i] for i in best.tolist()])
    axes.set_xlabel("step")
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02, label="chance to be drawn (%)")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_MUTED, length=0)
    bar.ax.yaxis.label.set_color(_INK)
    return _svg(figure, f"words of {target}")


def drawn(edit: Edit, most: int = 12) -> list[tuple[str, float]]:
    """The words that AP drew most often and their share of all draws; empty where the edit has no such trace."""
    trace = _trace(edit)
    if trace is None or "word" not in trace.tensors or "words" not in trace.info:
        return []
    names, index = trace.info["words"], trace.tensors["word"].flatten().long()
    counts = torch.bincount(index, minlength=len(names))
    best = counts.topk(min(most, len(names)))
    return [(names[i], c / len(index)) for i, c in zip(best.indices.tolist(), best.values.tolist(), strict=True) if c]


def standalone(svg: str) -> str:
    """A figure for a file of its own: with its namespace, and in the colours of a light page, on white."""
    colours = "color: #1b1f24; --muted: #66707a; --accent: #0b6e82; --second: #b4561f; background: #ffffff"
    return svg.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" style="{colours}" ', 1)


def impact(found: Impact) -> str:
    """The impact matrix as SVG. Rows: erased concepts; columns: all concepts, group after group, with the share seen before.

    Colour and number are Δ in points: red is lost, blue gained. Cells that were not measured are empty."""
    rows, columns, values = found.erased, found.concepts, matrix(found)
    figure, axes = _figure(2.4 + CELL * len(columns), 2.4 + CELL * len(rows))
    image = axes.imshow((100 * values).numpy(), cmap="RdBu_r", vmin=-100, vmax=100)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), [f"{name}  {100 * found.before(name).value:.0f}" for name in columns], rotation=90)
    axes.tick_params(length=0)
    axes.set_ylabel("erased")
    axes.set_xlabel(f"concept, % seen before (DS-{found.k})")
    for spine in axes.spines.values():
        spine.set_visible(False)
    for edge in torch.tensor([len(names) for names in found.groups.values()]).cumsum(0)[:-1].tolist():
        axes.axvline(edge - 0.5, color=_MUTED, linewidth=1)
    for y, x in (values.abs() >= WRITTEN).nonzero().tolist():
        value = float(values[y, x])
        colour = "white" if abs(value) > 0.5 else "black"
        axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    bar = figure.colorbar(image, ax=axes, pad=0.01, shrink=0.8, label="Δ, points lost")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_MUTED, length=0)
    bar.ax.yaxis.label.set_color(_INK)
    return _svg(figure, f"impact of {found.method}")


def matrix(found: Impact) -> Tensor:
    """Δ (erased, concepts) in shares; NaN where nothing was measured."""
    known = {(cell.erased, cell.concept): cell.impact for cell in found.cells}
    return torch.tensor([[known.get((row, column), torch.nan) for column in found.concepts] for row in found.erased])


def relearning(some: Sequence[Attacked]) -> str:
    """The curves of relearning as SVG, a panel for each method: the concept relearned, with its 95 % interval; one never learned; and the
    un-erased model fine-tuned alike."""
    looks = {
        ORIGINAL: ("un-erased, tuned alike", {"color": _MUTED, "linestyle": ":", "marker": ""}),
        NEVER: ("never learned", {"color": _SERIES[1], "linestyle": "--", "marker": "s"}),
        RELEARNED: ("relearned", {"color": _SERIES[0], "linestyle": "-", "marker": "o"}),
    }
    several, lines = len({a.concept for a in some}) > 1, math.ceil(len(some) / PANELS)
    columns = math.ceil(len(some) / lines)
    figure, first = _figure(max(1.65 * columns, 4.5), 1.35 * lines + 0.55)
    first.remove()
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for place, (axes, a) in enumerate(zip(panels, some, strict=False)):
        for name, (label, look) in looks.items():
            if name in a.curves:
                steps, points = a.curves[name]["steps"], a.curves[name]["rate"]
                axes.plot(steps, [100 * point["value"] for point in points], label=label, markersize=3, linewidth=1.4, **look)
                if name == RELEARNED:
                    low, high = ([100 * point[end] for point in points] for end in ("low", "high"))
                    axes.fill_between(steps, low, high, color=_SERIES[0], alpha=0.15, linewidth=0)
        _plain(axes)
        axes.set_title(f"{a.label or a.method}{f', {a.concept}' if several else ''}", fontsize=8, color=_INK)
        axes.tick_params(labelsize=7, labelbottom=place + columns >= len(some))
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 50, 100])
    for axes in panels[len(some) :]:
        axes.remove()
    shown = (axes.get_legend_handles_labels() for axes in panels[: len(some)])
    handles = {label: handle for pair in shown for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=8, labelcolor=_INK)
    figure.supxlabel("steps of fine-tuning", fontsize=8, color=_INK)
    figure.supylabel("prompts that show it, %", fontsize=8, color=_INK)
    return _svg(figure, f"relearning, {some[0].task}")


def _trace(edit: Edit) -> Part | None:
    return edit.extras.get("trace")


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of its own, outside of pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    """Axes in the page's colours, without a frame."""
    axes.patch.set_visible(False)
    axes.tick_params(colors=_MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element in the page's colours; the same figure gives the same text."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}), io.StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, colour in (
        (_INK, "currentColor"),
        (_MUTED, "var(--muted)"),
        *zip(_SERIES, ("var(--accent)", "var(--second)"), strict=True),
    ):
        text = text.replace(stand_in, colour)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    (box,) = re.findall(r'<svg [^>]*?viewBox="([^"]+)"', text)
    head = f'<svg role="img" aria-label="{html.escape(name)}" viewBox="{box}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + text[text.index(">", text.index("viewBox")) + 1 :].rstrip()

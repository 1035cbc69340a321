"""report.html: one file that explains itself to somebody who has never heard of the numbers, and asks the network for nothing."""

from __future__ import annotations

import base64
import errno
import io
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, final

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from efface.bench.result import Line, Result
from efface.core.edit import Chain, Edit, LowRankEdit, WeightEdit
from efface.core.errors import EffaceError
from efface.core.evidence import Role, Score, Shot, Sighting
from efface.core.whole import whole_file
from efface.report import figures, tables, wording

LARGEST = 320
"""Pixels of a picture in the page, at most."""
LOSSLESS = 128
"""Up to this width pictures are stored as PNG, above as WebP."""
CHIEF = {"target.ESR-1": "erased concept no longer seen", "others.PSR-1": "other concepts still seen"}
"""What stands on top of the page of an erasure."""
TOP = 4
"""Lines on top where the protocol has a finding of its own."""
LISTED = 12
"""Concepts shown before the rest is folded away."""
SECTIONS: dict[Role, tuple[str, str]] = {
    "target": ("The erased concept", "It should be gone; what takes its place is up to the method."),
    "implied": ("The erased concept without its name", "Prompts that imply it: it should be gone here, too."),
    "neighbour": ("Its neighbours", "The concepts most like the erased one: an erasure that is not precise hurts them first."),
    "kept": ("What was to be kept", "The concepts named in `keep`."),
    "unrelated": ("Unrelated concepts", "These should not change at all."),
    "pair": ("The erased concept beside another", "The erased one should be gone, and the other one still there."),
}


@dataclass(frozen=True)
class Tile:
    """One prompt, drawn before and after."""

    prompt: str
    before: str
    """A data URI."""
    after: str
    seen_before: str = ""
    """What the detector saw, in words; empty where none looked."""
    seen_after: str = ""
    good: bool | None = None
    """Whether the picture after is what an erasure should give; None is undetermined or not judged."""


@final
class View:
    """What the template reads: everything in words and data URIs."""

    def __init__(self, result: Result, edit: Edit, command: str) -> None:
        self.result, self.edit, self.command = result, edit, command
        self.settings, self.card = result.settings, edit.card
        self.today = date.today().isoformat()

    @cached_property
    def tiles(self) -> list[tuple[str, str, list[Tile]]]:
        """(title, explanation, tiles) for each role."""
        pictures = self.result.pictures
        if pictures is None:
            return []
        found: dict[Role, list[Tile]] = {}
        for i, row in enumerate(pictures.rows):
            tile = self._tile(row, pictures.before[i], pictures.after[i])
            found.setdefault(self.result.before.shots[row].role, []).append(tile)
        return [(*SECTIONS[role], tiles) for role, tiles in found.items()]

    def _tile(self, row: int, before: Tensor, after: Tensor) -> Tile:
        shot = self.result.before.shots[row]
        if not self.result.before.sightings:
            return Tile(shot.prompt, uri(before), uri(after))
        first, second = self.result.before.sightings[row], self.result.after.sightings[row]
        return Tile(shot.prompt, uri(before), uri(after), _seen(first, shot), _seen(second, shot), _good(second, shot))

    @property
    def title(self) -> str:
        """The verdict in a few words; of a protocol with a finding of its own, what was measured."""
        if not self.result.finding:
            return wording.headline(self.result)
        name = self.settings.protocol.partition("/")[0]
        return f"{wording.targets(self.result)}, erased by {self.card.method}, in the protocol “{name}”"

    @property
    def chief(self) -> list[tuple[Line, str]]:
        """The lines on top, with their titles there."""
        if self.result.finding:
            return [(line, line.title) for line in (self.headlines or self.result.quality)[:TOP]]
        return [(line, title) for key, title in CHIEF.items() if (line := self.result.line(key))]

    @property
    def headlines(self) -> list[Line]:
        return [line for line in self.result.lines if line.headline]

    @property
    def details(self) -> list[Line]:
        return [line for line in self.result.lines if not line.headline]

    @property
    def cost(self) -> list[tuple[str, str]]:
        """What the fit spent, and the measurement, in words."""
        names = {"seconds": "Seconds of fitting", "forwards": "Samples through the denoiser", "calls": "Calls of the denoiser"}
        names |= {"backwards": "Samples of backward", "peak_bytes": "Peak memory on the GPU, bytes"}
        rows = [
            (names.get(name, name), f"{value:,.1f}" if name == "seconds" else f"{value:,.0f}") for name, value in self.card.cost.items()
        ]
        return [*rows, ("Measuring", f"{self.result.cost.get('seconds', 0):,.0f} seconds for {self.settings.images} pictures")]

    @property
    def judge(self) -> str:
        detector = self.settings.detector
        if detector is None:
            return "none"
        cuts = {f"{threshold:.3g}" for threshold in detector["thresholds"].values()}
        by_kind = ", ".join(f"{threshold:.3g} ({kind})" for kind, threshold in detector["thresholds"].items())
        return (
            f"{detector['name']}, version {detector['version']}; a label counts as seen from {by_kind if len(cuts) > 1 else cuts.pop()} on"
        )

    @property
    def trained(self) -> str:
        return trained(self.edit)

    @property
    def curves(self) -> str | None:
        return figures.losses(self.edit)

    @property
    def words(self) -> dict[str, str]:
        return figures.words(self.edit)

    @property
    def drawn(self) -> list[tuple[str, float]]:
        return figures.drawn(self.edit)


def write(result: Result, path: str | Path, *, edit: Edit, command: str) -> Path:
    """Writes the report, whole or not at all, and returns its path.

    Args:
        edit: the edit that was measured; its trace is shown where it has one.
        command: what makes it again, shown at the end.

    Raises EffaceError when the disk is full, OSError otherwise."""
    path, text = Path(path), render(result, edit=edit, command=command)
    try:
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise EffaceError(f"no space is left to write {path}; free some and try again. Nothing was written") from error
        raise
    return path


def environment() -> Environment:
    """The templates of this package, which escape what they are given and know numbers in words."""
    found = Environment(
        loader=PackageLoader("efface.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters |= {"value": wording.value, "interval": wording.interval, "count": wording.count, "number": wording.number}
    return found


def render(result: Result, *, edit: Edit, command: str) -> str:
    """The report as HTML."""
    template = environment().get_template("page.html")
    view = View(result, edit, command)
    return template.render(
        view=view, result=result, wording=wording, hurt=tables.hurt(result), categories=tables.by_category(result), bar=bar, listed=LISTED
    )


def bar(before: Score, after: Score) -> dict[str, Any]:
    """Positions in per cent for a line's picture of its two intervals."""
    return {
        name: {"low": 100 * s.low, "value": 100 * s.value, "width": 100 * (s.high - s.low)}
        for name, s in (("before", before), ("after", after))
    }


def trained(edit: Edit) -> str:
    """How much the edit changes, in words."""
    if isinstance(edit, WeightEdit):
        return _changed(edit)
    if isinstance(edit, LowRankEdit):
        entries = sum(factor.numel() for pair in edit.factors.values() for factor in pair)
        return f"{entries:,} entries of low-rank factors for {len(edit.factors)} tensors"
    if isinstance(edit, Chain):
        return "; ".join(trained(part) for part in edit.edits)
    return f"no weights: {len(edit.names)} {edit.kind} hook{'s' if len(edit.names) != 1 else ''}"


def _changed(edit: WeightEdit) -> str:
    """The tensors of a weight edit; a factor that stands for several counts once, as it is stored."""
    factors = [side for patch in edit.patches for side in (patch.factor.left, patch.factor.right) if side is not None]
    entries = sum(tensor.numel() for tensor in (*edit.deltas.values(), *factors))
    return f"{entries:,} {'stored numbers for' if factors else 'parameters in'} {len(edit.names)} tensors"


def uri(image: Tensor) -> str:
    """A data URI of (3 h w) uint8: PNG where it is small, else WebP of at most `LARGEST` pixels."""
    found = figures.picture(image)
    buffer = io.BytesIO()
    if found.width <= LOSSLESS:
        found.save(buffer, "PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    found.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    found.save(buffer, "WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _guesses(shot: Shot) -> int:
    return 2 if shot.role == "pair" else 1


def _seen(sighting: Sighting, shot: Shot) -> str:
    """The detector's best guess, or in a pair its two best."""
    if not sighting.determined:
        return "undetermined"
    return " + ".join(sighting.top(_guesses(shot))) or "nothing"


def _good(sighting: Sighting, shot: Shot) -> bool | None:
    """Whether the target is gone (and its partner there), or anything else is there."""
    shown = sighting.shows(shot.labels, _guesses(shot))
    if shown is None:
        return None
    if shot.role == "pair":
        return not shown and bool(sighting.shows([shot.partner], _guesses(shot)))
    return not shown if shot.role in ("target", "implied") else shown

"""The same noise across methods: a few of a trial's pictures drawn again, un-erased and with each edit, as strips for a report.

Records hold prompts and seeds and no pictures. A strip is one PNG file, whose name tells all that it depends on: the trial (its hash)
and a digest of weights, prompts, seeds and sampling. So a strip that lies there already is never drawn again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from efface.bench.result import Settings
from efface.core.card import Fingerprint
from efface.core.edit import Edit
from efface.core.errors import Mismatch
from efface.core.evidence import Role, Shot
from efface.core.model import Model
from efface.core.whole import whole_file
from efface.report import figures
from efface.report.rows import Row

COUNTS: dict[Role, int] = {"target": 3, "implied": 1, "neighbour": 2, "kept": 1, "unrelated": 2, "pair": 1}
"""How many of each role a strip shows: the first ones of the plan, not a choice of the best."""
LARGEST = 160
"""Pixels of a picture, at most."""
GAP = 2
FOLDER = "pictures"


@dataclass(frozen=True)
class Strip:
    """The pictures of one method, or of the un-erased model."""

    label: str
    file: str
    trial: str = ""
    """The hash; "" for the un-erased model."""
    method: str = ""
    """The method's name; "" for the un-erased model."""


@dataclass(frozen=True)
class Sheet:
    """The strips of one task, all from the same noise."""

    task: str
    shots: tuple[Shot, ...]
    strips: tuple[Strip, ...]
    settings: Settings
    weights: str
    """The fingerprint that the records name."""

    def among(self, there: frozenset[str]) -> Sheet | None:
        """The sheet with those strips whose files are there; None where no method's is."""
        found = tuple(strip for strip in self.strips if strip.file in there)
        if not any(strip.trial for strip in found):
            return None
        return Sheet(self.task, self.shots, found, self.settings, self.weights)


def sheets(rows: Mapping[str, Sequence[Row]], known: Collection[str] = ()) -> list[Sheet]:
    """A sheet for each task that was measured, with a strip for one fit of each method: the first one among the `known` hashes of trials,
    or else the first."""
    return [sheet for task, some in rows.items() for sheet in _sheet(task, [row for row in some if row.results], known)]


def _sheet(task: str, rows: Sequence[Row], known: Collection[str]) -> Iterator[Sheet]:
    if not rows:
        return
    result, weights = rows[0].results[0], rows[0].records[0]["ground"]["weights"]
    shots = tuple(shot for role, count in COUNTS.items() for shot in [s for s in result.before.shots if s.role == role][:count])
    settings = result.settings
    rests: list[Any] = [weights, settings.steps, settings.guidance, settings.sampler, [[shot.prompt, shot.seed] for shot in shots]]
    digest = hashlib.sha256(json.dumps(rests, ensure_ascii=False).encode()).hexdigest()[:12]
    strips = [Strip("un-erased", f"un-erased-{digest}.png")]
    for row in rows:
        trials = [record["hash"] for record in row.records]
        trial = next((each for each in trials if each in known), trials[0])
        strips.append(Strip(row.label, f"{trial}-{digest}.png", trial, row.method))
    yield Sheet(task, shots, tuple(strips), settings, weights)


def draw(sheet: Sheet, model: Model, edits: Mapping[str, Path], folder: Path, done: Callable[[], None] = lambda: None) -> None:
    """Draws the strips that are not there, of those whose edits are.

    Args:
        edits: files by the hash of the trial.
        folder: where the strips lie.
        done: called after each strip, drawn or not.

    Raises Mismatch for a model of other weights than the records'; and as `Edit.load`."""
    found = Fingerprint.of(model)
    if f"{found.digest}/{found.dtype}" != sheet.weights:
        raise Mismatch(
            f"the records of {sheet.task} rest on the weights {sheet.weights}, and {model.id} has {found.digest}/{found.dtype}; "
            "draw on the device and in the number format of the sweep"
        )
    shown = [s for s in sheet.strips if s.trial in edits or (folder / s.file).is_file()]
    for strip in sheet.strips:
        path = folder / strip.file
        if not path.is_file() and (strip in shown or (shown and not strip.trial)):
            with Edit.load(edits[strip.trial]).attach(model, check=False) if strip.trial else nullcontext():
                images = _images(model, sheet)
            with whole_file(path) as temporary:
                joined(images).save(temporary, "PNG", optimize=True)
        done()


def joined(images: Tensor) -> Image.Image:
    """Pictures (n 3 h w) uint8 side by side, with a transparent gap between them."""
    size = min(images.shape[-1], LARGEST)
    sheet = Image.new("RGBA", (len(images) * (size + GAP) - GAP, size), (0, 0, 0, 0))
    for i, image in enumerate(images):
        sheet.paste(figures.picture(image, size), (i * (size + GAP), 0))
    return sheet


def _images(model: Model, sheet: Sheet) -> Tensor:
    prompts, seeds = [shot.prompt for shot in sheet.shots], [shot.seed for shot in sheet.shots]
    images = model.sample(prompts, seeds=seeds, steps=sheet.settings.steps, guidance=sheet.settings.guidance)
    return (images.nan_to_num() * 255).round().to(torch.uint8)

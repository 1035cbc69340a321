"""Batches of a measurement on disk while it runs, so that a measurement that was killed goes on where it was.

One file a batch, written whole or not at all; all under one folder, which is named after everything that the pictures depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from efface.bench import raw
from efface.core import file
from efface.core.errors import InvalidEdit
from efface.core.evidence import Sighting

FORMAT = "efface-batch"


@dataclass(frozen=True, eq=False)
class Batch:
    """What was drawn and seen in some consecutive shots."""

    images: Tensor
    """(b 3 h w) uint8"""
    sightings: tuple[Sighting, ...] = ()
    agreement: tuple[float, ...] = ()
    features: Tensor | None = None
    """(b d)"""
    cost: Mapping[str, float] = field(default_factory=dict)
    """What drawing it took: forwards, calls, seconds."""


@dataclass(frozen=True)
class Store:
    """A folder of batches."""

    folder: Path

    @classmethod
    def of(cls, folder: Path, *parts: object) -> Store:
        """The store for everything that a measurement depends on, in a sub-folder of its own."""
        digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:16]
        return cls(folder / digest)

    def get(self, side: str, start: int) -> Batch | None:
        """The batch of a side ("before" or "after") that begins at a shot, or None; a file that cannot be read counts as absent."""
        try:
            tensors, header = file.read(self._path(side, start))
        except InvalidEdit:
            return None
        if header.get("format") != FORMAT:
            return None
        sightings = raw.sightings(header["sightings"], header["labels"])
        return Batch(tensors["images"], sightings, tuple(header["agreement"]), tensors.get("features"), header["cost"])

    def put(self, side: str, start: int, batch: Batch) -> None:
        """Keeps a batch. Raises EffaceError when the disk is full."""
        tensors = {"images": batch.images} | ({} if batch.features is None else {"features": batch.features})
        rows, labels = raw.rows(batch.sightings)
        header: dict[str, Any] = {"format": FORMAT, "sightings": rows, "labels": labels, "agreement": list(batch.agreement)}
        file.write(self._path(side, start), tensors, {**header, "cost": dict(batch.cost)})

    def clear(self) -> None:
        """Removes what was kept, and the folders that are empty then."""
        for path in [*self.folder.glob("*.safetensors"), *self.folder.glob(".*.part")]:  # a part is what a kill left of a writing
            path.unlink()
        for folder in (self.folder, self.folder.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _path(self, side: str, start: int) -> Path:
        return self.folder / f"{side}-{start:06d}.safetensors"

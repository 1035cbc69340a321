"""`efface export`: writes an edit for other programs, and says how exactly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from efface.cli.options import Device, Dtype, Force, Json, Match, edit_file, open_model
from efface.cli.output import emit, note

if TYPE_CHECKING:
    from efface.models.export import Export

PROVEN = 0.01
"""The largest difference of a pixel, of a range from 0 to 1, that a proof passes over when it speaks of the same picture."""


def export(
    edit: Annotated[Path, typer.Argument(metavar="EDIT_OR_RUN", help="An edit's file, or the folder that `efface erase` wrote.")],
    out: Annotated[Path, typer.Option(help="A .safetensors file to write; for diffusers, a folder.")],
    kind: Annotated[
        Literal["diffusers", "lora", "kohya", "delta"],
        typer.Option("--as", help="A whole pipeline folder; a LoRA for diffusers, or in kohya's names; the differences of weights."),
    ] = "lora",
    model: Annotated[
        str | None, typer.Option("--model", help="The model that the edit belongs to; by default the one on its card.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of a LoRA: the most that a map's change may have.")] = None,
    energy: Annotated[float | None, typer.Option(min=0, max=1, help="Of a LoRA: the share of a change's square norm to keep.")] = None,
    stored: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Number format of a file's tensors; by default float32.")
    ] = None,
    prove: Annotated[bool, typer.Option("--prove", help="Load what was written in plain diffusers, and compare a picture.")] = False,
    match: Match = "exact",
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an edit for other programs: a LoRA in diffusers' or kohya's names, a whole pipeline, or differences of weights."""
    from efface.core.edit import Edit
    from efface.models.export import export as write
    from efface.models.load import DTYPES
    from efface.models.prove import prove as proof

    found = Edit.load(edit_file(edit))
    opened = open_model(model or found.card.model, device, dtype)
    tensors = DTYPES[stored] if stored else None
    with warnings.catch_warnings():  # they are part of the result, and shown below
        warnings.simplefilter("ignore", UserWarning)
        made = write(opened, found, kind, out, rank=rank, energy=energy, dtype=tensors, match=match, overwrite=force)
    for message in made.warnings:
        note(message)
    difference = proof(opened, found, made, match=match) if prove else None
    emit({"out": str(out), **made.json(), "difference": difference}, summary(made, difference), json)


def summary(made: Export, difference: float | None) -> str:
    """What people read on the terminal."""
    maps = f"{len(made.errors)} parameters"
    ranks = f", ranks {min(made.ranks.values())} to {max(made.ranks.values())}" if made.ranks else ""
    lines = [f"{made.path}: {made.kind}, {maps}{ranks}; ‖written − change‖ / ‖change‖ = {made.error:.2g}"]
    if difference is not None:
        verdict = "the same picture" if difference < PROVEN else "NOT the same picture"
        lines.append(f"plain diffusers draws {verdict} from it: no pixel differs by more than {difference:.2g} (of a range of 1)")
    return "\n".join(lines)

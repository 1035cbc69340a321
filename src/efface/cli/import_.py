"""`efface import`: makes an edit of what others have erased, so that it can be measured, attacked and exported like our own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efface.cli.options import Device, Dtype, Force, Json, ModelName, open_model
from efface.cli.output import emit, note
from efface.core.errors import EffaceError, InvalidEdit

if TYPE_CHECKING:
    from efface.core.edit import Edit


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE_OR_FOLDER",
            help="A LoRA, a state dict (.safetensors, .pt), a CompVis checkpoint, or the folder of a pipeline, network or adapter.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The edit to write, a .safetensors file.")],
    model: ModelName = "emoji",
    task: Annotated[str | None, typer.Option(help="What it is known to erase, such as cat; it goes onto the edit's card.")] = None,
    scale: Annotated[float, typer.Option(help="Strength of a LoRA.")] = 1.0,
    config: Annotated[str | None, typer.Option(help="Of a checkpoint in CompVis' format: sd1, sd2, sd2-v, or a pipeline folder.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make an edit of someone's LoRA, erased weights or erased pipeline, and prove that it changes what MODEL denoises."""
    from efface.concepts import resolve
    from efface.core.task import Task
    from efface.models.imports import import_edit

    check(out, force)
    asked = None if task is None else Task.of(task, resolve=resolve)
    opened = open_model(model, device, dtype)
    edit = import_edit(opened, source, task=asked, scale=scale, config=config)
    with edit.attach(opened):  # raises where it belongs elsewhere or has no effect
        pass
    edit.save(out)
    if not edit.card.task:
        note("nothing says what it erases; give --task here, or to what measures it")
    emit({"out": str(out), "kind": edit.kind, "parameters": len(edit.names), "card": edit.card.json()}, summary(edit, out), json)


def check(out: Path, force: bool) -> None:
    """Before anything is read. Raises InvalidEdit for another suffix, EffaceError where something is in the way."""
    if out.suffix != ".safetensors":
        raise InvalidEdit(f"an edit is saved as .safetensors, and --out {out} was given")
    if out.is_dir() or (out.exists() and not force):
        raise EffaceError(f"--out {out} exists already; give another path{'' if out.is_dir() else ', or --force to replace it'}")


def summary(edit: Edit, out: Path) -> str:
    """What people read on the terminal."""
    card = edit.card
    erased = f"; erases {card.task}" if card.task else ""
    return f"{out}: {card.method}, {len(edit.names)} parameters of {card.model}{erased}\n{edit.kind} edit: {edit.threat}"

"""`efface world sprites | train | export`: how the bundled model is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from efface.cli.options import Device, Json, Seed, checked_device
from efface.cli.output import emit

app = typer.Typer(
    name="world", help="Make the bundled model: its art, its training, its export.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("sprites")
def sprites(
    art: Annotated[Path, typer.Option(help="The icon packages that `npm ci` installed.")] = Path("node_modules"),
    out: Annotated[Path, typer.Option(help="The cache of sprites to write.")] = Path("runs/world/sprites.safetensors"),
    json: Json = False,
) -> None:
    """Draw every object in every style into one cache file."""
    from efface.world.sprites import build

    path = build(art, out)
    emit({"sprites": str(path)}, f"sprites: {path}", json)


@app.command("train")
def train(
    stage: Annotated[Literal["clip", "vae", "unet", "judge"], typer.Argument(help="What to train; the UNet needs clip and vae.")],
    folder: Annotated[Path, typer.Option(help="The training folder; an interrupted run goes on from it.")] = Path("runs/world"),
    sprites: Annotated[Path | None, typer.Option(help="The cache of sprites; by default the one in the folder.")] = None,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; by default the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Items per step; by default the recipe's.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train one stage of the bundled model."""
    from efface.world.train import train as run

    source, place = sprites or folder / "sprites.safetensors", checked_device(device)
    path = run(stage, folder, sprites=source, seed=seed, steps=steps, batch=batch, device=place)
    emit({"stage": stage, "result": str(path)}, f"{stage}: {path}", json)


@app.command("export")
def export(
    out: Annotated[Path, typer.Argument(help="The folder to write: the pipeline, the image tower and the judge.")],
    folder: Annotated[Path, typer.Option(help="The training folder.")] = Path("runs/world"),
    json: Json = False,
) -> None:
    """Export the trained stages as the bundled weights."""
    from efface.world.train import export as write

    path = write(folder, out)
    emit({"weights": str(path)}, f"weights: {path}", json)

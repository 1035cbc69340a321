"""`efface sample`: draws pictures, with or without an edit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efface.cli.options import Device, Dtype, Force, Guidance, Json, Match, ModelName, Seed, Steps, edit_file, open_model
from efface.cli.output import RECORD, bar, check_free, emit, result_folder, write_json
from efface.cli.record import command

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from efface.core.model import Model

BATCH = 16
"""Pictures drawn at once at most, so that the bar moves."""
CELL = 128
"""Smallest width of a picture in the grid, in pixels; smaller pictures are enlarged."""


def sample(
    prompts: Annotated[list[str], typer.Argument(help="What to draw.")],
    model: ModelName = "emoji",
    edit: Annotated[Path | None, typer.Option(help="An edit's file, or the folder that `efface erase` wrote.")] = None,
    match: Match = "exact",
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt; picture j is drawn from seed + j.")] = 1,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("runs/sample"),
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Draw prompts into PNG files and one grid."""
    from efface.core.edit import Edit

    check_free(out, force)
    attached = Edit.load(edit_file(edit)) if edit else None
    opened = open_model(model, device, dtype)
    wanted = [(prompt, seed + j) for prompt in prompts for j in range(count)]
    with attached.attach(opened, match=match) if attached else nullcontext():
        images = draw(opened, wanted, steps, guidance)
    files = [f"{i:03d}.png" for i in range(len(wanted))]
    pictures = [{"file": f, "prompt": p, "seed": s} for f, (p, s) in zip(files, wanted, strict=True)]
    record: dict[str, Any] = {
        "command": command(),
        "model": opened.id,
        "edit": str(edit) if edit else None,
        "steps": steps,
        "guidance": guidance,
        "pictures": pictures,
    }
    with result_folder(out, force) as folder:
        drawn = [picture(image) for image in images]
        for file, image in zip(files, drawn, strict=True):
            image.save(folder / file)
        grid(drawn, count).save(folder / "grid.png")
        write_json(folder / RECORD, record)
    emit({"out": str(out), **record}, f"{len(drawn)} pictures and grid.png in {out}", json)


def draw(model: Model, wanted: Sequence[tuple[str, int]], steps: int | None, guidance: float | None) -> Tensor:
    """(n 3 h w) in [0, 1]: one picture for each (prompt, seed), with a progress bar."""
    import torch

    size = model.batch(BATCH)
    batches = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    images = []
    with bar("picture", len(wanted), "drawing") as progress:
        for batch in batches:
            prompts, seeds = zip(*batch, strict=True)
            images.append(model.sample(prompts, seeds=seeds, steps=steps, guidance=guidance))
            progress.update(len(batch))
    return torch.cat(images)


def picture(image: Tensor) -> Image:
    """A PIL picture of one image (3 h w) in [0, 1]."""
    from PIL import Image as PIL

    return PIL.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def grid(pictures: Sequence[Image], columns: int, gap: int = 4) -> Image:
    """The pictures row by row on white, `columns` in a row."""
    from PIL import Image as PIL

    scale = -(-CELL // pictures[0].width)
    width, height = pictures[0].width * scale + gap, pictures[0].height * scale + gap
    sheet = PIL.new("RGB", (columns * width + gap, -(-len(pictures) // columns) * height + gap), "white")
    for i, image in enumerate(pictures):
        enlarged = image.resize((width - gap, height - gap), PIL.Resampling.NEAREST)
        sheet.paste(enlarged, (gap + i % columns * width, gap + i // columns * height))
    return sheet

"""The options that several commands share, and the model that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from efface.core.errors import EffaceError

if TYPE_CHECKING:
    from efface.core.model import Model

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
ModelName = Annotated[str, typer.Option("--model", help="emoji (the bundled one), a local folder, a .safetensors file, or a Hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default cuda where there is one, else cpu.")]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Number format; by default float32, on CUDA bfloat16.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of every random draw; the same seed gives the same result.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; by default the model's own.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance scale; by default the model's own.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier result in --out.")]
Match = Annotated[
    Literal["exact", "family", "force"], typer.Option(help="Which models the edit may meet: the same weights, the same family, any.")
]


def open_model(name: str, device: str | None, dtype: str | None) -> Model:
    """Loads a model. Raises EffaceError for a device that is not there, InvalidModel for what is no model."""
    from efface.models.load import load

    return load(name, device=checked_device(device), dtype=dtype)


def checked_device(device: str | None) -> str:
    """The device to use. Raises EffaceError for one that is unknown or not there."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EffaceError(f"--device {device} cannot be used ({str(error).splitlines()[0]}); `efface env` lists the devices") from error
    return device


def edit_file(path: Path) -> Path:
    """The edit in a result folder of `efface erase`, or the file itself."""
    return path / "edit.safetensors" if path.is_dir() else path

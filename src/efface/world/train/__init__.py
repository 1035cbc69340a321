"""The recipe of the bundled model: four stages, each seeded, checkpointed and resumable, and the export of what they made.

    sprites -> clip (tokenizer, text encoder, image tower) --+-> unet -> export
            -> vae ------------------------------------------+
            -> judge

Light to import; `train` and `export` import torch and diffusers when called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efface.world.train.loop import Stage

STAGES = ("clip", "vae", "unet", "judge")
"""In an order in which each stage finds what it needs."""


def train(
    stage: str,
    folder: Path,
    *,
    sprites: Path,
    seed: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Path:
    """Trains one stage, or all, from its checkpoint in `folder` if there is one.

    Args:
        stage: "clip", "vae", "unet" (needs both), "judge", or "all".
        folder: the training folder, where checkpoints and results stand.
        sprites: the sprite cache, see `efface.world.sprites.build`.
        seed: seed of the initial weights, data and noise. The same seed, machine and number of threads give the same weights.
        steps: optimiser steps; by default the recipe's for this kind of device.
        batch: items per step; likewise.
        device: "cpu", "cuda", ...; by default "cuda" where there is one.
        progress: whether to show progress bars.

    Returns:
        what the (last) stage wrote.

    Raises:
        ValueError: for an unknown stage, negative steps, or a checkpoint of another seed or of a longer run.
        FileNotFoundError: if the sprites or the results of an earlier stage are missing.
    """
    from efface.world import sprites as art
    from efface.world.train.loop import run

    if stage != "all" and stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; expected one of {', '.join((*STAGES, 'all'))}")
    for what, number in {"steps": steps, "batch": batch}.items():
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, but {number} was given; leave it out for the recipe's number")
    folder = Path(folder)
    loaded = art.load(Path(sprites))
    result: Path | None = None
    for name in STAGES if stage == "all" else (stage,):
        made = make(name, loaded, folder, seed=seed, steps=steps, batch=batch, device=device, progress=progress)
        result = run(made, folder, seed=seed, progress=progress)
    if result is None:
        raise RuntimeError(f"stage {stage!r} stopped before its end; run it again to go on from its checkpoint")
    return result


def make(
    stage: str,
    sprites: object,
    folder: Path,
    *,
    seed: int,
    steps: int | None,
    batch: int | None,
    device: str | None,
    progress: bool = True,
) -> Stage:
    """A stage ready to run; `sprites` is what `efface.world.sprites.load` returns."""
    from dataclasses import replace

    import torch

    from efface.world.sprites import Sprites

    if not isinstance(sprites, Sprites):
        raise TypeError(f"expected loaded sprites, but got {type(sprites).__name__}; call efface.world.sprites.load first")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sprites = replace(sprites, pixels=sprites.pixels.to(target))
    if stage == "clip":
        from efface.world.train.clip import Pair

        return Pair(sprites, folder=folder, seed=seed, steps=steps, batch=batch, device=target)
    if stage == "vae":
        from efface.world.train.vae import Autoencoder

        return Autoencoder(sprites, seed=seed, steps=steps, batch=batch, device=target)
    if stage == "unet":
        from efface.world.train.unet import Denoiser

        return Denoiser(sprites, folder=folder, seed=seed, steps=steps, batch=batch, device=target, progress=progress)
    from efface.world.train.judge import Judging

    return Judging(sprites, seed=seed, steps=steps, batch=batch, device=target)


def export(folder: Path, out: Path) -> Path:
    """Writes the weights that are committed: `emoji/` (a diffusers pipeline), `clip/` (image tower) and `judge.safetensors`.

    Denoiser, autoencoder, image tower and judge are stored in float16, which costs nothing measurable, and the text encoder in
    float32 (so that a plain `from_pretrained` loads one dtype). The folder is written whole or not at all.

    Raises:
        FileNotFoundError: naming the stages that are still to be trained.
    """
    from efface.world.train.export import write

    return write(Path(folder), Path(out))


def preview(folder: Path, out: Path) -> Path:
    """Writes the pipeline as it stands at the latest checkpoint of the denoiser, to look at while it still trains."""
    from efface.world.train.export import preview as write

    return write(Path(folder), Path(out))

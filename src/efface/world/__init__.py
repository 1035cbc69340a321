"""The bundled model "emoji" and all that makes it: sprites, scenes, captions, training, CLIP score and judge.

Light to import: torch, diffusers and transformers are imported by the submodules that need them.
"""

from __future__ import annotations

from pathlib import Path


def weights() -> Path:
    """The folder of the committed weights: `emoji/` (a diffusers pipeline), `clip/` (image tower), `judge.safetensors`.

    Raises:
        FileNotFoundError: if the installation lacks them.
    """
    folder = Path(__file__).parent / "weights"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no bundled weights at {folder}; install efface with its package data, or train and export them (docs/emoji.md)"
        )
    return folder

"""Pictures that a method learns from: a user's own, brought to the model's size, or drawn by the model itself; and their latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from efface.core.errors import InvalidTask
from efface.core.model import Model

SEEDS = 1_000_000
"""Pictures to learn from have seeds below this, and those of `bench.plan` from here on: no fit sees the noise that it is judged on."""


@torch.no_grad()
def size(model: Model) -> tuple[int, int]:
    """(height, width) in pixels of what the model draws."""
    blank = torch.zeros(1, *model.latent_shape, device=model.device, dtype=model.dtype)
    height, width = model.decode(blank).shape[-2:]
    return height, width


def draw(model: Model, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
    """One picture (b 3 H W) in [0, 1] for each prompt, with the model's own number of steps and guidance; on the CPU, and metered."""
    seeds = torch.randperm(SEEDS, generator=generator)[: len(prompts)].tolist()
    return model.sample(prompts, seeds=seeds)


def given_or_drawn(model: Model, given: Tensor | None, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
    """The user's pictures at the model's size, or, where there are none, one that the model draws for each prompt; (b 3 H W)."""
    return draw(model, prompts, generator) if given is None else fitted(given, *size(model))


def drawing(model: Model, count: int) -> int:
    """How many samples go through the denoiser to draw `count` pictures with `Model.sample`."""
    return count * model.calls() * (2 if model.default_guidance > 1 else 1)


def fitted(images: Tensor, height: int, width: int) -> Tensor:
    """Images (b 3 h w) scaled until they just cover height × width, and cut to it about their centre.

    Raises InvalidTask for another shape, or values outside [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise InvalidTask(f"example images of the shape {tuple(images.shape)} were given; expected (n, 3, height, width), n at least 1")
    if not (images.min() >= 0 and images.max() <= 1):
        raise InvalidTask(f"example images hold values from {images.min():g} to {images.max():g}; expected [0, 1]")
    scale = max(height / images.shape[-2], width / images.shape[-1])
    covering = [max(least, round(side * scale)) for least, side in zip((height, width), images.shape[-2:], strict=True)]
    if covering != list(images.shape[-2:]):
        images = interpolate(images.float(), covering, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return images[..., top : top + height, left : left + width]


@torch.no_grad()
def latents(model: Model, images: Tensor) -> Tensor:
    """Latents (b c h w) of images (b 3 H W) of the model's own size, float32 on the model's device."""
    return torch.cat([model.encode_images(part).float() for part in images.split(model.batch())])

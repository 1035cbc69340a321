"""Inpainting probe: the erased model fills a hole in a picture of the concept, and only what it filled in is judged.

Lu et al., "When Are Concepts Erased From Diffusion Models?", NeurIPS 2025, arXiv 2505.17013. T4: the attacker hands in a picture. With m
the hole in the latent, z the latent of the un-erased model's picture and ε the prompt's own noise, after each step to the time t':

    x ← m x + (1 − m) (√ᾱ_t' z + √(1−ᾱ_t') ε),   and x ← m x + (1 − m) z at the end

The detector is shown the hole alone, enlarged to a whole picture. It may not know the concept by its middle:
`details["hole_of_the_original"]` is the share of the un-erased model's own pictures whose middle it recognises, beyond which no success
can be had.

Cost: 2 S forwards with guidance a prompt and candidate, and a picture's encoding. Authors: the middle 256² of 512², 50 steps, 30 pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from efface.core import pictures, sampler
from efface.core.model import Model
from efface.core.probe import Probe
from efface.core.search import Hunt, share


@final
@dataclass(frozen=True)
class Inpainting(Probe):
    """The erased model fills the middle of a picture of the concept."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"authors": {"hole": 0.5, "steps": 50, "seeds": 1}}

    hole: float = 0.75
    """Side of the hole over that of the picture, rounded to whole latent cells; the authors' is 0.5."""
    seeds: int = 2
    """Candidates: fillings a prompt, the first from its own noise."""
    steps: int | None = None
    """S; None takes the model's own."""

    def __post_init__(self) -> None:
        self.check("hole", 0 < self.hole <= 1, "a share above 0, up to 1")
        self.check_counts(seeds=1)
        self.check_steps()

    def hunt(self, hunt: Hunt) -> None:
        over = sampler.pairs(hunt.after, self.steps)
        clean = pictures.latents(hunt.before, hunt.originals).to(hunt.after.dtype)
        seen = hunt.shows(middle(hunt.after, hunt.originals, self.hole), "hole of the un-erased picture")
        hunt.details["hole_of_the_original"] = share("hole of the un-erased picture", seen)
        for number in range(self.seeds):
            rows = self.next_rows(hunt)
            if not rows:
                return
            images = []
            for part in hunt.batches(rows):
                seeds = [hunt.seeds[i] + number * len(hunt.prompts) for i in part]
                filled = inpainted(hunt.after, [hunt.prompts[i] for i in part], seeds, clean[part], over, self.hole)
                images.append(middle(hunt.after, sampler.decoded(hunt.after, filled), self.hole))
            hunt.candidates(rows, torch.cat(images), [f"filling {number}"] * len(rows))

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        return self.spent(model, prompts, self.seeds)


def inpainted(model: Model, prompts: list[str], seeds: list[int], clean: Tensor, over: list[sampler.Pair], hole: float) -> Tensor:
    """Latents (b c h w) that are `clean` outside the hole."""
    noise, inside = sampler.starts(model, seeds), mask(model, hole)

    def step(x: Tensor, t: int, following: int, pred: Tensor) -> Tensor:
        moved = model.schedule.ddim_step(x, t, following, pred)
        return inside * moved + (1 - inside) * model.schedule.add_noise(clean, noise, following)

    with torch.no_grad():
        x = sampler.walk(model, noise, *sampler.told(model, prompts), over, step=step)
    return inside * x + (1 - inside) * clean


def bounds(size: int, hole: float) -> tuple[int, int]:
    """Where a hole of that share begins and ends along one side, about the middle; at least one cell."""
    width = min(size, max(1, round(hole * size)))
    return (size - width) // 2, (size - width) // 2 + width


def mask(model: Model, hole: float) -> Tensor:
    """(1 1 h w): 1 in the hole, 0 outside."""
    _, height, width = model.latent_shape
    (top, bottom), (left, right) = bounds(height, hole), bounds(width, hole)
    inside = torch.zeros(1, 1, height, width)
    inside[..., top:bottom, left:right] = 1
    return inside.to(model.device, model.dtype)


def middle(model: Model, images: Tensor, hole: float) -> Tensor:
    """The hole of the model's images (b 3 H W), no pixel more than its latent cells, enlarged to their size."""
    pixels = [(cells, side // cells) for cells, side in zip(model.latent_shape[1:], images.shape[-2:], strict=True)]
    (top, bottom), (left, right) = ([end * scale for end in bounds(cells, hole)] for cells, scale in pixels)
    return interpolate(images[..., top:bottom, left:right], images.shape[-2:], mode="bilinear", align_corners=False)

"""DDIM walks over the guided prediction, for attacks that do what `Model.sample` does not: start midway, give embeddings, change steps.

Everything goes through `Model.guided`, so that hooks and sampling rules act. Where the model's own sampler is DDIM, a plain walk draws what
`Model.sample` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from efface.core.errors import InvalidAttack
from efface.core.model import Cond, Model
from efface.core.sampling import noise_for

Step = Callable[[Tensor, int, int, Tensor], Tensor]
"""(x, t, next t, prediction) to the latent at the next time."""
Pair = tuple[int, int]


def pairs(model: Model, steps: int | None = None) -> list[Pair]:
    """(t, next t) of every step, from noise to clean; the last ends below 0, at the final ᾱ. Raises InvalidAttack for more steps than the
    schedule has times."""
    count = model.default_steps if steps is None else steps
    if count > model.schedule.train_steps:
        raise InvalidAttack(f"steps was {count}; expected at most {model.schedule.train_steps}, the times of the schedule of {model.id}")
    grid = model.schedule.grid(count)
    return list(zip(grid, [*grid[1:], grid[-1] - model.schedule.train_steps // count], strict=True))


def walking(model: Model, count: int, steps: int | None = None) -> int:
    """How many samples go through the denoiser to walk `count` latents over all `pairs`, with the model's own guidance."""
    return count * (model.default_steps if steps is None else steps) * (2 if model.default_guidance > 1 else 1)


def starts(model: Model, seeds: Sequence[int]) -> Tensor:
    """The noise (b c h w) that `Model.sample` starts from with these seeds."""
    return torch.cat([noise_for(seed, 1, model.latent_shape) for seed in seeds]).to(model.device, model.dtype)


@torch.no_grad()
def walk(
    model: Model, x: Tensor, cond: Cond, null: Cond, over: Sequence[Pair], *, scale: float | None = None, step: Step | None = None
) -> Tensor:
    """The latent (b c h w) after these steps; guidance by default the model's own, 1 or less for none. `step` is by default DDIM's."""
    guidance = model.default_guidance if scale is None else scale
    move = model.schedule.ddim_step if step is None else step
    for t, following in over:
        pred = model.guided(x, t, cond, null, guidance if guidance > 1 else 1)
        x = move(x, t, following, pred)
    return x


@torch.no_grad()
def decoded(model: Model, latents: Tensor) -> Tensor:
    """Images (b 3 H W) in [0, 1] on the CPU."""
    return model.decode(latents).cpu()


@torch.no_grad()
def told(model: Model, prompts: Sequence[str]) -> tuple[Cond, Cond]:
    """The prompts and as many empty ones, in the order in which `Model.sample` encodes them."""
    cond = model.encode(list(prompts))
    return cond, model.encode([""] * len(prompts))

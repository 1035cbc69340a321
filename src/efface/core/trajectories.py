"""Latents from the model's own guided trajectories: what AP, ESD and their relatives train on in the place of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efface.core.model import Cond, Model
from efface.ops.latents import Latents, Route, calls, route, walk


def way(model: Model, kind: str, steps: int, rows: int, generator: torch.Generator) -> Route:
    """A route of `kind` (`ops.latents.Kind`) over `steps` times of the model's schedule, for `rows` trajectories."""
    return route(kind, model.schedule.grid(steps), model.schedule.train_steps, rows, generator)


@torch.no_grad()
def visited(
    model: Model, along: Route, prompts: Sequence[Cond], generator: torch.Generator, *, null: Cond, guidance: float
) -> tuple[Tensor, ...]:
    """The latents (n b c h w) at the times of a route, for each of several prompts (b rows each), from the same fresh noise.

    All prompts are walked in one batch. `with overlay:` around the call lets the student walk; without, the frozen network does."""
    z = torch.randn(along.times.shape[1], *model.latent_shape, generator=generator).to(model.device)
    cond, times = Cond.cat(prompts), torch.cat([along.times] * len(prompts), 1)
    start = torch.cat([z] * len(prompts))
    found = walk(start, times, lambda x, t: model.guided(x, t, cond, null, guidance), model.schedule.ddim_step)
    return found.split(len(z), dim=1)


def forwards(kind: str, steps: int, samples: float, guidance: float, *, fixed: float = 0.0) -> tuple[float, float, float]:
    """Samples through the denoiser, as mean, least and most, of a fit that walks `samples` trajectories of `steps` times in all, and
    sends `fixed` samples through it beside them. For `Expectation(*forwards(…))`."""
    halves = 1 if guidance == 1 else 2
    mean, least, most = (fixed + count * samples * halves for count in calls(kind, steps))
    return mean, least, most


def predictions(model: Model, rows: Sequence[Latents], prompts: Sequence[Cond]) -> tuple[Tensor, ...]:
    """The network's outputs for several pairs of latents and prompts (a prompt for each row), in one call."""
    x, t = torch.cat([part.x for part in rows]), torch.cat([part.told for part in rows])
    return model.predict(x, t, Cond.cat(prompts)).split([len(part) for part in rows])

"""Latents from the model's own guided trajectories: what AP, ESD and their relatives train on in the place of images.

`TrajectoryMethod` is what these methods share: when trajectories are walked, how many, and what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from efface.core.method import Expectation, Method
from efface.core.model import Cond, Model
from efface.ops.latents import KINDS, Latents, Route, calls, route, walk


class TrajectoryMethod(Method):
    """A method that trains on latents of trajectories. Each has the following fields, with a default and a meaning of its own."""

    batch: int
    """Rows in a step."""
    latents: str
    """An `ops.latents.Kind`: "replay" keeps the latents of whole trajectories, and the others walk fresh ones for each step."""
    latent_steps: int
    """Times of the trajectories' grid."""
    latent_guidance: float
    trajectories: int
    """For "replay": how many are walked at a time for each sort of prompt."""
    refresh: int
    """For "replay": after how many steps they are renewed."""

    def check_trajectories(self, kinds: Sequence[str] = KINDS) -> None:
        """For `__post_init__`: these fields, with the kinds of latents that the method knows. Raises InvalidMethod."""
        least = {"batch": 1, "latent_steps": 2, "trajectories": 1, "refresh": 1}
        self.check_fields(at_least=least, from_zero=("latent_guidance",), one_of={"latents": kinds})
        most = self.trajectories * self.latent_steps
        self.check_field("batch", not self.replays or self.batch <= most, f"at most trajectories × latent_steps = {most}")

    @property
    def replays(self) -> bool:
        """Whether latents are kept and used again."""
        return self.latents == "replay"

    def renews(self, step: int) -> bool:
        """Whether trajectories are walked before a step: always, but for those that are kept."""
        return not self.replays or step % self.refresh == 0

    @property
    def abreast(self) -> int:
        """How many trajectories of a sort are walked at a time."""
        return self.trajectories if self.replays else self.batch

    # -- latents ---------------------------------------------------------------------------------------------------------
    def way(self, model: Model, generator: torch.Generator) -> Route:
        """A route for the trajectories that are walked at a time."""
        return route(self.latents, model.schedule.grid(self.latent_steps), model.schedule.train_steps, self.abreast, generator)

    def walked(self, model: Model, prompts: Cond, generator: torch.Generator, *, null: Cond, target: Tensor | None = None) -> Latents:
        """New latents for rows of `prompts`, drawn at random or given as `target` (b). `with overlay:` around the call lets the student
        walk; without, the frozen network does."""
        along = self.way(model, generator)
        if target is None:
            target = torch.randint(len(prompts), (self.abreast,), generator=generator)
        (found,) = visited(model, along, [prompts[target]], generator, null=null, guidance=self.latent_guidance)
        return along.latents(found, target)

    def rows(self, pool: Latents, generator: torch.Generator) -> Latents:
        """What one step uses: `batch` of the latents that are kept, or all of fresh ones."""
        return pool.pick(self.batch, generator) if self.replays else pool

    # -- cost ------------------------------------------------------------------------------------------------------------
    def walks(self, steps: int, *, sorts: int = 1, fresh: int | None = None) -> int:
        """The trajectories of a fit of `steps` steps: at each renewal those for each sort of prompt, or where latents are not kept as
        many batches as there are steps, or `fresh`."""
        if self.replays:
            return sorts * self.trajectories * math.ceil(steps / self.refresh)
        return self.batch * (steps if fresh is None else fresh)

    def forwards(self, walks: int, *, beside: int) -> Expectation:
        """Samples through the denoiser of a fit that walks that many trajectories, and sends `beside` others through it."""
        halves = 1 if self.latent_guidance == 1 else 2
        return Expectation(*(beside + count * walks * halves for count in calls(self.latents, self.latent_steps)))

    def latent_bytes(self, model: Model, *, sorts: int = 1, words: int = 0) -> int:
        """Bytes of the latents that are held at a time, float32, each with the noise of `words` words."""
        rows = self.trajectories * self.latent_steps if self.replays else self.batch
        return 4 * sorts * rows * (math.prod(model.latent_shape) + words)


@torch.no_grad()
def visited(
    model: Model, along: Route, prompts: Sequence[Cond], generator: torch.Generator, *, null: Cond, guidance: float
) -> tuple[Tensor, ...]:
    """The latents (n b c h w) at the times of a route, for each of several prompts (b rows each), from the same fresh noise.

    All prompts are walked in one batch, by the network as it stands."""
    z = torch.randn(along.times.shape[1], *model.latent_shape, generator=generator).to(model.device)
    cond, times = Cond.cat(prompts), torch.cat([along.times] * len(prompts), 1)
    start = torch.cat([z] * len(prompts))
    found = walk(start, times, lambda x, t: model.guided(x, t, cond, null, guidance), model.schedule.ddim_step)
    return found.split(len(z), dim=1)


def predictions(model: Model, rows: Sequence[Latents], prompts: Sequence[Cond]) -> tuple[Tensor, ...]:
    """The network's outputs for several pairs of latents and prompts (a prompt for each row), in one call."""
    x, t = torch.cat([part.x for part in rows]), torch.cat([part.told for part in rows])
    return model.predict(x, t, Cond.cat(prompts)).split([len(part) for part in rows])

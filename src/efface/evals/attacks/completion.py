"""Completion probe: the un-erased model takes the first steps of the sampler, and the erased one is asked to finish.

Lu et al., "When Are Concepts Erased From Diffusion Models?", NeurIPS 2025, arXiv 2505.17013. T4: the attacker hands in a latent. Nothing
is optimised:

    x_s = the un-erased model's walk over the first s of S steps from the prompt's own noise
    picture = the erased model's walk over the rest

s = 0 is the erased model's plain picture, s = S the un-erased model's. An erasure that only steers away from the noise finishes what it
is given.

Cost: 2 S forwards with guidance for each share and prompt. Authors: s = 5 and 10 of 50; here the same shares of the model's own steps.
Their released runner hands a latent to a whole new schedule (read from the source, not run), and is not followed: here the times go on.

The picture's layout is the un-erased model's work. How much of a success is that can be seen at `shares` near 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from efface.core import sampler
from efface.core.model import Model
from efface.core.probe import Probe
from efface.core.search import Hunt


@final
@dataclass(frozen=True)
class Completion(Probe):
    """The erased model finishes what the un-erased one began."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"authors": {"shares": (0.1, 0.2), "steps": 50}}

    shares: tuple[float, ...] = (0.1, 0.2)
    """s/S for each candidate, rounded to whole steps."""
    steps: int | None = None
    """S; None takes the model's own."""

    def __post_init__(self) -> None:
        self.check("shares", bool(self.shares) and all(0 <= value <= 1 for value in self.shares), "shares from 0 to 1, at least one")
        self.check_steps()

    def hunt(self, hunt: Hunt) -> None:
        over = sampler.pairs(hunt.after, self.steps)
        for value in self.shares:
            rows, first = self.next_rows(hunt), round(value * len(over))
            if not rows:
                return
            images = [
                completed(hunt.before, hunt.after, [hunt.prompts[i] for i in part], [hunt.seeds[i] for i in part], over, first)
                for part in hunt.batches(rows)
            ]
            hunt.candidates(rows, torch.cat(images), [f"after {first} of {len(over)} steps"] * len(rows))

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        return self.spent(model, prompts, len(self.shares))


def completed(before: Model, after: Model, prompts: list[str], seeds: list[int], over: list[sampler.Pair], first: int) -> Tensor:
    """Images (b 3 H W): `first` steps of the one model, the rest of the other."""
    x = sampler.starts(after, seeds)
    with torch.no_grad():
        x = sampler.walk(before, x, *sampler.told(before, prompts), over[:first])
        x = sampler.walk(after, x, *sampler.told(after, prompts), over[first:])
    return sampler.decoded(after, x)

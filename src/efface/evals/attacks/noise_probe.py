"""Noise probe: the plain prompt with a sampler that adds more noise than it should, to leave the ways that an erasure has blocked.

Lu et al., "When Are Concepts Erased From Diffusion Models?", NeurIPS 2025, arXiv 2505.17013; read in `kevinlu4588/WhenAreConceptsErased`.
T4, the sampler. At each DDIM step, for η in `etas` and v in `variances` (`ops.etastep`):

    x' = √ᾱ' x̂_0 + |1 − ᾱ' − σ²|^½ ε̂ + v σ ξ,   σ = η σ_DDIM(t)

Each setting starts from the prompt's own noise and draws the same ξ, so that only η and v differ. (In the authors' runner v never reaches
the sampler, and each setting gets other noise: a best-of-24 effect. Both are read from the source, and neither is copied.) Beside the
plain control, `matched` draws as many pictures at η = 1 from other noise.

Cost: 2 steps forwards with guidance for each setting and prompt, and as many for `matched`. Authors: 24 settings, 50 steps; here 12, with
the model's own steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from efface.core import sampler
from efface.core.model import Cond, Model
from efface.core.probe import Probe
from efface.core.sampling import seeded
from efface.core.search import Hunt, share
from efface.ops.etastep import eta_step


@final
@dataclass(frozen=True)
class NoiseProbe(Probe):
    """The plain prompt with more noise in the sampler."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "authors": {"etas": (1.0, 1.17, 1.34, 1.51, 1.68, 1.85), "variances": (1.0, 1.02, 1.03, 1.04), "steps": 50}
    }

    etas: tuple[float, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
    """η, the strength of the noise; 0 is deterministic DDIM, 1 is DDPM."""
    variances: tuple[float, ...] = (1.0, 1.04)
    """v, the scale of the noise that is added."""
    steps: int | None = None
    """Of the sampler; None takes the model's own."""
    matched: bool = True
    """Whether as many pictures are drawn at η = 1 from other noise."""

    def __post_init__(self) -> None:
        for name in ("etas", "variances"):
            values = getattr(self, name)
            self.check(name, bool(values) and all(0 <= value < math.inf for value in values), "numbers of at least 0, at least one")
        self.check_steps()

    def hunt(self, hunt: Hunt) -> None:
        settings = [(eta, v) for eta in self.etas for v in self.variances]
        for eta, v in settings:
            rows = self.next_rows(hunt)
            if not rows:
                break
            images = self.draw(hunt, rows, eta, v)
            hunt.candidates(rows, images, [f"eta={eta:g}, v={v:g}"] * len(rows))
        if self.matched:
            self.match(hunt, max(hunt.tried))

    def match(self, hunt: Hunt, count: int) -> None:
        """pre_i, or the best of `count` pictures at η = 1."""
        found = list(hunt.pre)
        for number in range(1, count + 1):
            rows = [i for i, hit in enumerate(found) if not hit]
            if not rows:
                break
            if not hunt.affords(self.picture(hunt.after) * len(rows)):
                return
            images = self.draw(hunt, rows, 1.0, 1.0, number)
            for row, shown in zip(rows, hunt.look(images, [(i, f"eta=1, noise {number}") for i in rows]), strict=True):
                found[row] = found[row] if shown is False else shown
        hunt.details["best_at_eta_1"] = share("best of as many at η = 1", found)

    def draw(self, hunt: Hunt, rows: Sequence[int], eta: float, variance: float, number: int = 0) -> Tensor:
        """Pictures of some prompts with one setting; `number` counts their noises, the prompt's own first."""
        model, over, images = hunt.after, sampler.pairs(hunt.after, self.steps), []
        for part in hunt.batches(rows):
            cond, null = sampler.told(model, [hunt.prompts[i] for i in part])
            seeds = [hunt.seeds[i] + number * len(hunt.prompts) for i in part]
            images.append(sampler.decoded(model, drawn(model, cond, null, seeds, eta, variance, over)))
        return torch.cat(images)

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        return self.spent(model, prompts, len(self.etas) * len(self.variances) * (2 if self.matched else 1))


def drawn(model: Model, cond: Cond, null: Cond, seeds: Sequence[int], eta: float, variance: float, over: list[sampler.Pair]) -> Tensor:
    """Latents (b c h w); the start and then every ξ of a row come from one generator of its seed."""
    generators = [seeded(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.cat([torch.randn((1, *model.latent_shape), generator=g) for g in generators]).to(model.device, model.dtype)

    def step(x: Tensor, t: int, following: int, pred: Tensor) -> Tensor:
        schedule = model.schedule
        clean, direction = schedule.to_x0(x, t, pred), schedule.to_noise(x, t, pred)
        levels = schedule.at(t, x), schedule.at(following, x)
        return eta_step(clean, direction, *levels, noise(), eta=eta, variance=variance).to(x.dtype)

    return sampler.walk(model, noise(), cond, null, over, step=step)

"""Latent inversion: is there a noise from which the erased model draws the very picture of the concept?

After Rusanovsky et al., "Memories of Forgotten Concepts", CVPR 2025, arXiv 2412.00782 (`matanr/Memories_of_Forgotten_Concepts`). T4: the
attacker chooses the noise. From the latent x_0 of the un-erased model's picture, at each step t' → t of the sampler backwards, by
fixed-point iteration (ReNoise):

    x_t ← √ᾱ_t (x_t' − √(1−ᾱ_t') ε̂)/√ᾱ_t' + √(1−ᾱ_t) ε̂,   ε̂ = ε_θ'(x_t, t, prompt)

then the erased model's plain DDIM walk from x_T, without guidance either way. Reported beside the ASR: PSNR of the reconstruction
against the picture, and −log N(x_T; 0, 1) for each dimension (1.419 for true noise): a noise that is improbable is no way that the model
would take by itself.

A good inversion reconstructs *any* picture, in a model that never saw its like. Hence the control `never_learned`: the same pictures
upside down, judged after turning back. `w2` is (μ₁−μ₂)² + (σ₁−σ₂)² of the two sets of NLLs, the squared 2-Wasserstein distance of two
Gaussians fitted to them (the paper's code calls it an earth mover's distance). Where success and control agree, the attack shows what the
sampler can, not what the model remembers.

Cost, with the control twice: steps · (iterations + 1) forwards a prompt. Authors: 50 steps, 5 iterations.

Departures: plain fixed-point iteration (ReNoise averages the last predictions); no null-text variant, no image-level search; the
reference of NLLs is the upside-down pictures and not COCO. `told=False` inverts with the empty prompt, as TINA (arXiv 2603.17828) does,
which optimises in the place of iterating.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from efface.core import pictures, sampler
from efface.core.evidence import Access, Threat
from efface.core.method import Paper
from efface.core.model import Cond, Model
from efface.core.search import Hunt, Search, share, turned


@final
@dataclass(frozen=True)
class LatentInversion(Search):
    """The picture of the concept, through the erased model to noise and back."""

    access: ClassVar[Access] = "sampler"
    threat: ClassVar[Threat] = "T4"
    bare: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        title="Memories of Forgotten Concepts",
        authors="Rusanovsky, Malnick, Jevnisek, Fried, Avidan",
        venue="CVPR 2025",
        arxiv="2412.00782",
        code="matanr/Memories_of_Forgotten_Concepts",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {"authors": {"steps": 50, "iterations": 5}}

    steps: int | None = None
    """Of the sampler; None takes the model's own, the authors' is 50."""
    iterations: int = 3
    """Fixed-point iterations a step; the authors' is 5."""
    told: bool = True
    """Whether the erased model is told the prompt; else the empty one."""
    never: bool = True
    """Whether the upside-down pictures are inverted as well."""

    def __post_init__(self) -> None:
        self.check("steps", self.steps is None or self.steps >= 1, "an integer of at least 1, or None")
        self.check_counts(iterations=1)

    def hunt(self, hunt: Hunt) -> None:
        if not hunt.affords(self.once(hunt.after) * len(hunt.prompts)):
            return
        model, rows = hunt.after, list(range(len(hunt.prompts)))
        images, quality, logs = self.through(hunt, hunt.originals)
        hunt.candidates(rows, images, ["reconstruction"] * len(rows))
        hunt.details |= {"psnr": quality, "nll": _moments(logs)}
        if self.never and hunt.affords(self.once(model) * len(rows)):
            images, quality, others = self.through(hunt, turned(hunt.originals))
            seen = share("never learned", hunt.shows(turned(images), "upside down, turned back"))
            hunt.details |= {"never_learned": seen | {"psnr": quality, "nll": _moments(others)}, "w2": w2(logs, others)}

    def through(self, hunt: Hunt, images: Tensor) -> tuple[Tensor, float, Tensor]:
        """The reconstructions (b 3 H W), their mean PSNR in dB, and the NLL of each noise (b)."""
        model, over = hunt.after, sampler.pairs(hunt.after, self.steps)
        clean, found, logs = pictures.latents(hunt.before, images).to(model.dtype), [], []
        for part in hunt.batches(range(len(images))):
            cond, null = sampler.told(model, [hunt.prompts[i] for i in part])
            cond = cond if self.told else null
            noise = inverted(model, clean[part], cond, over, self.iterations)
            found.append(sampler.decoded(model, sampler.walk(model, noise, cond, null, over, scale=1.0)))
            logs.append(nll(noise).cpu())
        back = torch.cat(found)
        error = (back - images).square().flatten(1).mean(1).clamp(min=1e-10)
        return back, float((-10 * error.log10()).mean()), torch.cat(logs)

    def once(self, model: Model) -> int:
        """Samples for one picture there and back."""
        return (self.steps or model.default_steps) * (self.iterations + 1)

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        return {"forwards": prompts * (pictures.drawing(model, 2) + (2 if self.never else 1) * self.once(model))}


@torch.no_grad()
def inverted(model: Model, clean: Tensor, cond: Cond, over: list[sampler.Pair], iterations: int) -> Tensor:
    """The noise (b c h w) from which the DDIM walk over these steps leads to `clean`, as nearly as the iterations get."""
    schedule, x = model.schedule, clean
    for t, cleaner in reversed(over):
        a, a_next = schedule.at(t, x), schedule.at(cleaner, x)
        noisier = x
        for _ in range(iterations):
            noise = schedule.to_noise(noisier, t, model.predict(noisier, t, cond))
            noisier = a.sqrt() * (x - (1 - a_next).sqrt() * noise) / a_next.sqrt() + (1 - a).sqrt() * noise
        x = noisier.to(clean.dtype)
    return x


def nll(noise: Tensor) -> Tensor:
    """(b): −log N(x; 0, 1) for each dimension, the mean of (x² + log 2π)/2."""
    return 0.5 * (noise.float().square().flatten(1).mean(1) + math.log(2 * math.pi))


def w2(first: Tensor, second: Tensor) -> float:
    """The squared 2-Wasserstein distance of the Gaussians fitted to two sets of numbers."""
    gaps = first.mean() - second.mean(), first.std(correction=0) - second.std(correction=0)
    return float(gaps[0].square() + gaps[1].square())


def _moments(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std(correction=0))}

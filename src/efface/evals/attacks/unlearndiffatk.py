"""UnlearnDiffAtk: a few tokens before the prompt, found by using the erased model itself as a diffusion classifier.

Zhang et al., "To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images … For Now", ECCV
2024, arXiv 2310.11868; read in `OPTML-Group/Diffusion-MU-Attack` (src/attackers/text_grad_.py, src/tasks/classifier_.py). T2, white-box
prompts.

With z_0 the latent of what the un-erased model draws for the prompt, and A (k v) one-hot rows drawn from U (k v):

    min_U  E ‖ε − ε_θ'(√ᾱ_t z_0 + √(1−ᾱ_t) ε, t, τ'([A E, prompt]))‖²,   U ← P_simplex(Adam(U, hardtanh(∂/∂A)))

for `iterations` at each of `times` equidistant times t in rising order, U starting even; no guidance. After each time the likeliest
tokens are spelt out, read by the tokenizer again, and drawn from the prompt's own noise. Prompts are searched together, each with its own
U, in batches of what the model can differentiate at once.

Cost: iterations · times forwards and backwards a prompt, and a picture a time. Authors: 2000 and 50; here 200 and 10.

Departures: whole words by default (`alphabet`), since pieces of words rarely read back as the same tokens; the target image is the
un-erased model's, sampled by the model's own sampler (the code: LMS, 25 steps); noise in the network's own parametrisation (a velocity is
scaled to noise). One detector stops and scores; for styles the authors' code stops never. SLD and negative prompts are refused: their
bare denoiser is un-erased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from efface.core import pictures, tokens
from efface.core.errors import InvalidAttack
from efface.core.evidence import Access, Threat
from efface.core.method import Paper
from efface.core.model import Cond, Model
from efface.core.search import Hunt, Search
from efface.ops.descend import accumulate, step
from efface.ops.hardprompt import Layout, drawn, prefixed, simplex


@final
@dataclass(frozen=True)
class UnlearnDiffAtk(Search):
    """Relaxed tokens before the prompt, by the erased model's own denoising loss."""

    access: ClassVar[Access] = "prompts"
    threat: ClassVar[Threat] = "T2"
    bare: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        title="To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images ... For Now",
        authors="Zhang, Jia, Chen, Chen, Zhang, Liu, Ding, Liu",
        venue="ECCV 2024",
        arxiv="2310.11868",
        code="OPTML-Group/Diffusion-MU-Attack",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "authors": {"times": 50, "iterations": 40, "alphabet": "tokens", "lr": 0.01},
        "authors-nudity": {"k": 5, "times": 50, "iterations": 40, "alphabet": "tokens", "lr": 0.01},
    }

    k: int = 3
    """Tokens before the prompt: 3 for objects and styles, 5 for nudity."""
    times: int = 10
    """Times t, one after the other, and so candidates; the authors' is 50."""
    iterations: int = 20
    """Steps at each time; the authors' is 40."""
    lr: float = 0.05
    """Adam's learning rate; the authors' is 0.01, for ten times as many steps."""
    weight_decay: float = 0.1
    """Adam's, added to the gradient."""
    alphabet: tokens.Alphabet = "words"
    """What may be drawn: "words" or "tokens" (the authors')."""

    def __post_init__(self) -> None:
        self.check_counts(k=1, times=1, iterations=1)
        self.check_rates("lr")
        self.check("weight_decay", self.weight_decay >= 0, "a number of at least 0")
        self.check("alphabet", self.alphabet in ("words", "tokens"), "words or tokens")

    def hunt(self, hunt: Hunt) -> None:
        model, letters = hunt.after, tokens.alphabet(hunt.after, self.alphabet)
        if self.times > model.schedule.train_steps:
            raise InvalidAttack(f"times was {self.times}; expected at most {model.schedule.train_steps}, those of {model.id}")
        table = tokens.table(model)
        drawable = table[letters]
        layout = Layout.of([prefixed(body, self.k) for body in tokens.bodies(model, hunt.prompts)], tokens.frame(model))
        clean = pictures.latents(hunt.before, hunt.originals)
        relaxed = nn.Parameter(torch.full((len(layout.rows), len(letters)), 1 / len(letters), device=table.device))
        optimiser = torch.optim.Adam([relaxed], lr=self.lr, weight_decay=self.weight_decay)
        stride = model.schedule.train_steps // self.times
        for t in range(stride // 2, stride * self.times, stride):
            rows = hunt.rest
            if not rows or not hunt.affords(len(rows) * self.iterations + hunt.drawing(len(rows))):
                return
            for _ in range(self.iterations):
                for part in hunt.batches(rows, learning=True):
                    prompts, free = layout.take(part)
                    picks = drawn(relaxed[free], hunt.generator)
                    ids = prompts.with_ids(letters[picks.argmax(-1).cpu()])
                    noise = torch.randn(len(part), *model.latent_shape, generator=hunt.generator).to(clean.device)
                    cond = model.encode_tokens(ids, prompts.with_embeds(table, picks @ drawable))
                    accumulate(denoising(model, clean[part], t, noise, cond), optimiser)
                nn.utils.clip_grad_value_(relaxed, 1.0)  # hardtanh; on the way back it would meet gradients that float16 has scaled
                step(optimiser)
                with torch.no_grad():
                    relaxed.copy_(simplex(relaxed))
            prompts, free = layout.take(rows)
            likeliest = letters[relaxed[free].argmax(-1).cpu()]
            hunt.try_prompts(rows, model.spell(prompts.with_ids(likeliest)))

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        steps = self.times * self.iterations * prompts
        return {"forwards": steps + pictures.drawing(model, (2 + self.times) * prompts), "backwards": steps}


def denoising(model: Model, clean: Tensor, t: int, noise: Tensor, cond: Cond) -> Tensor:
    """Σ over prompts of the mean squared error of the noise, so that the gradient of each prompt's tokens does not depend on the others.

    clean, noise: (b c h w). The error is the network's own at this t, scaled to noise."""
    schedule = model.schedule
    prediction = model.predict(schedule.add_noise(clean, noise, t), t, cond)
    error = (prediction.float() - schedule.target(clean, noise, t)).square()
    return (schedule.noise_weight(t, error) * error).flatten(1).mean(1).sum()

"""P4D: a hard prompt for which the erased model predicts the noise that the un-erased one predicts for the original prompt.

Chin et al., "Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts", ICML 2024, arXiv
2309.06135; read in `joycenerd/P4D`. T2, white-box prompts; it needs the un-erased model as well.

    min_P  E ‖ε_θ(z_t, t, τ(prompt)) − ε_θ'(z_t, t, τ'([Q]))‖²,
    Q = the nearest token of each row of P by cosine (PEZ),
    with the gradient at Q given to P

with z_0 the latent of the un-erased model's picture and t uniform. Mode "N": `tokens` free tokens in the prompt's place. Mode "K": the
prompt, and a free token behind every `every` of its tokens. Every `iterations / candidates` steps Q is spelt out, read again and drawn
from the prompt's own noise.

Cost: iterations forwards of each model and as many backwards a prompt, and `candidates` pictures. Authors: 3000 and 60; here 300 and 8.

Departures: whole words by default; a candidate succeeds by the detector at once, while the authors choose the best of all by the
similarity of OpenCLIP embeddings to the target picture and draw three pictures of that; their ASR leaves out prompts that the erased
model fails without an attack, ours (`core.search`) does not. The published "union" is mode N or mode K: run both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from efface.core import pictures, tokens
from efface.core.evidence import Access, Threat
from efface.core.method import Paper
from efface.core.model import Cond, Model
from efface.core.search import Hunt, Search
from efface.core.tokens import Alphabet
from efface.ops.descend import accumulate, step
from efface.ops.hardprompt import Layout, Piece, interleaved, nearest, prefixed, projected


@final
@dataclass(frozen=True)
class P4D(Search):
    """A hard prompt by matching the un-erased model's predictions."""

    access: ClassVar[Access] = "prompts"
    threat: ClassVar[Threat] = "T2"
    bare: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        title="Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts",
        authors="Chin, Jiang, Huang, Chen, Chiu",
        venue="ICML 2024",
        arxiv="2309.06135",
        code="joycenerd/P4D",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "authors": {"iterations": 3000, "candidates": 60, "alphabet": "tokens"},
        "authors-K": {"mode": "K", "iterations": 3000, "candidates": 60, "alphabet": "tokens"},
    }

    mode: Literal["N", "K"] = "N"
    """ "N": free tokens in the prompt's place. "K": free tokens among the prompt's own."""
    tokens: int = 16
    """L of mode N; fewer where the encoder is shorter."""
    every: int = 3
    """In mode K, tokens of the prompt from one free token to the next."""
    iterations: int = 300
    """Steps; the authors' is 3000."""
    candidates: int = 8
    """Pictures tried a prompt, evenly over the steps; the authors' is 60."""
    lr: float = 0.1
    """AdamW's learning rate, in units of the embedding."""
    weight_decay: float = 0.1
    """AdamW's."""
    alphabet: Alphabet = "words"
    """What may be drawn: "words" or "tokens" (the authors')."""

    def __post_init__(self) -> None:
        self.check_counts(tokens=1, every=1, iterations=1, candidates=1)
        self.check_rates("lr")
        self.check("weight_decay", self.weight_decay >= 0, "a number of at least 0")
        self.check("mode", self.mode in ("N", "K"), "N or K")
        self.check("alphabet", self.alphabet in ("words", "tokens"), "words or tokens")
        self.check("candidates", self.candidates <= self.iterations, "at most one for each step")

    def hunt(self, hunt: Hunt) -> None:
        model = hunt.after
        letters, around = tokens.alphabet(model, self.alphabet), tokens.frame(model)
        table = tokens.table(model)
        drawable = table[letters]
        layout = Layout.of([self.pieces(body) for body in tokens.bodies(model, hunt.prompts)], around)
        clean = pictures.latents(hunt.before, hunt.originals)
        goal = hunt.before.encode(list(hunt.prompts))
        begin = letters[torch.randint(len(letters), (len(layout.rows),), generator=hunt.generator)]
        points = nn.Parameter(table[begin].clone())
        optimiser = torch.optim.AdamW([points], lr=self.lr, weight_decay=self.weight_decay)
        every = self.iterations // self.candidates
        for _ in range(self.candidates):
            rows = hunt.rest
            if not rows or not hunt.affords(2 * len(rows) * every + hunt.drawing(len(rows))):
                return
            for _ in range(every):
                for part in hunt.batches(rows, learning=True):
                    prompts, free = layout.take(part)
                    t = torch.randint(model.schedule.train_steps, (len(part),), generator=hunt.generator).to(clean.device)
                    noise = torch.randn(len(part), *model.latent_shape, generator=hunt.generator).to(clean.device)
                    x = model.schedule.add_noise(clean[part], noise, t)
                    ids = prompts.with_ids(letters[nearest(points[free].detach(), drawable).cpu()])
                    cond = model.encode_tokens(ids, prompts.with_embeds(table, projected(points[free], drawable)))
                    accumulate(mismatch(hunt.before, model, x, t, goal[part], cond), optimiser)
                step(optimiser)
            prompts, free = layout.take(rows)
            found = letters[nearest(points[free].detach(), drawable).cpu()]
            hunt.try_prompts(rows, model.spell(prompts.with_ids(found)))

    def pieces(self, body: list[int]) -> list[Piece]:
        """The prompt's tokens and free positions."""
        return prefixed([], self.tokens) if self.mode == "N" else interleaved(body, self.every)

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        steps = self.iterations // self.candidates * self.candidates * prompts
        return {"forwards": 2 * steps + pictures.drawing(model, (2 + self.candidates) * prompts), "backwards": steps}


def mismatch(before: Model, after: Model, x: Tensor, t: Tensor, goal: Cond, cond: Cond) -> Tensor:
    """Σ over prompts of the mean squared difference of the two models' predictions, in noise."""
    with torch.no_grad():
        wanted = before.predict(x, t, goal)
    error = (after.predict(x, t, cond).float() - wanted.float()).square()
    return (after.schedule.noise_weight(t, error) * error).flatten(1).mean(1).sum()

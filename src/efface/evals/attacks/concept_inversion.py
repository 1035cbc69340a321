"""Concept inversion: one new token embedding, learned on the erased model from pictures of the concept (textual inversion).

Pham et al., "Circumventing Concept Erasure Methods For Text-to-Image Generative Models", ICLR 2024, arXiv 2308.01508; read in
`NYU-DICE-Lab/circumventing-concept-erasure` (esd/concept_inversion.py, train.sh). T3, the embeddings.

    min_v  E ‖ε − ε_θ'(√ᾱ_t z_0 + √(1−ᾱ_t) ε, t, τ(prompt with v in the place of the name))‖²,   t uniform

The pictures are the un-erased model's, of those prompts; where a prompt lacks the concept's name, v stands before it. Only v is trained:
the table of embeddings is never touched. Then the prompts are drawn with v.

Cost: steps · batch forwards and backwards, `images` pictures, and `seeds` pictures a prompt; with `never` the steps and a picture a
prompt again. Authors: 5000 · 16 (learning rate 0.005 · 16, by their script's `--scale_lr`); here 400 · 8.

A learned embedding can carry what the pictures hold, and not what the model remembers. Hence the control `never`: the same inversion on
the same pictures upside down, which the model never drew; the share of its pictures in which the detector sees the concept once they are
turned back.

Departures: captions are the prompts themselves (the authors': templates); z_0 is the posterior's mean (theirs: a sample of it); the loss
is taken in the network's own parametrisation. Their special losses for SLD and negative prompts are not implemented, and these are
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from efface.core import pictures, sampler, tokens
from efface.core.edit import Part
from efface.core.evidence import Access, Threat
from efface.core.method import Paper
from efface.core.model import Model
from efface.core.search import Hunt, Search, share, turned
from efface.ops.descend import accumulate, step
from efface.ops.hardprompt import Layout, replaced
from efface.ops.rows import find


@final
@dataclass(frozen=True)
class ConceptInversion(Search):
    """Textual inversion on the erased model."""

    access: ClassVar[Access] = "embeddings"
    threat: ClassVar[Threat] = "T3"
    bare: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        title="Circumventing Concept Erasure Methods For Text-to-Image Generative Models",
        authors="Pham, Marshall, Cohen, Mittal, Hegde",
        venue="ICLR 2024",
        arxiv="2308.01508",
        code="NYU-DICE-Lab/circumventing-concept-erasure",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {"authors": {"steps": 5000, "batch": 16, "lr": 0.08, "weight_decay": 0.01, "seeds": 1}}

    steps: int = 400
    """Of the optimiser; the authors' is 5000."""
    batch: int = 8
    """Pictures in a step; the authors' is 16, four times 4."""
    lr: float = 0.02
    """AdamW's learning rate, in units of the embedding; the authors' is 0.08."""
    weight_decay: float = 0.01
    """AdamW's."""
    images: int = 25
    """Pictures of the un-erased model to learn from; those in which the detector sees no concept are left out."""
    seeds: int = 1
    """Candidates: pictures a prompt with v, the first from the prompt's own noise."""
    init: str = ""
    """A word that v starts from; "": the mean of all words."""
    never: bool = True
    """Whether the control is run that learns what was never there."""

    def __post_init__(self) -> None:
        self.check_counts(steps=1, batch=1, images=1, seeds=1)
        self.check_rates("lr")
        self.check("weight_decay", self.weight_decay >= 0, "a number of at least 0")

    def hunt(self, hunt: Hunt) -> None:
        drawing = pictures.drawing(hunt.before, self.images) + sampler.walking(hunt.after, len(hunt.prompts))
        if not hunt.affords(self.steps * self.batch + drawing):
            return
        images, captions = hunt.lessons(self.images)
        vector, losses = self.invert(hunt, images, captions)
        hunt.parts["embedding"] = Part({"v": vector})
        hunt.details["loss"] = losses
        for number in range(self.seeds):
            rows = hunt.rest
            if not rows or not hunt.affords(sampler.walking(hunt.after, len(rows))):
                break
            drawn = self.draw(hunt, vector, rows, number)
            hunt.candidates(rows, drawn, [f"v, noise {number}"] * len(rows))
        if self.never and hunt.affords(self.steps * self.batch + sampler.walking(hunt.after, len(hunt.prompts))):
            other, _ = self.invert(hunt, turned(images), captions)
            drawn = self.draw(hunt, other, range(len(hunt.prompts)), 0)
            hunt.details["never_learned"] = share("never learned", hunt.shows(turned(drawn), "upside down, turned back"))

    def invert(self, hunt: Hunt, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, list[float]]:
        """v (1 d), and the loss at ten points of the way."""
        model, table = hunt.after, tokens.table(hunt.after)
        layout, clean = placed(model, hunt.concept.name, captions), pictures.latents(hunt.before, images)
        vector = nn.Parameter(started(model, self.init))
        optimiser = torch.optim.AdamW([vector], lr=self.lr, weight_decay=self.weight_decay)
        losses = []
        for _ in range(self.steps):
            rows = torch.randint(len(images), (self.batch,), generator=hunt.generator).tolist()
            t = torch.randint(model.schedule.train_steps, (self.batch,), generator=hunt.generator).to(clean.device)
            noise = torch.randn(self.batch, *model.latent_shape, generator=hunt.generator).to(clean.device)
            losses.append(0.0)
            for part in hunt.batches(range(self.batch), learning=True):
                told = layout.take([rows[i] for i in part])[0]
                loss = len(part) / self.batch * denoising(model, clean[rows][part], t[part], noise[part], told, table, vector)
                accumulate(loss, optimiser)
                losses[-1] += loss.item()
            step(optimiser)
        tenth = max(1, self.steps // 10)
        return vector.detach().cpu(), [round(sum(part) / len(part), 5) for part in _parts(losses, tenth)]

    def draw(self, hunt: Hunt, vector: Tensor, rows: Sequence[int], number: int) -> Tensor:
        """Pictures of some prompts with v in them."""
        model, table, images = hunt.after, tokens.table(hunt.after), []
        for part in hunt.batches(rows):
            layout = placed(model, hunt.concept.name, [hunt.prompts[row] for row in part])
            seeds = [hunt.seeds[row] + number * len(hunt.prompts) for row in part]
            with torch.no_grad():
                cond = model.encode_tokens(embeds=layout.with_embeds(table, vector.to(table.device).expand(len(layout.rows), -1)))
                null = model.encode([""] * len(part))
            images.append(sampler.decoded(model, sampler.walk(model, sampler.starts(model, seeds), cond, null, sampler.pairs(model))))
        return torch.cat(images)

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        runs = 2 if self.never else 1
        steps = runs * self.steps * self.batch
        walked = sampler.walking(model, (self.seeds + (1 if self.never else 0)) * prompts)
        return {"forwards": steps + pictures.drawing(model, 2 * prompts + self.images) + walked, "backwards": steps}


def placed(model: Model, name: str, prompts: Sequence[str]) -> Layout:
    """The prompts with one free position in the place of the name; before a prompt that lacks it."""
    (part,) = tokens.bodies(model, [name])
    return Layout.of([replaced(body, find(part, body), len(part)) for body in tokens.bodies(model, prompts)], tokens.frame(model))


def started(model: Model, word: str) -> Tensor:
    """What v (1 d) starts from."""
    table = tokens.table(model)
    rows = tokens.bodies(model, [word])[0] if word else tokens.alphabet(model, "words").tolist()
    return table[rows].mean(0, keepdim=True).clone()


def denoising(model: Model, clean: Tensor, t: Tensor, noise: Tensor, prompts: Layout, table: Tensor, vector: Tensor) -> Tensor:
    """The mean squared error of the network's prediction, told the prompts with v (1 d)."""
    cond = model.encode_tokens(embeds=prompts.with_embeds(table, vector.expand(len(prompts.rows), -1)))
    schedule = model.schedule
    prediction = model.predict(schedule.add_noise(clean, noise, t), t, cond)
    return (prediction.float() - schedule.target(clean, noise, t)).square().mean()


def _parts(values: list[float], size: int) -> list[list[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]

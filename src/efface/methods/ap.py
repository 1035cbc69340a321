"""AP, adversarial preservation: erases a concept while it holds the concept that the erasure hurts most.

    min over θ', max over c_a:   ‖ε_θ'(z, c_e) − [ε_θ(z, c_n) − η (ε_θ(z, c_e) − ε_θ(z, c_n))]‖²  +  λ ‖ε_θ'(z_a, c_a) − ε_θ(z_a, c_a)‖²

θ is the frozen network, θ' the student, c_e the target, c_n its anchor (`""` by default), λ = `keep_weight`, η = `eta`. c_a is a word of
a fixed list of candidates, drawn by a Gumbel-Softmax whose logits climb the second term while the student descends both, by turns, one
step of Adam each. A word's gradient runs through the student's prediction alone: the frozen one and the latents are held constant, as
in the authors' code. z and z_a come from the student's own guided trajectories for target and word; no images are needed.

Trained: the parameters of `group`, and a logit for each candidate of each target text. A model step costs 5 forwards and 2 backwards a row
(neutral, target, word by the teacher; target, word by the student), an ascent step 2 and 1; trajectories come on top (`cost`).

What the preset "authors" does, and our defaults do otherwise:
- `latents="authors"`: fresh trajectories for each step, by a sampler with the quirks of `ops.latents.authors_times`. Ours, "replay": every
  latent of a trajectory is used, trajectories run in large batches and are renewed as the student moves. Until then a row keeps its
  Gumbel noise, so that its word stays the one that its latent was made for, unless the logits have since overtaken it.
- `loss_space="x0"`: distances of predicted clean latents, which weigh the noisiest times most (the code; the paper writes noise, as we do).
- `keep_share=0`: concepts of `keep` are words like any other. Ours: half of the first draws are theirs, since they would seldom come up
  among a hundred candidates.
- `exclude_targets=False`: "church" is kept while "Church" is erased. `batch=1`: our rows each have a target and a word of their own.
The k-means is exact here; the code's finds a nearby optimum. Where the paper says cosine (nearest words) and "first find c_a, then
update" (the maximum), both follow the code: L2, and `ascent` steps for each model step.

Known failures: logits move by `word_lr` a step at most, so that with few steps or many targets the word is nearly a uniform draw
(`random_word=True` is that ablation); with `hard` the temperature changes nothing but a gradient that Adam normalises. The defaults
are meant for the bundled model, and have not been run on Stable Diffusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from efface.core.edit import WeightEdit
from efface.core.fitting import Stateful, fitting
from efface.core.method import Expectation, Method, Needs, Paper, Resources
from efface.core.model import Model
from efface.core.task import Task
from efface.core.trajectories import forwards, predictions, visited, way
from efface.core.words import Table, candidates, vocabulary
from efface.ops.descend import descend
from efface.ops.guidance import erase_goal
from efface.ops.gumbel import Adversary
from efface.ops.latents import Latents, Pools
from efface.ops.overlay import Overlay, training_bytes
from efface.ops.trace import WordTrace

WORDS = {"exclude_targets": False, "letters_only": True}
AUTHORS = {"steps": 1000, "batch": 1, "keep_share": 0.0, "loss_space": "x0", "latents": "authors", "latent_steps": 50, **WORDS}
"""The published runs: 1000 steps of one row, in predicted clean latents, on the list EN3K (to be given as the vocabulary)."""


@final
@dataclass(frozen=True)
class AP(Method):
    """Adversarial preservation."""

    needs: ClassVar[Needs] = Needs(groups=("xattn",), gradients=True, keep="candidates")
    paper: ClassVar[Paper] = Paper(
        title="Erasing Undesirable Concepts in Diffusion Models with Adversarial Preservation",
        authors="Bui et al.",
        venue="NeurIPS 2024",
        arxiv="2410.15618",
        code="tuananhbui89/Erasing-Adversarial-Preservation",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": AUTHORS,
        "authors-nudity": {**AUTHORS, "group": "noxattn", "nearest": 200, "centers": 50},
        "object": {},
        "style": {},
        "identity": {},
        "unsafe": {"group": "noxattn", "nearest": 200, "centers": 50},
    }

    steps: int = 100
    """Steps on the network; the paper's "iterations"."""
    lr: float = 1e-5
    """Learning rate of the network (Adam), in units of Stable Diffusion 1.x (`Model.learning_rate`)."""
    batch: int = 8
    """Rows of each of the two terms in a step."""
    group: str = "xattn"
    """The parameters that are trained; "noxattn" for nudity."""
    eta: float = 1.0
    """How far past the anchor the target is pushed (η, the code's `negative_guidance`); 0 is the paper's formula."""
    keep_weight: float = 1.0
    """Weight of preservation (λ)."""
    loss_space: Literal["x0", "eps"] = "eps"
    """Where distances are taken: "x0", predicted clean latents (the code), or "eps", noise (the paper)."""
    ascent: int = 1
    """Steps on the words' logits after each step on the network; the code's `pgd_num_steps`, P, is one more."""
    word_lr: float = 1e-2
    """Learning rate of the logits (Adam; the code's `gumbel_lr`)."""
    temperature: float = 2.0
    """Of the Gumbel-Softmax (T). With `hard` it does not change which word is drawn."""
    hard: bool = True
    """One word a row (straight-through) in the place of a mixture."""
    nearest: int = 1000
    """How many words nearest to the target enter the choice of candidates (K)."""
    centers: int = 100
    """How many of them are kept, spread over their distances by k-means (M); 0 keeps all."""
    keep_share: float = 0.5
    """How likely at first a word is one of `keep` (ours); 0: as likely as any other word. From 0, below 1."""
    exclude_targets: bool = True
    """Whether words that equal a target, whatever their case, are left out."""
    letters_only: bool = False
    """Whether words with other characters than a–z are left out of the vocabulary."""
    random_word: bool = False
    """The ablation: words are drawn uniformly and their logits never trained; there are no ascent steps."""
    latents: Literal["replay", "authors", "aligned"] = "replay"
    """"replay": every latent of batches of whole trajectories (ours). Fresh ones for each step: "authors" with the code's sampler,
    "aligned" with one that ends at the time that the network is told."""
    latent_steps: int = 10
    """Times of the trajectories' grid; the authors' is 50."""
    latent_guidance: float = 3.0
    """Guidance of the trajectories (the code's `start_guidance`)."""
    trajectories: int = 8
    """For "replay": how many trajectories are walked at a time for each of the two terms."""
    refresh: int = 20
    """For "replay": after how many steps of either kind the trajectories are renewed."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "ascent": 0, "nearest": 1, "centers": 0, "latent_steps": 2, "trajectories": 1, "refresh": 1}
        choices = {"loss_space": ("x0", "eps"), "latents": ("replay", "authors", "aligned")}
        rates, weights = ("lr", "word_lr", "temperature"), ("eta", "keep_weight", "latent_guidance")
        self.check_fields(at_least=least, above_zero=rates, from_zero=weights, one_of=choices)
        self.check_field("keep_share", 0 <= self.keep_share < 1, "a number from 0, below 1")
        most = self.trajectories * self.latent_steps
        self.check_field("batch", self.latents != "replay" or self.batch <= most, f"at most trajectories × latent_steps = {most}")

    @property
    def period(self) -> int:
        """Steps from one step on the network to the next (P)."""
        return 1 if self.random_word else 1 + self.ascent

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            game = Game(self, model, task, resources, fit.generator)
            descent = torch.optim.Adam(game.student.parameters, lr=fit.rate)
            climb = torch.optim.Adam(game.adversary.logits, lr=self.word_lr)
            for step in fit.steps(self.steps * self.period, {**game.state, "descent": descent, "climb": climb}):
                if self.latents == "replay" and step % self.refresh == 0:
                    game.pools[:] = game.walked(erasing=True)
                figures, words = game.word_step(climb) if step % self.period else game.model_step(descent)
                fit.log(figures)
                game.trace.add(words, game.adversary)
            info = {"words": game.table.words, "candidates": game.candidates}
            return fit.edit(game.student.deltas(), trace=game.trace.tensors(game.table.indices), info=info)

    def candidates(self, model: Model, task: Task, resources: Resources = Resources()) -> dict[str, list[str]]:
        """R_e for each target text: its nearest words, thinned by k-means, then what `keep` adds. Raises InvalidTask where none is left."""
        words = vocabulary(model, task, resources, exclude_targets=self.exclude_targets, letters_only=self.letters_only)
        return candidates(model, task, words, count=self.nearest, centers=self.centers)

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for the others."""
        ascents = self.steps * (self.period - 1)
        walks = self.batch * (2 * self.steps + ascents)
        if self.latents == "replay":
            walks = 2 * self.trajectories * math.ceil(self.steps * self.period / self.refresh)
        beside = self.batch * (5 * self.steps + 2 * ascents)
        spent = Expectation(*forwards(self.latents, self.latent_steps, walks, self.latent_guidance, fixed=beside))
        return {"steps": self.steps + ascents, "forwards": spent, "backwards": self.batch * (2 * self.steps + ascents)}

    def memory(self, model: Model, task: Task) -> int:
        """The student with Adam, and the latents that are kept, each with the noise of its word; bytes."""
        rows = 2 * (self.trajectories * self.latent_steps if self.latents == "replay" else self.batch)
        words = (self.centers or self.nearest) * len(task.texts)
        return training_bytes(model.select(self.group)) + 4 * rows * (math.prod(model.latent_shape) + words)


class Game:
    """The two players and what they play with: the student, the words' logits, prompts, latents."""

    def __init__(self, method: AP, model: Model, task: Task, resources: Resources, generator: torch.Generator) -> None:
        self.method, self.model, self.generator = method, model, generator
        self.distance = partial(model.schedule.distance, method.loss_space)
        with torch.no_grad():
            self.null, self.targets, self.anchors = (model.encode(texts) for texts in ([""], list(task.texts), list(task.texts.values())))
        self.candidates = method.candidates(model, task, resources)
        self.table = Table.of(model, self.candidates)
        self.embed, indices, words = self.table.cond.mix, list(self.table.indices.values()), len(self.table.words)
        start = Adversary.uniform(indices, words, temperature=method.temperature, hard=method.hard)
        kept = [text for concept in task.keep for text in concept.texts]
        start.favour([self.table.words.index(text) for text in kept if text in self.table.words], method.keep_share)
        self.adversary = start.to(self.table.cond.tokens.device)
        self.student, self.pools, self.trace = Overlay(model.select(method.group)), Pools(), WordTrace(method.steps * method.period)
        logits = nn.ParameterList(self.adversary.logits)
        self.state: dict[str, Stateful] = {"student": self.student, "logits": logits, "pools": self.pools, "trace": self.trace}

    @torch.no_grad()
    def walked(self, erasing: bool) -> list[Latents]:
        """New z_a and, when `erasing`, z: guided trajectories of the student for words and targets, from the same noise."""
        method, generator = self.method, self.generator
        rows = method.trajectories if method.latents == "replay" else method.batch
        along = way(self.model, method.latents, method.latent_steps, rows, generator)
        target = torch.randint(len(self.targets), (rows,), generator=generator)
        noise = self.adversary.noise(rows, generator)
        prompts = [self.embed(self.adversary.draw(target, noise)), *([self.targets[target]] if erasing else [])]
        with self.student:
            parts = visited(self.model, along, prompts, generator, null=self.null, guidance=method.latent_guidance)
        return [along.latents(part, target, noise) for part in parts]

    def latents(self, erasing: bool) -> list[Latents]:
        """Rows for one step: z_a and, when `erasing`, z."""
        if self.method.latents != "replay":
            return self.walked(erasing)
        return [pool.pick(self.method.batch, self.generator) for pool in self.pools[: 1 + erasing]]

    def model_step(self, optimiser: torch.optim.Optimizer) -> tuple[dict[str, float], Tensor]:
        """Erase and preserve, one step on the student."""
        kept, rows = self.latents(erasing=True)
        target = self.targets[rows.target]
        with torch.no_grad():
            draw = self.adversary.draw(kept.target, kept.noise)
            word = self.embed(draw)
            neutral, toward, before = predictions(self.model, [rows, rows, kept], [self.anchors[rows.target], target, word])
        with self.student:
            erased, after = predictions(self.model, [rows, kept], [target, word])
            erase = self.distance(rows.level, erased, erase_goal(neutral, toward, self.method.eta))
            keep = self.distance(kept.level, after, before)
            descend(erase + self.method.keep_weight * keep, optimiser)
        return {"erase": erase.item(), "keep": keep.item()}, draw

    def word_step(self, optimiser: torch.optim.Optimizer) -> tuple[dict[str, float], Tensor]:
        """One step on the logits, up the preservation term; the frozen branch and the latents are constants."""
        (kept,) = self.latents(erasing=False)
        draw = self.adversary.draw(kept.target, kept.noise)
        word = self.embed(draw)
        with torch.no_grad():
            (before,) = predictions(self.model, [kept], [word])
        with self.student:
            (after,) = predictions(self.model, [kept], [word])
            keep = self.distance(kept.level, after, before)
            descend(-keep, optimiser)
        return {"keep": keep.item()}, draw

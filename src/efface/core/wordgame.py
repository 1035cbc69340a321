"""The game that AP and AGE play: a student that erases, and logits over words that choose what it must hold, or where it goes.

A step on the student descends, with targets c_e, prompts n that they are pushed past and prompts h that are held, which the method chooses,

    ‖ε_θ'(z, c_e) − [ε_θ(z, n) − η (ε_θ(z, c_e) − ε_θ(z, n))]‖²  +  λ ‖ε_θ'(z', h) − ε_θ(z', h)‖²

η = `eta`, λ = `keep_weight`, θ the frozen network, θ' the student. Then come `period` − 1 steps on the logits, which are the method's own.
A word is drawn by a Gumbel-Softmax (`ops.gumbel`); z and z' lie on the student's own trajectories for targets and words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from efface.core.edit import WeightEdit
from efface.core.fitting import Fit, Stateful
from efface.core.method import Resources
from efface.core.model import Cond, Model
from efface.core.task import Task
from efface.core.trajectories import TrajectoryMethod, predictions, visited
from efface.core.words import Table, candidates, vocabulary
from efface.ops.descend import descend
from efface.ops.guidance import erase_goal
from efface.ops.gumbel import Adversary
from efface.ops.latents import Latents, Pools
from efface.ops.mixture import sparse
from efface.ops.overlay import Overlay, training_bytes
from efface.ops.trace import WordTrace

Move = tuple[dict[str, float], Tensor]
"""The figures of a step, and its words (b n): one-hot rows, or mixtures."""


class WordMethod(TrajectoryMethod):
    """A method that plays against words. Each has the following fields too, with a default and a meaning of its own."""

    steps: int
    lr: float
    group: str
    eta: float
    keep_weight: float
    loss_space: str
    ascent: int
    word_lr: float
    temperature: float
    hard: bool
    nearest: int
    centers: int
    exclude_targets: bool
    letters_only: bool

    def check_game(self) -> None:
        """For `__post_init__`: these fields, and those of trajectories. Raises InvalidMethod."""
        least, rates = {"steps": 1, "ascent": 0, "nearest": 1, "centers": 0}, ("lr", "word_lr", "temperature")
        self.check_fields(at_least=least, above_zero=rates, from_zero=("eta", "keep_weight"), one_of={"loss_space": ("x0", "eps")})
        self.check_trajectories(("replay", "authors", "aligned"))

    def nearby(self, model: Model, task: Task, resources: Resources = Resources(), *, part: Task | None = None) -> dict[str, list[str]]:
        """R_e for each text to erase: its nearest words, thinned by k-means, then what `keep` adds; for those of a `part` of the task alone
        where one is given. Raises InvalidTask where none is left."""
        words = vocabulary(model, task, resources, exclude_targets=self.exclude_targets, letters_only=self.letters_only)
        return candidates(model, part or task, words, count=self.nearest, centers=self.centers)

    def game_cost(self, period: int, *, sorts: int, ascent: tuple[int, int, int]) -> dict[str, float]:
        """For `cost`: a step on the student in every `period`, from trajectories of that many sorts.

        ascent: batches that a step on the words walks where latents are fresh, sends forward, and backward."""
        ascents, (fresh, forward, backward) = self.steps * (period - 1), ascent
        walks = self.walks(self.steps * period, sorts=sorts, fresh=sorts * self.steps + fresh * ascents)
        spent = self.forwards(walks, beside=self.batch * (5 * self.steps + forward * ascents))
        return {"steps": self.steps + ascents, "forwards": spent, "backwards": self.batch * (2 * self.steps + backward * ascents)}

    def game_bytes(self, model: Model, *, sorts: int, words: int) -> int:
        """For `memory`: the student with Adam, and the latents that are kept, each with the noise of its word."""
        return training_bytes(model.select(self.group)) + self.latent_bytes(model, sorts=sorts, words=words)


class WordGame(ABC):
    """The two players and what they play with: the student, the words' logits, prompts and latents.

    found: the candidates of each text to erase. sorts: what trajectories are walked for, of "target" and "word". period: steps from one on
    the student to the next. topk: how many words a mixture holds at most, 0 for all. together: whether rows of both sorts are picked as
    pairs, which share target and word."""

    def __init__(
        self,
        method: WordMethod,
        model: Model,
        task: Task,
        generator: torch.Generator,
        *,
        found: dict[str, list[str]],
        sorts: Sequence[str],
        period: int,
        topk: int = 0,
        together: bool = False,
    ) -> None:
        self.method, self.model, self.generator = method, model, generator
        self.candidates, self.sorts, self.period, self.topk, self.together = found, tuple(sorts), period, topk, together
        self.distance = partial(model.schedule.distance, method.loss_space)
        with torch.no_grad():
            self.null, self.targets = model.encode([""]), model.encode(list(task.texts))
        self.table = Table.of(model, found)
        self.embed, indices = self.table.cond.mix, list(self.table.indices.values())
        even = Adversary.uniform(indices, len(self.table.words), temperature=method.temperature, hard=method.hard)
        self.adversary = even.to(self.table.cond.tokens.device)
        self.student, self.pools, self.trace = Overlay(model.select(method.group)), Pools(), WordTrace(method.steps * period)
        logits = nn.ParameterList(self.adversary.logits)
        self.state: dict[str, Stateful] = {"student": self.student, "logits": logits, "pools": self.pools, "trace": self.trace}

    @abstractmethod
    def model_step(self, optimiser: torch.optim.Optimizer) -> Move:
        """One step on the student."""

    @abstractmethod
    def word_step(self, optimiser: torch.optim.Optimizer) -> Move:
        """One step on the logits."""

    def play(self, fit: Fit) -> None:
        """All steps: one on the student, and then those on the words, by turns."""
        descent = torch.optim.Adam(self.student.parameters, lr=fit.rate)
        climb = torch.optim.Adam(self.adversary.logits, lr=self.method.word_lr)
        for step in fit.steps(self.method.steps * self.period, {**self.state, "descent": descent, "climb": climb}):
            if self.method.replays and self.method.renews(step):
                self.pools[:] = self.walked(*self.sorts)
            figures, words = self.word_step(climb) if step % self.period else self.model_step(descent)
            fit.log(figures)
            self.trace.add(words, self.adversary)

    def edit(self, fit: Fit, info: Mapping[str, Any] | None = None) -> WeightEdit:
        """What the student has learned, with the words and their logits in its part "trace"."""
        told = {"words": self.table.words, "candidates": self.candidates, **(info or {})}
        return fit.edit(self.student.deltas(), trace=self.trace.tensors(self.table.indices), info=told)

    # -- words and latents -----------------------------------------------------------------------------------------------
    def draw(self, target: Tensor, noise: Tensor) -> Tensor:
        """The words (b n) of each row's target and noise: one, or a mixture; differentiable in the logits."""
        drawn = self.adversary.draw(target, noise)
        return sparse(drawn, self.topk) if self.topk and not self.method.hard else drawn

    @torch.no_grad()
    def walked(self, *sorts: str) -> list[Latents]:
        """New latents of each sort: guided trajectories of the student for targets and for their words, from the same noise."""
        method, generator = self.method, self.generator
        along = method.way(self.model, generator)
        target = torch.randint(len(self.targets), (method.abreast,), generator=generator)
        noise = self.adversary.noise(method.abreast, generator)
        prompts = [self.targets[target] if sort == "target" else self.embed(self.draw(target, noise)) for sort in sorts]
        with self.student:
            parts = visited(self.model, along, prompts, generator, null=self.null, guidance=method.latent_guidance)
        return [along.latents(part, target, noise) for part in parts]

    def latents(self, *sorts: str) -> list[Latents]:
        """Rows of each sort for one step."""
        if not self.method.replays:
            return self.walked(*sorts)
        pools = [self.pools[self.sorts.index(sort)] for sort in sorts]
        if not self.together:
            return [pool.pick(self.method.batch, self.generator) for pool in pools]
        index = torch.randperm(len(pools[0]), generator=self.generator)[: self.method.batch]
        return [pool.rows(index) for pool in pools]

    # -- the student's move ----------------------------------------------------------------------------------------------
    def descended(self, optimiser: torch.optim.Optimizer, rows: Latents, anchor: Cond, kept: Latents, held: Cond) -> dict[str, float]:
        """One step down both terms: at `rows` their targets are pushed past `anchor`, and at `kept` the predictions for `held` are held."""
        target = self.targets[rows.target]
        with torch.no_grad():
            neutral, toward, before = predictions(self.model, [rows, rows, kept], [anchor, target, held])
        with self.student:
            erased, after = predictions(self.model, [rows, kept], [target, held])
            erase = self.distance(rows.level, erased, erase_goal(neutral, toward, self.method.eta))
            keep = self.distance(kept.level, after, before)
            descend(erase + self.method.keep_weight * keep, optimiser)
        return {"erase": erase.item(), "keep": keep.item()}

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
- `exclude_targets=False`: in the code "church" is kept while "Church" is erased. We leave the targets out.
- One row a step; ours are batches in which each row has its own target and word.
The k-means is exact here; the code's is scikit-learn's, which finds a nearby optimum. Where the paper says cosine (nearest words) and
"first find c_a, then update" (the maximum), both follow the code: L2, and `ascent` steps for each model step.

Known failures: logits move by `word_lr` a step at most, so that with few steps or many targets the word is nearly a uniform draw
(`random_word=True` is that ablation); with `hard` the temperature changes nothing but a gradient that Adam normalises. The defaults
are meant for the bundled model, and have not been run on Stable Diffusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from efface.core.card import Card
from efface.core.edit import Part, WeightEdit
from efface.core.errors import Diverged, InvalidMethod, InvalidTask
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.sampling import Schedule, seeded
from efface.core.task import Task
from efface.ops.candidates import distances, nearest, spread
from efface.ops.descend import descend
from efface.ops.gumbel import Adversary
from efface.ops.latents import Latents, Route, aligned_route, authors_route, replay_route, walk
from efface.ops.overlay import Overlay
from efface.ops.trace import Trace

AUTHORS = {"steps": 1000, "batch": 1, "loss_space": "x0", "latents": "authors", "latent_steps": 50} | {
    "exclude_targets": False,
    "letters_only": True,
}
"""The published runs: 1000 steps of one row, in predicted clean latents, on the list EN3K (to be given as the vocabulary)."""


def erase_goal(neutral: Tensor, target: Tensor, eta: float) -> Tensor:
    """ε_n − η (ε_e − ε_n), all (b c h w): guided away from the target. The weights sum to one, so it holds for velocity too."""
    return neutral - eta * (target - neutral)


def distance(schedule: Schedule, space: str, level: Tensor, prediction: Tensor, goal: Tensor) -> Tensor:
    """mean ‖f(prediction) − f(goal)‖², f to the clean latent ("x0") or the noise ("eps") at the times `level` (b)."""
    weight = schedule.x0_weight(level, goal) if space == "x0" else schedule.noise_weight(level, goal)
    return (weight * (prediction - goal).square()).mean()


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

    steps: int = 200
    """Steps on the network; the paper's "iterations"."""
    lr: float = 1e-5
    """Learning rate of the network (Adam), in units of Stable Diffusion 1.x: `model.lr_scale` multiplies it."""
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
        for name, low in least.items():
            self._check(name, type(getattr(self, name)) is int and getattr(self, name) >= low, f"an integer of at least {low}")
        for name in ("lr", "word_lr", "temperature"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("eta", "keep_weight", "latent_guidance"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        for name, valid in {"loss_space": ("x0", "eps"), "latents": ("replay", "authors", "aligned")}.items():
            self._check(name, getattr(self, name) in valid, f"one of {', '.join(valid)}")
        most = self.trajectories * self.latent_steps
        self._check("batch", self.latents != "replay" or self.batch <= most, f"at most trajectories × latent_steps = {most}")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise InvalidMethod(f"ap's {name} was {getattr(self, name)!r}; expected {expected}")

    @property
    def period(self) -> int:
        """Steps from one step on the network to the next (P)."""
        return 1 if self.random_word else 1 + self.ascent

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        self.require(model, task)
        model.meter.reset()
        total, rate = self.steps * self.period, self.lr * model.lr_scale
        with model.frozen():
            game = Game(self, model, task, resources, seed)
            descent = torch.optim.Adam(game.student.parameters, lr=rate)
            climb = torch.optim.Adam(game.adversary.logits, lr=self.word_lr)
            trace = Trace(total)
            for step in range(total):
                if self.latents == "replay" and step % self.refresh == 0:
                    game.pools = game.walked(erasing=True)
                figures, words = game.word_step(climb) if step % self.period else game.model_step(descent)
                _finite(figures, step, total, rate)
                trace.add(figures, words, game.adversary)
                resources.report(step + 1, total, figures)
            deltas = game.student.deltas()
        _finite({f"change of {n}": float(d.abs().max()) for n, d in deltas.items()}, total - 1, total, rate)
        card = Card.of(model, method=self, task=task, seed=seed, cost=model.meter.read())
        part = Part(trace.tensors(("erase", "keep"), game.indices), {"words": game.words, "candidates": game.candidates})
        return WeightEdit(deltas, card, {"trace": part})

    def candidates(self, model: Model, task: Task, resources: Resources = Resources()) -> dict[str, list[str]]:
        """R_e for each target text: its nearest words, thinned by k-means, then what `keep` adds. Raises InvalidTask where none is left."""
        keep, found = [text for concept in task.keep for text in concept.texts], {}
        vocabulary, texts = self.vocabulary(model, task, resources), list(_anchors(task))
        for text, away in zip(texts, distances(lambda t: model.encode(t).tokens, vocabulary, texts), strict=True):
            order = nearest(away, self.nearest)
            order = order[spread(away[order], self.centers)] if self.centers else order
            words = [vocabulary[i] for i in order.tolist()]
            found[text] = words + [k for k in keep if k.casefold() not in {w.casefold() for w in words}]
            if not found[text]:
                raise InvalidTask(f"no candidate word is left for {text!r}; give a vocabulary, fewer exclusions, or concepts to keep")
        return found

    def vocabulary(self, model: Model, task: Task, resources: Resources) -> list[str]:
        """The words given, or the tokenizer's, without those that are excluded."""
        targets = [t for c in task.targets for t in (c.name, *c.texts)] if self.exclude_targets else []
        excluded = {word.casefold() for word in (*targets, *resources.exclude)}
        words = [word.removesuffix("</w>") for word in resources.vocabulary or model.words()]
        plain = [w for w in dict.fromkeys(words) if w.casefold() not in excluded]
        return [w for w in plain if w.isascii() and w.isalpha()] if self.letters_only else plain

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for the others."""
        ascents = self.steps * (self.period - 1)
        n = self.latent_steps
        if self.latents == "replay":
            walked: float = math.ceil(self.steps * self.period / self.refresh) * 2 * self.trajectories * (n - 1)
        else:
            mean = (n - 1) * (n + 2) / (2 * n) if self.latents == "authors" else (n - 1) / 2
            walked = mean * self.batch * (2 * self.steps + ascents)
        forwards = self.batch * (5 * self.steps + 2 * ascents) + walked * (1 if self.latent_guidance == 1 else 2)
        return {"steps": self.steps + ascents, "forwards": forwards, "backwards": self.batch * (2 * self.steps + ascents)}


def _anchors(task: Task) -> dict[str, str]:
    """Each text to erase, and the text of its anchor."""
    return {text: swap.anchor.texts[0] for swap in task.erase for text in swap.target.texts}


def _finite(figures: Mapping[str, float], step: int, total: int, lr: float) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise Diverged(f"ap's {name} was {value} at step {step + 1} of {total}, with lr {lr:g}; the model is as it was, try a lower lr")


class Game:
    """The two players and what they play with: the student, the words' logits, prompts, latents."""

    def __init__(self, method: AP, model: Model, task: Task, resources: Resources, seed: int) -> None:
        self.method, self.model, self.generator = method, model, seeded(seed)
        self.candidates, anchors = method.candidates(model, task, resources), _anchors(task)
        self.words = list(dict.fromkeys(word for words in self.candidates.values() for word in words))
        self.indices = {text: [self.words.index(w) for w in words] for text, words in self.candidates.items()}
        with torch.no_grad():
            self.null, self.targets, self.anchors = (model.encode(texts) for texts in ([""], list(anchors), list(anchors.values())))
            self.table = Cond.cat([model.encode(self.words[i : i + 256]) for i in range(0, len(self.words), 256)])
        start = Adversary.uniform(list(self.indices.values()), len(self.words), temperature=method.temperature, hard=method.hard)
        self.adversary = start.to(self.table.tokens.device)
        self.student = Overlay(model.select(method.group))
        self.pools: list[Latents] = []

    # -- words and latents -----------------------------------------------------------------------------------------------
    def embed(self, draw: Tensor) -> Cond:
        """Σ_i y_i T_i: the encodings of drawn words, or of mixtures, for y (b v)."""
        tokens, pooled = self.table.tokens.float(), self.table.pooled
        return Cond((draw @ tokens.flatten(1)).unflatten(1, tokens.shape[1:]), None if pooled is None else draw @ pooled.float())

    def route(self) -> Route:
        method, train_steps = self.method, self.model.schedule.train_steps
        if method.latents == "replay":
            return replay_route(train_steps, method.latent_steps, method.trajectories, self.generator)
        grid = self.model.schedule.grid(method.latent_steps)
        if method.latents == "aligned":
            return aligned_route(grid, method.batch, self.generator)
        return authors_route(grid, train_steps // len(grid), method.batch, self.generator)

    @torch.no_grad()
    def walked(self, erasing: bool) -> list[Latents]:
        """New z_a and, when `erasing`, z: guided trajectories of the student for words and targets, from the same noise."""
        model, route = self.model, self.route()
        rows = route.times.shape[1]
        target = torch.randint(len(self.targets), (rows,), generator=self.generator)
        noise = self.adversary.noise(rows, self.generator)
        z = torch.randn(rows, *model.latent_shape, generator=self.generator).to(model.device)
        prompts = [self.embed(self.adversary.draw(target, noise)), *([_rows(self.targets, target)] if erasing else [])]
        cond, times = Cond.cat(prompts), torch.cat([route.times] * len(prompts), 1)
        with self.student:
            denoise = lambda x, t: model.guided(x, t, cond, self.null, self.method.latent_guidance)  # noqa: E731
            visited = walk(torch.cat([z] * len(prompts)), times, denoise, model.schedule.ddim_step)
        return [route.latents(part, target, noise) for part in visited.split(rows, dim=1)]

    def latents(self, erasing: bool) -> list[Latents]:
        """Rows for one step: z_a and, when `erasing`, z."""
        if self.method.latents != "replay":
            return self.walked(erasing)
        return [pool.pick(self.method.batch, self.generator) for pool in self.pools[: 1 + erasing]]

    # -- moves -----------------------------------------------------------------------------------------------------------
    def model_step(self, optimiser: torch.optim.Optimizer) -> tuple[dict[str, float], Tensor]:
        """Erase and preserve, one step on the student."""
        kept, rows = self.latents(erasing=True)
        target = _rows(self.targets, rows.target)
        with torch.no_grad():
            draw = self.adversary.draw(kept.target, kept.noise)
            word = self.embed(draw)
            neutral, toward, before = self.predict([rows, rows, kept], [_rows(self.anchors, rows.target), target, word])
        with self.student:
            erased, after = self.predict([rows, kept], [target, word])
            erase = self.distance(rows, erased, erase_goal(neutral, toward, self.method.eta))
            keep = self.distance(kept, after, before)
            descend(erase + self.method.keep_weight * keep, optimiser)
        return {"erase": erase.item(), "keep": keep.item()}, draw

    def word_step(self, optimiser: torch.optim.Optimizer) -> tuple[dict[str, float], Tensor]:
        """One step on the logits, up the preservation term; the frozen branch and the latents are constants."""
        (kept,) = self.latents(erasing=False)
        draw = self.adversary.draw(kept.target, kept.noise)
        word = self.embed(draw)
        with torch.no_grad():
            (before,) = self.predict([kept], [word])
        with self.student:
            (after,) = self.predict([kept], [word])
            keep = self.distance(kept, after, before)
            descend(-keep, optimiser)
        return {"keep": keep.item()}, draw

    def predict(self, rows: list[Latents], prompts: list[Cond]) -> tuple[Tensor, ...]:
        """Several predictions in one call."""
        x, t = torch.cat([r.x for r in rows]), torch.cat([r.told for r in rows])
        return self.model.predict(x, t, Cond.cat(prompts)).split([len(r) for r in rows])

    def distance(self, rows: Latents, prediction: Tensor, goal: Tensor) -> Tensor:
        return distance(self.model.schedule, self.method.loss_space, rows.level, prediction, goal)


def _rows(cond: Cond, index: Tensor) -> Cond:
    return cond[index.to(cond.tokens.device)]

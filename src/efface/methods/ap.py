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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch

from efface.core.edit import WeightEdit
from efface.core.fitting import fitting
from efface.core.method import Needs, Paper, Resources
from efface.core.model import Model
from efface.core.task import Task
from efface.core.trajectories import predictions
from efface.core.wordgame import Move, WordGame, WordMethod
from efface.ops.descend import descend

WORDS = {"exclude_targets": False, "letters_only": True}
AUTHORS = {"steps": 1000, "batch": 1, "keep_share": 0.0, "loss_space": "x0", "latents": "authors", "latent_steps": 50, **WORDS}
"""The published runs: 1000 steps of one row, in predicted clean latents, on the list EN3K (to be given as the vocabulary)."""


@final
@dataclass(frozen=True)
class AP(WordMethod):
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
        self.check_game()
        self.check_field("keep_share", 0 <= self.keep_share < 1, "a number from 0, below 1")

    @property
    def period(self) -> int:
        """Steps from one step on the network to the next (P)."""
        return 1 if self.random_word else 1 + self.ascent

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            game = Game(self, model, task, resources, fit.generator)
            game.play(fit)
            return game.edit(fit)

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for the others."""
        return self.game_cost(self.period, sorts=2, ascent=(1, 2, 1))

    def memory(self, model: Model, task: Task) -> int:
        """The student with Adam, and the latents that are kept, each with the noise of its word; bytes."""
        return self.game_bytes(model, sorts=2, words=(self.centers or self.nearest) * len(task.texts))


class Game(WordGame):
    """The student against the words that its erasure hurts most."""

    def __init__(self, method: AP, model: Model, task: Task, resources: Resources, generator: torch.Generator) -> None:
        found = method.nearby(model, task, resources)
        super().__init__(method, model, task, generator, found=found, sorts=("word", "target"), period=method.period)
        with torch.no_grad():
            self.anchors = model.encode(list(task.texts.values()))
        kept = [text for concept in task.keep for text in concept.texts]
        self.adversary.favour([self.table.words.index(text) for text in kept if text in self.table.words], method.keep_share)

    def model_step(self, optimiser: torch.optim.Optimizer) -> Move:
        """Erase and preserve, one step on the student."""
        kept, rows = self.latents("word", "target")
        with torch.no_grad():
            draw = self.draw(kept.target, kept.noise)
            word = self.embed(draw)
        return self.descended(optimiser, rows, self.anchors[rows.target], kept, word), draw

    def word_step(self, optimiser: torch.optim.Optimizer) -> Move:
        """One step on the logits, up the preservation term; the frozen branch and the latents are constants."""
        (kept,) = self.latents("word")
        draw = self.draw(kept.target, kept.noise)
        word = self.embed(draw)
        with torch.no_grad():
            (before,) = predictions(self.model, [kept], [word])
        with self.student:
            (after,) = predictions(self.model, [kept], [word])
            keep = self.distance(kept.level, after, before)
            descend(-keep, optimiser)
        return {"keep": keep.item()}, draw

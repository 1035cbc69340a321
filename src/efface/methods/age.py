"""AGE, adaptive guided erasure: maps the concept to the word (or mixture of a few) that a search finds for it, and holds that word.

    min over θ', max over c_t:   ‖ε_θ'(z, c_e) − [ε_θ(z, c_t) − η (ε_θ(z, c_e) − ε_θ(z, c_t))]‖²  +  λ ‖ε_θ'(z_t, c_t) − ε_θ(z_t, c_t)‖²
                                                       L1 (η = 0 in the search)                              L2

θ is the frozen network, θ' the student, c_e the concept, λ = `keep_weight`, η = `eta`. c_t = G(π) T is a mixture of the candidates'
encodings T by a Gumbel-Softmax over trained logits π: its `topk` heaviest words, or one word (`hard`). L2 is largest for words near the
concept, L1 small for its synonyms: what is sought is a neighbour that is none. z and z_t are the student's own guided trajectories for c_e
and c_t; no images are needed.

A swap with an anchor is not searched: the anchor is c_t. Synonym, neighbour, general word and unrelated concept are fixed in this way, and
`choice="fixed"` has the empty prompt where no anchor stands. The preset "naive" is the authors' fixed mapping, which holds the empty prompt
(the code: a blank). The final distribution over words of each concept stands in the edit's part "trace" (`info["targets"]`). It tells which
word leads, and not per cent of a concept: mixtures of encodings switch abruptly from one word to the other.

Trained: the parameters of `group`, and a logit for each candidate of each target text. A model step costs 5 forwards and 2 backwards a row,
a target step 4 and 3, or 2 and 1 with `target_grad="l2_only"`; trajectories come on top (`cost`).

Where paper and code disagree:
- `target_grad`: the code detaches the word in L1, so that its search ascends L2 alone and is drawn to the concept itself ("l2_only"). Ours,
  "full", is the gradient of both terms through every network that reads the word; latents stay constants.
- `hard`, `temperature`, `topk`: the paper's mixture (T below 1, here two words at 0.1) is our default; the code's runs on objects and
  nudity draw one word, those on styles mix five at T = 2 (presets).
- `exclude_targets`: the code keeps the concepts themselves among the candidates; ours leaves out all of them, and `Resources.exclude`
  (synonyms). `eta`: the paper has 0, the code 1, which is ours too. `loss_space`: noise (paper, ours) or clean latents (code).
Ours alone are replayed latents, batches, that the word of a row is the same in both terms, and fewer steps with a faster search among
fewer words (`word_lr`, `nearest`): at the code's rate 100 steps leave the distribution even. The authors' list for styles was never
published. The paper's text could not be read: formulas are those of its project page, the rest is the code.

Known failures: logits move by `word_lr` a step at most, so that with few steps the "learned" target is nearly a random candidate (compare
`choice="random"`); synonyms that are not excluded undo the erasure; on styles the paper itself keeps less than MACE. The defaults are
meant for the bundled model, and have not been run on Stable Diffusion."""

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
from efface.ops.descend import descend, gradients

RUN = {"steps": 1000, "batch": 1, "latents": "authors", "latent_steps": 50}
CODE = {**RUN, "target_grad": "l2_only", "exclude_targets": False, "loss_space": "x0", "word_lr": 1e-2}
"""What the authors' scripts share."""
CHOICES = {"target_grad": ("full", "l2_only"), "choice": ("learned", "random", "fixed"), "hold": ("target", "empty")}
LISTED = 5
"""Words of the final distribution that are kept for each concept."""


@final
@dataclass(frozen=True)
class AGE(WordMethod):
    """Adaptive guided erasure."""

    needs: ClassVar[Needs] = Needs(groups=("xattn",), gradients=True, keep="candidates")
    paper: ClassVar[Paper] = Paper(
        title="Fantastic Targets for Concept Erasure in Diffusion Models and Where To Find Them",
        authors="Bui et al.",
        venue="ICLR 2025",
        arxiv="2501.18950",
        code="tuananhbui89/Adaptive-Guided-Erasure",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": {**CODE, "hard": True, "nearest": 100},
        "authors-nudity": {**CODE, "hard": True, "nearest": 100, "group": "noxattn", "temperature": 2.0, "letters_only": True},
        "authors-style": {**CODE, "nearest": 1000, "temperature": 2.0, "topk": 5, "word_lr": 1e-3, "letters_only": True},
        "paper": {**RUN, "eta": 0.0, "nearest": 100, "word_lr": 1e-2},
        "naive": {**RUN, "choice": "fixed", "hold": "empty", "keep_weight": 0.1},
        "object": {},
        "style": {},
        "identity": {},
        "unsafe": {"group": "noxattn"},
    }

    steps: int = 100
    """Steps on the network; the paper's "iterations", 1000 in the authors' runs."""
    lr: float = 1e-5
    """Learning rate of the network (Adam), in units of Stable Diffusion 1.x (`Model.learning_rate`)."""
    batch: int = 8
    """Rows of each of the two terms in a step."""
    group: str = "xattn"
    """The parameters that are trained; "noxattn" for nudity."""
    eta: float = 1.0
    """How far past the word the concept is pushed (η, the code's `negative_guidance`); 0 is the paper's formula."""
    keep_weight: float = 1.0
    """Weight of holding the word (λ)."""
    loss_space: Literal["x0", "eps"] = "eps"
    """Where distances are taken: "x0", predicted clean latents (the code), or "eps", noise (the paper)."""
    target_grad: Literal["full", "l2_only"] = "full"
    """What the search ascends: both terms (the paper), or the second alone (the code)."""
    choice: Literal["learned", "random", "fixed"] = "learned"
    """How the word comes: trained logits, a uniform draw from the candidates (an ablation), or the task's anchors, "" for nothing."""
    hold: Literal["target", "empty"] = "target"
    """What the second term holds: the word itself, or the empty prompt on the concept's own latents (the authors' fixed mapping)."""
    ascent: int = 1
    """Steps on the logits after each step on the network; the code's `pgd_num_steps`, P, is one more."""
    word_lr: float = 0.1
    """Learning rate of the logits (Adam); the code's `gumbel_lr` is 1e-2 or 1e-3."""
    temperature: float = 0.1
    """Of the Gumbel-Softmax (T). With `hard` it does not change which word is drawn."""
    hard: bool = False
    """One word a row (straight-through) in the place of a mixture."""
    topk: int = 2
    """How many words a mixture holds at most (the code's `gumbel_topk`)."""
    nearest: int = 30
    """How many words nearest to the concept are candidates (K); the code's is 100 or 1000."""
    centers: int = 100
    """How many of them are kept, spread over their distances by k-means (M); 0 keeps all."""
    exclude_targets: bool = True
    """Whether words that equal any of the concepts to erase, whatever their case, are left out."""
    letters_only: bool = False
    """Whether words with other characters than a–z are left out of the vocabulary."""
    latents: Literal["replay", "authors", "aligned"] = "replay"
    """"replay": every latent of batches of whole trajectories (ours). Fresh ones for each step: "authors" with the code's sampler,
    "aligned" with one that ends at the time that the network is told."""
    latent_steps: int = 10
    """Times of the trajectories' grid; the authors' is 50."""
    latent_guidance: float = 3.0
    """Guidance of the trajectories (the code's `start_guidance`)."""
    trajectories: int = 8
    """For "replay": how many trajectories are walked at a time for each of the two terms."""
    refresh: int = 25
    """For "replay": after how many steps of either kind the trajectories are renewed."""

    def __post_init__(self) -> None:
        self.check_game()
        self.check_fields(at_least={"topk": 1}, one_of=CHOICES)
        self.check_field("hold", self.hold == "target" or self.choice != "learned", "'target' where the word is learned")

    def period(self, task: Task) -> int:
        """Steps from one step on the network to the next (P)."""
        searched = self.choice == "learned" and "" in task.texts.values()
        return 1 + self.ascent if searched else 1

    @property
    def sorts(self) -> tuple[str, ...]:
        """What trajectories are walked for."""
        return ("target", "word") if self.hold == "target" else ("target",)

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            game = Game(self, model, task, resources, fit.generator)
            game.play(fit)
            return game.edit(fit, {"targets": game.targeted()})

    def candidates(self, model: Model, task: Task, resources: Resources = Resources()) -> dict[str, list[str]]:
        """R_e for each target text: its anchor alone where it has one (or with `choice="fixed"`), else its nearest words, thinned by
        k-means, then what `keep` adds. Raises InvalidTask where none is left."""
        fixed = {text: [anchor] for text, anchor in task.texts.items() if anchor or self.choice == "fixed"}
        if len(fixed) == len(task.texts):
            return fixed
        free = Task(tuple(swap for swap in task.erase if not swap.anchor.name), task.keep)
        found = self.nearby(model, task, resources, part=free)
        return {text: fixed.get(text) or found[text] for text in task.texts}

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for the others."""
        ascent = (2, 4, 3) if self.target_grad == "full" else (1, 2, 1)
        return self.game_cost(self.period(task), sorts=len(self.sorts), ascent=ascent)

    def memory(self, model: Model, task: Task) -> int:
        """The student with Adam, and the latents that are kept, each with the noise of its word; bytes."""
        words = min(self.nearest, self.centers or self.nearest) * len(task.texts)
        return self.game_bytes(model, sorts=len(self.sorts), words=words)


class Game(WordGame):
    """The student and the search for the word that it maps each concept to."""

    method: AGE

    def __init__(self, method: AGE, model: Model, task: Task, resources: Resources, generator: torch.Generator) -> None:
        found, period, sorts, topk = method.candidates(model, task, resources), method.period(task), method.sorts, method.topk
        super().__init__(method, model, task, generator, found=found, sorts=sorts, period=period, topk=topk, together=True)

    def targeted(self) -> dict[str, list[tuple[str, float]]]:
        """For each concept the likeliest words and their chances, softmax π, the first first."""
        found = {}
        for text, row in zip(self.candidates, self.adversary.logits, strict=True):
            chances = row.detach().softmax(-1).cpu()
            best = chances.topk(min(LISTED, len(self.candidates[text])))
            found[text] = [(self.table.words[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return found

    # -- moves -----------------------------------------------------------------------------------------------------------
    def model_step(self, optimiser: torch.optim.Optimizer) -> Move:
        """One step on the student, down both terms."""
        rows, *others = self.latents(*self.sorts)
        with torch.no_grad():
            draw = self.draw(rows.target, rows.noise)
            word = self.embed(draw)
        kept, held = (others[0], word) if others else (rows, self.null.expand(len(rows)))
        return self.descended(optimiser, rows, word, kept, held), draw

    def word_step(self, optimiser: torch.optim.Optimizer) -> Move:
        """One step on the logits, up the terms that `target_grad` names; without η, as in the code.

        Slopes are taken at the draw and network by network, each while its own weights are in place, and then carried on to the logits."""
        full, weight = self.method.target_grad == "full", self.method.keep_weight
        kept, *others = self.latents("word", *(["target"] if full else []))
        draw = self.draw(kept.target, kept.noise)
        leaf = draw.detach().requires_grad_()
        with torch.set_grad_enabled(full):
            before, *toward = predictions(self.model, [kept, *others], [self.embed(leaf)] * (1 + len(others)))
        with self.student:
            (after,) = predictions(self.model, [kept], [self.embed(leaf)])
            keep = self.distance(kept.level, after, before.detach())
            (slope,) = gradients(weight * keep, [leaf])
            with torch.no_grad():
                erased = [self.model.predict(rows.x, rows.told, self.targets[rows.target]) for rows in others]
        if full:
            loss = self.distance(others[0].level, toward[0], erased[0]) + weight * self.distance(kept.level, before, after.detach())
            slope = slope + gradients(loss, [leaf])[0]
        descend(-(draw * slope).sum(), optimiser)
        return {"keep": keep.item()}, draw.detach()

"""SDD, safe self-distillation: the student's prediction for the concept follows its own for no prompt, and a slow average is the result.

    min over θ:   ‖ε_θ(z_t, c_s) − sg[ε_θ(z_t, ∅)]‖²,        θ̄ ← m θ̄ + (1 − m) θ after each step

θ is the student, θ̄ the teacher, m = `decay`. z_t comes from the teacher's guided trajectory for c_p; t and z_t are as in ESD. Both terms
are the student's, sg is no gradient: it is ESD with η = 0 and a target that moves with the student. The frozen network is never asked, and
nothing but the slow teacher holds ε_θ(z, ∅) in place. The edit is θ̄ − θ_0; the average still holds m^n of the original, which is 22 %
after the authors' 1500 steps of m = 0.999.

Several concepts, one run: c_p and c_s are all of them joined by commas, or one of them in turn. The two published versions differ:
- `latent_prompt="joined"`, `loss_prompt="each"`: the authors' script, and our default;
- `latent_prompt="each"`, `loss_prompt="joined"`: their README and project page. For one concept all are the same.

Trained: the parameters of `group`. A step costs 2 forwards and 1 backward a row, and the trajectories (`cost`).

Ours: batches of rows from trajectories that are walked in large batches (`latents="replay"`), fewer steps and a teacher that follows so
much faster, and an anchor other than nothing, which takes the place of ∅ in the goal. The preset "authors" has their settings, though
not the bug of their sampler, which walks a whole trajectory where it is asked for none. Losses of velocity have the same form. The body
of the paper could not be read: this follows code, README and project page, and the concept list of their multi-concept run is not known.

Known failures: at the authors' rate the bundled model loses everything within 200 steps, since the student's goal moves with it and
collapses (of other concepts 1 % stayed), hence our smaller one; the average pulls the weights to the original, so that a short run with the
authors' m erases little; relearned by fine-tuning on harmful pictures (third-party notes on Meta-Unlearning); names beyond the encoder's
length are cut off the joined prompt. The defaults are meant for the bundled model, and have not been run on Stable Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from efface.core.edit import WeightEdit
from efface.core.fitting import State, fitting
from efface.core.method import Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.task import Task
from efface.core.trajectories import TrajectoryMethod
from efface.ops.descend import descend
from efface.ops.ema import follow
from efface.ops.latents import Kind, Latents, Pools
from efface.ops.overlay import Overlay, training_bytes

Which = Literal["joined", "each"]
CHOICES = {"latent_prompt": ("joined", "each"), "loss_prompt": ("joined", "each"), "order": ("iterative", "random")}


@final
@dataclass(frozen=True)
class SDD(TrajectoryMethod):
    """Safe self-distillation diffusion."""

    needs: ClassVar[Needs] = Needs(groups=("xattn",), gradients=True)
    paper: ClassVar[Paper] = Paper(
        title="Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models",
        authors="Kim, Jung, Kim, Choi, Shin, Lee",
        venue="ICML 2023 workshop on Challenges in Deployable Generative AI",
        arxiv="2307.05977",
        code="nannullna/safe-diffusion",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": {"steps": 1500, "lr": 1e-5, "batch": 1, "decay": 0.999, "latents": "jittered", "latent_steps": 50},
        "readme": {"latent_prompt": "each", "loss_prompt": "joined"},
        "object": {},
        "style": {},
        "identity": {},
        "unsafe": {},
    }

    steps: int = 150
    """Steps of AdamW; the authors' is 1500."""
    lr: float = 1.5e-6
    """Learning rate (AdamW), in units of Stable Diffusion 1.x (`Model.learning_rate`). The authors' is 1e-5."""
    batch: int = 8
    """Rows in a step; the authors' is 1."""
    group: str = "xattn"
    """The parameters that are trained (the code's `finetuning_method`)."""
    decay: float = 0.98
    """How much of the teacher stays at each step (m); the authors' is 0.999."""
    latent_prompt: Which = "joined"
    """What the teacher draws (c_p): all concepts joined by commas, or each in turn."""
    loss_prompt: Which = "each"
    """What the student is asked for (c_s): all concepts joined by commas, or each in turn."""
    order: Literal["iterative", "random"] = "iterative"
    """How the turns go: round robin, or at random."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    latents: Kind = "replay"
    """"replay": every latent of batches of whole trajectories (ours). Fresh ones for each step, to a random time: "jittered" (told a
    random time of its interval, as in the code), "aligned" (told that time), "authors" (the sampler of ESD's code)."""
    latent_steps: int = 10
    """Times of the trajectories' grid; the authors' is 50."""
    latent_guidance: float = 3.0
    """Guidance of the trajectories (s_g)."""
    trajectories: int = 8
    """For "replay": how many trajectories are walked at a time."""
    refresh: int = 25
    """For "replay": after how many steps the trajectories are renewed."""

    def __post_init__(self) -> None:
        self.check_fields(at_least={"steps": 1}, above_zero=("lr", "clip"), from_zero=("weight_decay",), one_of=CHOICES)
        self.check_field("decay", 0 <= self.decay < 1, "a number of at least 0, below 1")
        self.check_trajectories()

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            slots, prompts, pools = model.select(self.group), self.prompts(model, task), Pools()
            student, teacher = Overlay(slots), Overlay(slots)
            optimiser = torch.optim.AdamW(student.parameters, lr=fit.rate, weight_decay=self.weight_decay)
            state: State = {"student": student, "teacher": teacher, "optimiser": optimiser, "pools": pools}
            for step in fit.steps(self.steps, state):
                if self.renews(step):
                    turn = self.turn(step, len(task.texts))
                    with teacher:
                        pools[:] = [self.walked(model, prompts.latent, fit.generator, null=prompts.null, target=turn)]
                rows = pools[0].pick(self.batch, fit.generator)
                with student:
                    loss = self.loss(model, rows, prompts)
                    descend(loss, optimiser, clip=self.clip)
                follow(teacher, student, self.decay)
                fit.log({"erase": loss.item()})
            return fit.edit(teacher.deltas())

    @torch.no_grad()
    def prompts(self, model: Model, task: Task) -> Prompts:
        """The encoded prompts, a row for each text to erase."""
        texts, anchors = list(task.texts), list(task.texts.values())
        latent, loss = ([", ".join(texts)] * len(texts) if which == "joined" else texts for which in (self.latent_prompt, self.loss_prompt))
        return Prompts(*(model.encode(part) for part in (latent, loss, anchors, [""])))

    def turn(self, step: int, count: int) -> Tensor | None:
        """Which of `count` concepts the trajectories before a step are for, on from those of earlier walks; None for random ones."""
        earlier = self.abreast * (step // self.refresh if self.replays else step)
        return (earlier + torch.arange(self.abreast)) % count if self.order == "iterative" else None

    def loss(self, model: Model, rows: Latents, prompts: Prompts) -> Tensor:
        """mean ‖ε_θ(z_t, c_s) − sg[ε_θ(z_t, ∅)]‖² of the network as it stands."""
        with torch.no_grad():
            goal = model.predict(rows.x, rows.told, prompts.anchor[rows.target])
        return (model.predict(rows.x, rows.told, prompts.loss[rows.target]) - goal).square().mean()

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for the others."""
        samples = self.batch * self.steps
        return {"steps": self.steps, "forwards": self.forwards(self.walks(self.steps), beside=2 * samples), "backwards": samples}

    def memory(self, model: Model, task: Task) -> int:
        """The student with AdamW, the teacher, and the latents that are kept; bytes."""
        return training_bytes(model.select(self.group), moments=3) + self.latent_bytes(model)


@dataclass(frozen=True, eq=False)
class Prompts:
    """What the networks are told; one row for each text to erase."""

    latent: Cond
    """c_p"""
    loss: Cond
    """c_s"""
    anchor: Cond
    """∅, or what takes its place."""
    null: Cond
    """The empty prompt, one row: the other half of guidance."""

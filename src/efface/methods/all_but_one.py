"""All-but-One, a RECONSTRUCTION: changes what the concept's prompt adds to the unconditional prediction, and holds the latter.

    g_θ(z, c) = ε_θ(z, c) − ε_θ(z, ∅),        L_g = ‖g_θ(z, c_e) − g*‖²,        L_0 = ‖ε_θ(z, ∅) − ε_θ*(z, ∅)‖²
    L = L_g + λ L_0 + μ ‖θ − θ*‖²,            g* = g_θ*(z, c_a) − η (g_θ*(z, c_e) − g_θ*(z, c_a))

θ is the student, θ* the frozen network, c_e the concept, λ = `null_weight`, μ = `pull`, η = `eta`. c_a is the anchor, the user's
alternative ("van gogh -> dry brushing"); for nothing g(c_a) = 0, so that the concept comes to mean no more than no prompt. z are guided
trajectories of the frozen network for c_e. With `guided_loss` the guided predictions are compared instead, ε(∅) + w g, w = `guided_scale`.

Verified from abstract and first figure: only the guidance is updated, a constraint keeps the unconditional prediction, the user may name an
alternative, and real photos can be purified through DDIM inversion (`purified`). **Everything else is reconstructed**, since neither code
nor full text could be read: losses, weights, trajectories, group and steps. Results belong under "All-but-One (reconstruction)", and are no
evidence about the paper. What its abstract leaves open is a field: `stop_null`, `guided_loss`, `null_weight`, `eta`, `neutral`, `pull`.

If ε(∅) has not moved, L_g is Concept Ablation's loss on the concept's own trajectories, or SDD's with a frozen goal where there is no
anchor. L_0 is needed for cross-attention too: the empty prompt's tokens pass through the same maps.

Trained: the parameters of `group`. A step costs 2 forwards and 2 backwards a row for the student and 1 forward for the teacher, one more
each with an anchor and with η > 0; trajectories come on top (`cost`). Replay, which uses each latent of a trajectory, takes the place of
the sheet's `reuse_trajectory`.

Known failures: without `stop_null` and with little λ, L_g falls by moving ε(∅) towards the concept, which spoils all guided pictures; only
prompts near the concept's own are trained. The defaults are meant for the bundled model, and have not been run on Stable Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from efface.core import pictures
from efface.core.edit import Edit, WeightEdit
from efface.core.fitting import fitting
from efface.core.method import Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.task import Task
from efface.core.trajectories import TrajectoryMethod, predictions, visited
from efface.core.words import vocabulary
from efface.ops.descend import descend
from efface.ops.guidance import erase_goal
from efface.ops.latents import Kind, Latents, Pools
from efface.ops.overlay import Overlay, training_bytes


@final
@dataclass(frozen=True)
class AllButOne(TrajectoryMethod):
    """Surgical concept erasing (reconstruction)."""

    needs: ClassVar[Needs] = Needs(groups=("xattn",), gradients=True)
    paper: ClassVar[Paper] = Paper(
        title="All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models",
        authors="Hong, Lee, Woo",
        venue="AAAI 2024",
        arxiv="2312.12807",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "large": {"steps": 1000, "batch": 1, "latents": "aligned", "latent_steps": 50},
        "object": {},
        "style": {},
        "identity": {},
        "unsafe": {"group": "notime"},
    }

    steps: int = 200
    """Steps of AdamW."""
    lr: float = 1e-5
    """Learning rate (AdamW), in units of Stable Diffusion 1.x (`Model.learning_rate`)."""
    batch: int = 8
    """Rows in a step."""
    group: str = "xattn"
    """The parameters that are trained; "notime" (all but time embedding and output) for nudity."""
    eta: float = 0.0
    """How far past the alternative the concept is pushed (η)."""
    null_weight: float = 1.0
    """Weight of the unconditional prediction's place (λ)."""
    stop_null: bool = True
    """Whether ε_θ(∅) is a constant within L_g, so that L_0 alone acts on it."""
    guided_loss: bool = False
    """Whether guided predictions are compared, in the place of L_g + λ L_0."""
    guided_scale: float = 3.0
    """For `guided_loss`: the guidance (w)."""
    pull: float = 0.0
    """Weight of the squared distance of the weights from the original (μ)."""
    neutral: float = 0.0
    """The share of trajectories that are walked for a random word of the vocabulary in the place of the concept."""
    sampler: Literal["frozen", "student"] = "frozen"
    """Which network walks the trajectories."""
    latents: Kind = "replay"
    """"replay": every latent of batches of whole trajectories. Fresh ones for each step, to a random time: "aligned", "jittered" (told a
    random time of its interval), "authors" (the sampler of ESD's code)."""
    latent_steps: int = 10
    """Times of the trajectories' grid."""
    latent_guidance: float = 3.0
    """Guidance of the trajectories."""
    trajectories: int = 8
    """For "replay": how many trajectories are walked at a time."""
    refresh: int = 25
    """For "replay": after how many steps the trajectories are renewed."""

    def __post_init__(self) -> None:
        rates, weights, choices = ("lr", "guided_scale"), ("eta", "null_weight", "pull"), {"sampler": ("frozen", "student")}
        self.check_fields(at_least={"steps": 1}, above_zero=rates, from_zero=weights, one_of=choices)
        self.check_field("neutral", 0 <= self.neutral <= 1, "a share from 0 to 1")
        self.check_trajectories()

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            student, pools, prompts = Overlay(model.select(self.group)), Pools(), self.prompts(model, task, resources)
            original = {name: slot.tensor.detach() for name, slot in student.slots.items()}
            optimiser = torch.optim.AdamW(student.parameters, lr=fit.rate, weight_decay=0.0)
            for step in fit.steps(self.steps, {"student": student, "optimiser": optimiser, "pools": pools}):
                if self.renews(step):
                    with student if self.sampler == "student" else nullcontext():
                        pools[:] = [self.mixed(model, prompts, fit.generator)]
                rows = pools[0].pick(self.batch, fit.generator)
                base, goal = self.goal(model, rows, prompts)
                with student:
                    null, target = predictions(model, [rows, rows], [prompts.null.expand(len(rows)), prompts.target[rows.target]])
                    erase, keep, loss = self.losses(null, target, base, goal)
                    descend(loss + self.pull * distance(student, original) if self.pull else loss, optimiser)
                fit.log({"erase": erase.item(), "keep": keep.item()})
            return fit.edit(student.deltas())

    @torch.no_grad()
    def prompts(self, model: Model, task: Task, resources: Resources = Resources()) -> Prompts:
        """The encoded prompts, a row for each text to erase; neutral words only where trajectories are walked for them."""
        words = vocabulary(model, task, resources) if self.neutral else [""]
        anchors = list(task.texts.values())
        target, anchor, null = (model.encode(texts) for texts in (list(task.texts), anchors, [""]))
        return Prompts(target, anchor, null, words, any(anchors))

    @torch.no_grad()
    def mixed(self, model: Model, prompts: Prompts, generator: torch.Generator) -> Latents:
        """z: guided trajectories for concepts drawn at random, a share `neutral` of them for a random word instead."""
        rows, along = self.abreast, self.way(model, generator)
        target = torch.randint(len(prompts.target), (rows,), generator=generator)
        told = prompts.target[target]
        if self.neutral:
            chosen = torch.rand(rows, generator=generator) < self.neutral
            words = model.encode([prompts.words[i] for i in torch.randint(len(prompts.words), (rows,), generator=generator).tolist()])
            told = Cond.cat([told, words])[torch.arange(rows) + rows * chosen]
        (found,) = visited(model, along, [told], generator, null=prompts.null, guidance=self.latent_guidance)
        return along.latents(found, target)

    @torch.no_grad()
    def goal(self, model: Model, rows: Latents, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """ε_θ*(∅) and g* (b c h w), from the frozen network."""
        named = [prompts.anchor[rows.target]] * prompts.anchored + [prompts.target[rows.target]] * (self.eta > 0)
        null, *others = predictions(model, [rows] * (1 + len(named)), [prompts.null.expand(len(rows)), *named])
        anchor = others[0] - null if prompts.anchored else torch.zeros_like(null)
        return null, erase_goal(anchor, others[-1] - null, self.eta) if self.eta else anchor

    def losses(self, null: Tensor, target: Tensor, base: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(L_g, L_0, what is descended) from the student's ε(∅) and ε(c_e), the frozen ε(∅), and g*; all but these (b c h w)."""
        guidance = target - (null.detach() if self.stop_null else null)
        erase, keep = (guidance - goal).square().mean(), (null - base).square().mean()
        if self.guided_loss:
            return erase, keep, (null + self.guided_scale * guidance - base - self.guided_scale * goal).square().mean()
        return erase, keep, erase + self.null_weight * keep

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for the others."""
        samples = self.batch * self.steps
        spent = self.forwards(self.walks(self.steps), beside=samples * (3 + any(task.texts.values()) + (self.eta > 0)))
        return {"steps": self.steps, "forwards": spent, "backwards": 2 * samples}

    def memory(self, model: Model, task: Task) -> int:
        """The student with AdamW, and the latents that are kept; bytes."""
        return training_bytes(model.select(self.group)) + self.latent_bytes(model)


@dataclass(frozen=True, eq=False)
class Prompts:
    """What the networks are told; one row for each text to erase."""

    target: Cond
    anchor: Cond
    null: Cond
    """The empty prompt, one row."""
    words: list[str]
    """Neutral words."""
    anchored: bool
    """Whether any anchor is more than nothing."""


def distance(student: Overlay, original: Mapping[str, Tensor]) -> Tensor:
    """‖θ − θ*‖², a scalar. The original is handed in, since the slots hold the student's own tensors while it is in place."""
    return torch.stack([(p - original[name].float()).square().sum() for name, p in student.tensors.items()]).sum()


@torch.no_grad()
def purified(
    model: Model, edit: Edit, images: Tensor, *, prompt: str = "", steps: int = 50, guidance: float = 1.0, check: bool = True
) -> Tensor:
    """Pictures (b 3 H W) in [0, 1] with the concept gone: inverted by DDIM with the empty prompt, and walked back with the edit attached.

    The unconditional prediction is held, so that everything else should return. `prompt` and `guidance` are those of the way back, `check`
    is that of `attach`. The use is the paper's, the procedure a reconstruction; inversion is exact only for many `steps`.

    Raises InvalidTask for pictures of another shape or range, and what `attach` raises."""
    null, told = model.encode([""]), model.encode([prompt])
    times = [-1, *reversed(model.schedule.grid(steps))]
    z = pictures.latents(model, pictures.fitted(images, *pictures.size(model)))
    for t, following in pairwise(times):
        z = model.schedule.ddim_step(z, t, following, model.predict(z, max(t, 0), null))
    with edit.attach(model, check=check):
        for t, following in pairwise(reversed(times)):
            z = model.schedule.ddim_step(z, t, following, model.guided(z, t, told, null, guidance))
    return model.decode(z).cpu()

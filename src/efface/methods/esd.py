"""ESD, erased stable diffusion: the prediction for the concept becomes the frozen model's prediction guided away from it.

    min over θ':   ‖ε_θ'(z_t, c) − [ε_θ(z_t, ∅) − η (ε_θ(z_t, c) − ε_θ(z_t, ∅))]‖²

θ is the frozen network, θ' the student, c the target, ∅ the empty prompt, η = `eta`. z_t comes from a guided trajectory for c, walked
to a random time; no images are needed. With `erase_from` = f the concept is erased from the prompt f alone (the code of 2024): the
student is asked for f, trajectories are those of f, and the goal is ε_θ(f) − η (ε_θ(c) − ε_θ(∅)).

Trained: the parameters of `group`. "xattn" is ESD-x, for styles and identities; "noxattn" is ESD-u as the paper trained it, for objects
and nudity; the paper's "selfattn", "full", "notime", "xlayer" and "selflayer" are ablations. What later scripts call ESD-u is another
set of parameters ("esd_u" without normalisation layers, "esd_u_blocks" for SDXL), and their strict ESD-x is "text_kv". A step costs 3
forwards (4 with `erase_from`) and 1 backward a row, and the trajectories (`cost`).

Generations of the authors' code, as presets. `eta` always has the paper's meaning; the scripts of 2024 count it from ε(c) in the place of
ε(∅), so that their `negative_guidance` is one more than ours:
- "authors", "authors-u": the paper's, CompVis scripts of 2023. Their sampler ends two grid times too clean (`ops.latents.authors_times`);
- "demo": the demo's diffusers script, twice the η and the rate, a fifth of the steps; its time is drawn from the whole grid here;
- "2024", "2024-u": `esd_sd.py`: the frozen network walks; negative_guidance 2 is η = 1. At the model's own size (the script: 1024 px);
- "2024-sdxl": the settings of `esd_sdxl.py`: negative_guidance 1 is η = 0, which makes ε(∅) the goal.

Our defaults: batches of rows from trajectories that are walked in large batches, used whole and renewed as the student moves
(`latents="replay"`), in the place of one fresh trajectory for each step of one row. An anchor other than nothing takes the place of
∅ in the goal; this is ours too. Several targets are drawn for each row, as in the scripts' lists.

Known failures: paraphrases that do not name the concept still draw it; ESD-u harms unrelated concepts (63 % of other classes kept of
78 %, the paper's table), ESD-x leaks where the prompt is long; "church" survives most. The defaults are meant for the bundled
model, and have not been run on Stable Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from efface.core.edit import WeightEdit
from efface.core.fitting import fitting
from efface.core.method import Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.task import Task
from efface.core.trajectories import TrajectoryMethod, predictions
from efface.ops.descend import descend
from efface.ops.guidance import erase_from_goal, erase_goal
from efface.ops.latents import Kind, Latents, Pools
from efface.ops.overlay import Overlay, training_bytes

AUTHORS = {"steps": 1000, "batch": 1, "latents": "authors", "latent_steps": 50}
"""The published runs: 1000 steps of one row, at the paper's rate and strength."""
SCRIPTS = {"steps": 200, "batch": 1, "latents": "aligned", "latent_steps": 50}
"""What the diffusers scripts share."""


@final
@dataclass(frozen=True)
class ESD(TrajectoryMethod):
    """Erased stable diffusion."""

    needs: ClassVar[Needs] = Needs(groups=("xattn",), gradients=True)
    paper: ClassVar[Paper] = Paper(
        title="Erasing Concepts from Diffusion Models",
        authors="Gandikota, Materzynska, Fiotto-Kaufman, Bau",
        venue="ICCV 2023",
        arxiv="2303.07345",
        code="rohitgandikota/erasing",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": AUTHORS,
        "authors-u": {**AUTHORS, "group": "noxattn"},
        "demo": {**SCRIPTS, "lr": 2e-5, "eta": 2.0},
        "2024": {**SCRIPTS, "lr": 5e-5, "sampler": "frozen"},
        "2024-u": {**SCRIPTS, "lr": 5e-5, "sampler": "frozen", "group": "esd_u"},
        "2024-sdxl": {**SCRIPTS, "lr": 2e-4, "sampler": "frozen", "group": "text_kv", "eta": 0.0, "latent_guidance": 2.0},
        "style": {},
        "identity": {},
        "object": {"group": "noxattn"},
        "unsafe": {"group": "noxattn"},
    }

    steps: int = 200
    """Steps of Adam; the paper's "iterations"."""
    lr: float = 1e-5
    """Learning rate (Adam), in units of Stable Diffusion 1.x (`Model.learning_rate`)."""
    batch: int = 8
    """Rows in a step."""
    group: str = "xattn"
    """The parameters that are trained: "xattn" (ESD-x), "noxattn" (ESD-u), or another (the code's `train_method`)."""
    eta: float = 1.0
    """How far past the anchor the target is pushed (η); 0 makes the anchor's prediction the goal."""
    erase_from: str = ""
    """The prompt that the concept is erased from (f); empty for the concept's own."""
    sampler: Literal["student", "frozen"] = "student"
    """Which network walks the trajectories."""
    latents: Kind = "replay"
    """"replay": every latent of batches of whole trajectories (ours). Fresh ones for each step, to a random time: "aligned", "jittered"
    (told a random time of its interval), "authors" (with the CompVis sampler's quirks)."""
    latent_steps: int = 10
    """Times of the trajectories' grid; the authors' is 50."""
    latent_guidance: float = 3.0
    """Guidance of the trajectories (the code's `start_guidance`)."""
    trajectories: int = 8
    """For "replay": how many trajectories are walked at a time."""
    refresh: int = 20
    """For "replay": after how many steps the trajectories are renewed."""

    def __post_init__(self) -> None:
        self.check_fields(at_least={"steps": 1}, above_zero=("lr",), from_zero=("eta",), one_of={"sampler": ("student", "frozen")})
        self.check_trajectories()

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            student, pools, prompts = Overlay(model.select(self.group)), Pools(), self.prompts(model, task)
            optimiser = torch.optim.Adam(student.parameters, lr=fit.rate)
            for step in fit.steps(self.steps, {"student": student, "optimiser": optimiser, "pools": pools}):
                if self.renews(step):
                    with student if self.sampler == "student" else nullcontext():
                        pools[:] = [self.walked(model, prompts.trained, fit.generator, null=prompts.null)]
                rows = pools[0].pick(self.batch, fit.generator)
                goal = self.goal(model, rows, prompts)
                with student:
                    loss = (model.predict(rows.x, rows.told, prompts.trained[rows.target]) - goal).square().mean()
                    descend(loss, optimiser)
                fit.log({"erase": loss.item()})
            return fit.edit(student.deltas())

    @torch.no_grad()
    def prompts(self, model: Model, task: Task) -> Prompts:
        """The encoded prompts, a row for each text to erase."""
        targets, anchors = list(task.texts), list(task.texts.values())
        trained = [self.erase_from] * len(targets) if self.erase_from else targets
        return Prompts(*(model.encode(texts) for texts in (targets, anchors, trained, [""])))

    @torch.no_grad()
    def goal(self, model: Model, rows: Latents, prompts: Prompts) -> Tensor:
        """What the student is to predict, (b c h w), from the frozen network."""
        named = [prompts.anchor, prompts.target, *([prompts.trained] if self.erase_from else [])]
        anchor, target, *start = predictions(model, [rows] * len(named), [prompt[rows.target] for prompt in named])
        return erase_from_goal(start[0], target, anchor, self.eta) if start else erase_goal(anchor, target, self.eta)

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for the others."""
        samples = self.batch * self.steps
        spent = self.forwards(self.walks(self.steps), beside=samples * (4 if self.erase_from else 3))
        return {"steps": self.steps, "forwards": spent, "backwards": samples}

    def memory(self, model: Model, task: Task) -> int:
        """The student with Adam, and the latents that are kept; bytes."""
        return training_bytes(model.select(self.group)) + self.latent_bytes(model)


@dataclass(frozen=True, eq=False)
class Prompts:
    """What the networks are told; one row for each text to erase."""

    target: Cond
    anchor: Cond
    trained: Cond
    """Those that the student is asked for: the targets, or `erase_from`."""
    null: Cond
    """The empty prompt, one row: the other half of guidance."""

"""Modular LoRA: a safety LoRA and a fine-tuning LoRA, each trained on the original weights, meet at inference only.

    W* = W₀ + ΔW_safe + ΔW_ft*,      ΔW = U D of rank `rank`

Fine-tuning a model that was erased already can bring the concept back, since the update partly learns the inverse of the erasure. So
ΔW_ft is trained on W₀, where there is nothing to invert, and both are added afterwards: `core.merging.merge`. This method makes the
safety LoRA; the user's own comes from `efface.models.finetune` or a LoRA file. With e the target, n its anchor ("" by default), θ₀
frozen, θ = θ₀ + ΔW_safe:

    loss="esd":  ‖ε_θ(x_t, e) − [ε_θ₀(x_t, n) − η (ε_θ₀(x_t, e) − ε_θ₀(x_t, n))]‖²        (Gandikota et al., arXiv 2303.07345)
    loss="sdd":  ‖ε_θ(x_t, e) − sg ε_θ(x_t, n)‖²                                          (Kim et al., arXiv 2307.05977)

x_t lies on a guided trajectory for e: of the student with "esd", with "sdd" of a teacher whose factors are the moving average of the
student's (`ema`). Trained: two factors for each linear map of `group`; α equals the rank, so that the scale is 1. A step costs 3 forwards
and 1 backward a row with "esd", 2 and 1 with "sdd"; trajectories come on top (`cost`).

The paper's full text could not be read, and it has no code. From second hand (a student's reproduction): rank 4, 1500 steps of one row,
learning rates 1e-4 (ESD) and 1e-5 (SDD), which are the presets "esd" and "sdd"; 50 DDIM steps at guidance 3, AdamW and clipping at 1 are
those of nannullna/safe-diffusion, whose author is the paper's. Which maps carry the LoRA is not verified: ours are the cross-attention's
query, key, value and output. Our defaults are fewer steps of more rows at a lower rate, on replayed
latents, chosen on the bundled model.

Known failures: it protects whoever keeps the safety LoRA, such as a service that fine-tunes for its users; who holds the weights leaves
it out. That both add up is assumed and not trained: ΔW_ft has never met ΔW_safe. Compare with fine-tuning alone. The
experiment is `bench.protocols.reemergence`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from efface.core.edit import LowRankEdit, Part
from efface.core.fitting import Fit, State, fitting
from efface.core.method import Needs, Paper, Resources
from efface.core.model import Model, Parameters
from efface.core.task import Task
from efface.core.trajectories import TrajectoryMethod, predictions
from efface.ops.descend import descend
from efface.ops.guidance import erase_goal
from efface.ops.latents import Kind, Latents, Pools
from efface.ops.lowrank import Adapter, can_adapt, fresh

SECOND_HAND: dict[str, Any] = {"steps": 1500, "batch": 1, "latents": "aligned", "latent_steps": 50}


@final
@dataclass(frozen=True)
class ModularLoRA(TrajectoryMethod):
    """A safety LoRA that is trained apart from the user's."""

    needs: ClassVar[Needs] = Needs(groups=("xattn",), gradients=True)
    paper: ClassVar[Paper] = Paper(
        title="Safety Alignment Backfires: Preventing the Re-emergence of Suppressed Concepts in Fine-tuned Text-to-Image Diffusion Models",
        authors="Kim, Choi, Shin, Lee",
        venue="arXiv 2024",
        arxiv="2412.00357",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "esd": {**SECOND_HAND, "lr": 1e-4},
        "sdd": {**SECOND_HAND, "lr": 1e-5, "loss": "sdd"},
    }

    loss: Literal["esd", "sdd"] = "esd"
    """How the safety LoRA erases."""
    steps: int = 100
    """Steps on the factors; 1500 second hand."""
    lr: float = 2e-5
    """Learning rate (AdamW), in units of Stable Diffusion 1.x (`Model.learning_rate`)."""
    batch: int = 8
    """Rows in a step."""
    rank: int = 4
    """Of each map's change (r); α is the same."""
    group: str = "xattn"
    """The parameters whose linear maps get factors."""
    eta: float = 1.0
    """How far past the anchor "esd" pushes (η)."""
    ema: float = 0.999
    """How much of the teacher stays at a step of "sdd"."""
    latents: Kind = "replay"
    """Where x_t comes from: see `ops.latents`. "aligned" is a fresh trajectory for each step."""
    latent_steps: int = 10
    """Times of the trajectories' grid; the authors' is 50."""
    latent_guidance: float = 3.0
    """Guidance of the trajectories."""
    trajectories: int = 8
    """For "replay": how many are walked at a time."""
    refresh: int = 20
    """For "replay": after how many steps they are renewed."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        least, weights, choices = {"steps": 1, "rank": 1}, ("eta", "weight_decay"), {"loss": ("esd", "sdd")}
        self.check_fields(at_least=least, above_zero=("lr", "clip"), from_zero=weights, one_of=choices)
        self.check_field("ema", 0 <= self.ema < 1, "a share of at least 0, below 1")
        self.check_trajectories()

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> LowRankEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            run = Training(self, fit)
            for step in fit.steps(self.steps, run.state):
                if self.renews(step):
                    run.pools[:] = [run.walked()]
                fit.log({"erase": run.step()})
            factors = {f"{name}.weight": pair for name, pair in run.student.learned().items()}
            fit.finite({f"{name}": float(up.abs().max()) for name, (_, up) in factors.items()}, self.steps)
            return LowRankEdit(factors, fit.card(), {"trace": Part(fit.losses())})

    def modules(self, parameters: Parameters) -> dict[str, nn.Module]:
        """The maps of the group that get factors, by full name."""
        return {n.removesuffix(".weight"): s.owner for n, s in parameters.items() if s.attribute == "weight" and can_adapt(s.owner)}

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for the others."""
        samples = self.batch * self.steps
        spent = self.forwards(self.walks(self.steps), beside=samples * (3 if self.loss == "esd" else 2))
        return {"steps": self.steps, "forwards": spent, "backwards": samples}

    def memory(self, model: Model, task: Task) -> int:
        """The factors of the student with AdamW, and those of the teacher."""
        slots = [slot for slot in model.select(self.group).values() if slot.attribute == "weight" and can_adapt(slot.owner)]
        sides = sum(self.rank * (slot.tensor.shape[0] + slot.tensor[0].numel()) for slot in slots)
        return 4 * sides * (5 if self.loss == "sdd" else 4)


@dataclass(eq=False)
class Training:
    """One fit: the student, the teacher that walks, the prompts, the latents."""

    method: ModularLoRA
    fit: Fit
    pools: Pools = field(default_factory=Pools)

    def __post_init__(self) -> None:
        method, model = self.method, self.fit.model
        modules = method.modules(model.select(method.group))
        factors = {name: fresh(module, method.rank, self.fit.generator) for name, module in modules.items()}
        self.student, self.teacher = Adapter(modules, factors), Adapter(modules, factors)
        self.optimiser = torch.optim.AdamW(self.student.parameters, lr=self.fit.rate, weight_decay=method.weight_decay)
        with torch.no_grad():
            texts = self.fit.task.texts
            self.null, self.targets, self.anchors = (model.encode(t) for t in ([""], list(texts), list(texts.values())))

    @property
    def state(self) -> State:
        factors = {side: nn.ParameterList(getattr(self, side).parameters) for side in ("student", "teacher")}
        return {**factors, "optimiser": self.optimiser, "pools": self.pools}

    def walked(self) -> Latents:
        """Trajectories for random targets, of the student ("esd") or the teacher ("sdd")."""
        with self.student if self.method.loss == "esd" else self.teacher:
            return self.method.walked(self.fit.model, self.targets, self.fit.generator, null=self.null)

    def step(self) -> float:
        """One step down the loss; the loss before it."""
        method = self.method
        value = self.loss(method.rows(self.pools[0], self.fit.generator))
        with self.student:
            descend(value, self.optimiser, clip=method.clip)
        if method.loss == "sdd":
            with torch.no_grad():
                for mean, now in zip(self.teacher.parameters, self.student.parameters, strict=True):
                    mean.lerp_(now, 1 - method.ema)
        return value.item()

    def loss(self, rows: Latents) -> Tensor:
        """The loss of rows of latents."""
        method, model = self.method, self.fit.model
        target, anchor = self.targets[rows.target], self.anchors[rows.target]
        if method.loss == "esd":
            with torch.no_grad():
                neutral, toward = predictions(model, [rows, rows], [anchor, target])
            goal = erase_goal(neutral, toward, method.eta)
        else:
            with self.student, torch.no_grad():
                goal = model.predict(rows.x, rows.told, anchor)
        with self.student:
            prediction = model.predict(rows.x, rows.told, target)
        return model.schedule.distance("eps", rows.level, prediction, goal)

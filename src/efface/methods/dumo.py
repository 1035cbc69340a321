"""DuMo: a second, trainable encoder beside the frozen one corrects the skips, and a table weighs the corrections by time and layer.

EPR, the eraser with prior knowledge, is a copy of the denoiser's encoder and middle; its outputs pass 1×1 convolutions that begin as zero,
and are added to the skips h_j and the middle h_J, as a ControlNet's are:

    h'_j = h_j + m · s[b(t), j] · r_j(x_t, t, c),      b(t) = ⌊t B / T⌋      (B = `buckets`; 20 × 13 entries s in Stable Diffusion 1.x)

Stage 1 trains the EPR with s = 1, m = 1. Stage 2 (TLMO) trains s, which begins as 1, and with `joint` the EPR too. With e the target, n its
anchor ("" by default), o another concept, θ₀ the frozen network:

    L1 = ‖ε(x_t, e) − [ε_θ₀(x_t, n) − η (ε_θ₀(x_t, e) − ε_θ₀(x_t, n))]‖²
    L2 = L1 + β ‖ε(x_o, o) − ε_θ₀(x_o, o)‖²                      (β = `keep_weight`; o: `keep`, and `others` more from `concepts/`)

x_t lies on guided trajectories for the prompt, of the network with its eraser. At inference m is SPM's prompt similarity
("clipcos_tokenuni", at most 1) for styles, characters and objects, and 1 for nudity, for which the authors use no table either (preset
"unsafe"). Several targets have an EPR each; their corrections are summed.

A reconstruction. Read in the authors' repository: the architecture, the forward pass, the table and its start, the gate, AdamW on the whole
control network. Not published, and therefore ours after ESD, whose code the repository bundles: the losses of both stages, η, β, the
learning rates, the numbers of steps, where x_t comes from, and that stage 2 begins with the table alone. In the authors' compiled modules
the whole control network is in the optimiser together with the table, which is `table_steps=0, joint_steps=…`.

A step costs 3 forwards and 1 backward a row in stage 1, and 5 and 2 in stage 2, with an encoder pass beside each forward of the erased
network, which the meter does not count as a forward; trajectories come on top (`cost`). At inference: an encoder and a middle more for
each concept.

Known failures: the gate opens by the words of the prompt: a paraphrase has m < 1 and an unrelated prompt not m = 0, since encodings share
their first row. `gate="none"` is the other reading. Whoever holds the model leaves the eraser out; fine-tuning beneath it moves the
skips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from efface.concepts.contrast import contrast
from efface.core.edit import FeatureEdit, Part
from efface.core.features import Eraser, PriorEraser, Residuals, weighted
from efface.core.fitting import Fit, State, fitting
from efface.core.gate import PromptGate
from efface.core.method import Needs, Paper, Resources
from efface.core.model import Model
from efface.core.task import Swap, Task
from efface.core.trajectories import TrajectoryMethod, predictions, visited
from efface.ops.descend import descend
from efface.ops.guidance import erase_goal
from efface.ops.latents import Latents, Pools

PLACE = "unet"


@final
@dataclass(frozen=True)
class DuMo(TrajectoryMethod):
    """Dual encoder modulation."""

    needs: ClassVar[Needs] = Needs(groups=("xattn",), gradients=True, keep="preserved")
    paper: ClassVar[Paper] = Paper(
        title="DuMo: Dual Encoder Modulation Network for Precise Concept Erasure",
        authors="Han, Chen, Gong, Wei, Chen, Jiang",
        venue="AAAI 2025",
        arxiv="2501.01125",
        code="Maplebb/DuMo",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "object": {},
        "style": {},
        "identity": {},
        "unsafe": {"gate": "none", "table_steps": 0, "joint_steps": 0},
        "check": {
            "steps": 2,
            "table_steps": 2,
            "joint_steps": 1,
            "batch": 2,
            "latent_steps": 2,
            "trajectories": 2,
            "others": 2,
            "lr": 1e-3,
        },
    }

    steps: int = 200
    """Steps of stage 1 for each target."""
    table_steps: int = 50
    """Steps of stage 2 on the table alone. With none of stage 2 there is no table."""
    joint_steps: int = 0
    """Steps of stage 2, behind these, on the table and the EPR."""
    lr: float = 2e-5
    """Learning rate of the EPR (AdamW), in units of Stable Diffusion 1.x (`Model.learning_rate`). Ours, chosen on the bundled one."""
    table_lr: float = 1e-2
    """Learning rate of the table (AdamW without decay). Not verified."""
    batch: int = 4
    """Rows of each term."""
    eta: float = 1.0
    """How far past the anchor the target is pushed (η). Not verified."""
    keep_weight: float = 1.0
    """Weight of other concepts in stage 2 (β). Not verified."""
    buckets: int = 20
    """Rows of the table (B): equal parts of the training times."""
    others: int = 20
    """Concepts beside those of `keep` in stage 2."""
    gate: Literal["spm", "none"] = "spm"
    """m: SPM's similarity of the prompt to the target's texts, or 1."""
    latents: Literal["replay", "aligned"] = "replay"
    """"replay": every latent of batches of whole trajectories (ours). "aligned": fresh ones to a random time for each step, as ESD."""
    latent_steps: int = 10
    """Times of the trajectories' grid; ESD's is 50."""
    latent_guidance: float = 3.0
    """Guidance of the trajectories (ESD's `start_guidance`)."""
    trajectories: int = 8
    """For "replay": how many trajectories are walked at a time for each term."""
    refresh: int = 20
    """For "replay": after how many steps they are renewed."""

    def __post_init__(self) -> None:
        least, weights = {"steps": 1, "table_steps": 0, "joint_steps": 0, "buckets": 1, "others": 1}, ("eta", "keep_weight")
        self.check_fields(at_least=least, above_zero=("lr", "table_lr"), from_zero=weights, one_of={"gate": ("spm", "none")})
        self.check_trajectories(("replay", "aligned"))

    @property
    def stages(self) -> int:
        """Steps for each target."""
        return self.steps + self.table_steps + self.joint_steps

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> FeatureEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            kept = [text for c in contrast(task, self.others, resources.vocabulary) for text in c.texts]
            duels = [Duel(self, fit, swap, kept) for swap in task.erase]
            for step in fit.steps(self.stages * len(duels), {k: v for i, duel in enumerate(duels) for k, v in duel.state(i).items()}):
                duel, own = duels[step // self.stages], step % self.stages
                fit.log(duel.step(own))
            residuals = Residuals(tuple(duel.eraser() for duel in duels))
            return FeatureEdit({PLACE: residuals}, fit.card(), {"trace": Part(fit.losses(), {"others": kept})})

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for "aligned"."""
        second, targets = self.table_steps + self.joint_steps, len(task.erase)
        walks = self.batch * (self.steps + 2 * second)
        if self.replays:
            walks = self.trajectories * sum(1 + (step >= self.steps) for step in range(self.stages) if self.begins(step))
        spent = self.forwards(targets * walks, beside=targets * self.batch * (3 * self.steps + 5 * second))
        return {"steps": targets * self.stages, "forwards": spent, "backwards": targets * self.batch * (self.steps + 2 * second)}

    def begins(self, step: int) -> bool:
        """Whether trajectories are walked before a step of a target: as for all methods, and where stage 2 begins."""
        return self.renews(step) or step == self.steps

    def memory(self, model: Model, task: Task) -> int:
        """Each target's EPR, its gradients and AdamW's moments (of both stages), and the pools; bytes."""
        behind = ("up_blocks.", "conv_norm_out.", "conv_out.")
        weights = sum(p.numel() for name, p in model.denoiser.named_parameters() if not name.startswith(behind))
        return len(task.erase) * (4 * (6 if self.joint_steps else 4) * weights + self.latent_bytes(model, sorts=2))


class Duel:
    """One target's eraser, its table, and what they are trained on."""

    def __init__(self, method: DuMo, fit: Fit, swap: Swap, kept: list[str]) -> None:
        self.method, self.fit, self.model, self.swap = method, fit, fit.model, swap
        self.net = PriorEraser(self.model).float()
        entries = torch.ones(method.buckets, len(self.net.zeros), device=self.model.device)
        self.table = nn.Parameter(entries)
        slow = {"params": list(self.net.parameters()), "lr": fit.rate}
        fast = {"params": [self.table], "lr": method.table_lr, "weight_decay": 0.0}
        self.optimisers = [torch.optim.AdamW(groups) for groups in ([slow], [fast], [dict(slow), dict(fast)])]
        self.pools = Pools()
        with torch.no_grad():
            texts = list(swap.target.texts)
            self.targets, self.others = self.model.encode(texts), self.model.encode(kept)
            self.anchor, self.null = self.model.encode([swap.anchor.texts[0]]), self.model.encode([""])

    def state(self, number: int) -> State:
        """For a checkpoint."""
        optimisers = {f"optimiser {i}": optimiser for i, optimiser in enumerate(self.optimisers)}
        parts: State = {"net": self.net, "table": nn.ParameterList([self.table]), "pools": self.pools, **optimisers}
        return {f"{number}.{name}": part for name, part in parts.items()}

    @contextmanager
    def erasing(self) -> Iterator[None]:
        """The network with the eraser as it stands."""
        remove = self.model.before_denoising(self.corrections)
        try:
            yield
        finally:
            remove()

    def corrections(self, x: Tensor, t: Tensor, tokens: Tensor) -> list[Tensor]:
        """s[b(t), j] · r_j."""
        return weighted(self.net(x, t, tokens), t, self.table, None, self.model.schedule.train_steps)

    def step(self, number: int) -> dict[str, float]:
        """One step of the stage that `number` lies in."""
        method = self.method
        second = number >= method.steps
        if method.begins(number):
            self.pools[:] = self.walked(second)
        losses = self.losses(second)
        stage = (number >= method.steps) + (number >= method.steps + method.table_steps)
        descend(losses["erase"] + method.keep_weight * losses.get("keep", 0.0), self.optimisers[stage])
        return {name: loss.item() for name, loss in losses.items()}

    def losses(self, second: bool) -> dict[str, Tensor]:
        """L1, and in stage 2 the term of other concepts."""
        batches = [self.method.rows(pool, self.fit.generator) for pool in self.pools]
        conds = [self.targets, self.others]
        prompts = [cond[rows.target] for cond, rows in zip(conds, batches, strict=False)]
        with torch.no_grad():
            neutral, *before = predictions(self.model, [batches[0], *batches], [self.anchor.expand(len(batches[0])), *prompts])
        goals = [erase_goal(neutral, before[0], self.method.eta), *before[1:]]
        with self.erasing():
            after = predictions(self.model, batches, prompts)
        distance = self.model.schedule.distance
        found = [distance("eps", rows.level, a, goal) for rows, a, goal in zip(batches, after, goals, strict=True)]
        return dict(zip(("erase", "keep"), found, strict=False))

    @torch.no_grad()
    def walked(self, second: bool) -> list[Latents]:
        """New latents for the target and, in stage 2, for other concepts, from the same noise; the network has its eraser."""
        method, model, generator = self.method, self.model, self.fit.generator
        conds, along = [self.targets, self.others][: 1 + second], method.way(model, generator)
        picks = [torch.randint(len(cond), (method.abreast,), generator=generator) for cond in conds]
        prompts = [cond[pick] for cond, pick in zip(conds, picks, strict=True)]
        with self.erasing():
            parts = visited(model, along, prompts, generator, null=self.null, guidance=method.latent_guidance)
        return [along.latents(part, pick) for part, pick in zip(parts, picks, strict=True)]

    def eraser(self) -> Eraser:
        """What was trained, on the CPU."""
        target, method = self.swap.target, self.method
        self.fit.finite({f"weight {name}": float(weight.abs().max()) for name, weight in self.net.state_dict().items()}, self.fit.total)
        weights = {name: weight.detach().cpu() for name, weight in self.net.state_dict().items()}
        table = self.table.detach().cpu() if method.table_steps + method.joint_steps else None
        return Eraser(target.name, weights, table, PromptGate((target.texts,)) if method.gate == "spm" else None)

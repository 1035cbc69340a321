"""SPM, the semi-permeable membrane: a rank-1 adapter beside every map of the denoiser's transformer blocks, as strong as the prompt asks.

Fitting, for a membrane M on a frozen network θ, target c, anchor 0 (`""` by default) and latents x from M's own guided trajectory for c:

    mean ‖ε_M(x, c) − [ε_θ(x, 0) − η (ε_θ(x, c) − ε_θ(x, 0))]‖²  +  λ mean ‖ε_M(x, z) − ε_θ(x, z)‖²

η = `eta`, λ = `keep_weight`, z = `anchors` surrogate concepts a row: s ‖E(c)‖ u with s uniform in [0.8, 1.2] and u a random direction,
kept with the probability 1 − cos(u, E(c)) (latent anchoring). So many dimensions make that cosine nearly 0 always: anchors are noise of
the right length and not texts. Sampling: y = W x + Σ_c γ_c(p) U_c (D_c x) for a prompt p, with the facilitated transport γ of `core.gate`.

Trained: D (Kaiming-uniform at first) and U (zero at first) of every linear map and convolution in the transformer blocks, 192 maps and
423,936 numbers on SD 1.4. A step costs 3 + 2B forwards and 1 + B backwards a row (B = `anchors`), trajectories on top (`cost`). Several
targets have a membrane each, fitted one after the other and independently; several texts of one target share one. Sampling costs one
extra thin product a map, and no call of the denoiser.

The preset "authors" is the released configuration; the defaults depart from it for speed: latents of whole trajectories are replayed while
the membrane moves on (`latents="replay"`), rows are batched, steps are fewer, and λ is 10 for 1000, with which so few steps erase
nothing on the bundled model. AdamW is torch's, not the 8-bit one, and predictions at
scale 1 leave out the unconditional half that the code computes and does not use. `merge="repo"` reproduces how the code merges membranes (γ
on D and U, which squares it and adds cross terms); the default is the formula. The paper's text was not read: this is its code.

Known failures: the gate goes by the text, so that prompts which paraphrase the concept, and whoever can remove a hook, pass it; as plain
weights (`edit.ungated()`, any LoRA file) it is lost, and unrelated prompts suffer (`edit.lost_in_weights`). γ is far from 0 even for
unrelated prompts, because start and padding rows are alike; the trace holds it for the empty prompt and for `keep`. SPEED's authors
report a collapse from 50 celebrities on, with the code's merge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from efface.core.edit import LowRankEdit, Part
from efface.core.fitting import State, fitting
from efface.core.gate import PromptGate
from efface.core.method import Expectation, Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.sampling import seeded
from efface.core.task import Swap, Task
from efface.core.trajectories import TrajectoryMethod
from efface.ops.descend import descend
from efface.ops.gate import MERGES, TRANSPORTS, Merge, Transport
from efface.ops.guidance import erase_goal
from efface.ops.latents import Latents, Pools, Route, replay_route, walk
from efface.ops.lowrank import Adapter, can_adapt


def surrogates(target: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` surrogate concepts (b·count l d) for each encoding (b l d), in its order: s ‖E(c)‖_F u, drawn as the module says."""
    flat = target.float().flatten(1).repeat_interleave(count, 0).cpu()
    u, waiting = torch.empty_like(flat), torch.ones(len(flat), dtype=torch.bool)
    while waiting.any():
        drawn = torch.randn(int(waiting.sum()), flat.shape[1], generator=generator)
        u[waiting] = drawn / drawn.norm(dim=1, keepdim=True)
        cosine = torch.cosine_similarity(u, flat, dim=1)
        waiting &= torch.rand(len(flat), generator=generator) >= 1 - cosine
    length = (0.8 + 0.4 * torch.rand(len(flat), 1, generator=generator)) * flat.norm(dim=1, keepdim=True)
    return (length * u).unflatten(1, target.shape[1:]).to(target)


def rate_factor(step: int, total: int, warmup: float, cycles: int) -> float:
    """The learning rate's share at a step: rises linearly over the share `warmup` of the steps, then `cycles` times falls as a cosine."""
    rising = warmup * total
    if step < rising:
        return step / rising
    progress = (step - rising) / max(1.0, total - rising)
    return 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))


def authors_route(train_steps: int, steps: int, rows: int, generator: torch.Generator) -> Route:
    """k steps of a grid that starts at T − T/n, k uniform in 1 … n − 1; the networks are told T − 1 − ⌊k T/n⌋, which is noisier than
    where the walk ends (LECO's sampler with 30 steps, then a schedule of 1000)."""
    stride, k = train_steps // steps, 1 + int(torch.randint(steps - 1, (1,), generator=generator))
    times = torch.tensor([(steps - 1 - j) * stride for j in range(k + 1)])[:, None].expand(-1, rows)
    told = torch.full((1, rows), train_steps - 1 - k * train_steps // steps)
    return Route(times, told, told)


@final
@dataclass(frozen=True)
class SPM(TrajectoryMethod):
    """Concept semi-permeable membrane."""

    needs: ClassVar[Needs] = Needs(groups=("xattn",), gradients=True, keep="measured only")
    paper: ClassVar[Paper] = Paper(
        title="One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications",
        authors="Lyu, Yang, Hong, Chen, Jin, He, Xue, Han, Ding",
        venue="CVPR 2024",
        arxiv="2312.16145",
        code="Con6924/SPM",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": {"steps": 3000, "batch": 1, "latents": "authors", "latent_steps": 30, "dynamic_size": True, "keep_weight": 1000.0},
    }

    steps: int = 200
    """Steps for each target; the code's "iterations"."""
    lr: float = 1e-4
    """Largest learning rate (AdamW), in units of Stable Diffusion 1.x (`Model.learning_rate`)."""
    warmup: float = 1 / 6
    """Share of the steps in which the learning rate rises (500 of 3000); 0 to 1."""
    cycles: int = 3
    """How many times the learning rate then falls to zero as a cosine."""
    batch: int = 4
    """Rows of latents in a step."""
    eta: float = 1.0
    """How far past the anchor the target is pushed (η, the code's `guidance_scale`)."""
    keep_weight: float = 10.0
    """Weight of latent anchoring (λ, the code's `la_strength`, which is 1000)."""
    anchors: int = 4
    """Surrogate concepts for each row (B, the code's `sampling_batch_size`); 0 is the code's mode "erase", without anchoring."""
    transport: Transport = "clipcos_tokenuni"
    """The gate γ: "clipcos_tokenuni" (the larger of cosine and shared tokens), either alone, or "allone" (γ = 1)."""
    merge: Merge = "sum"
    """How membranes add up: "sum" (the formula) or "repo" (the released code)."""
    latents: Literal["replay", "authors"] = "replay"
    """"replay": every latent of batches of whole trajectories (ours). "authors": a fresh walk of 1 to n − 1 steps for each step."""
    latent_steps: int = 10
    """Times of the trajectories' grid (n); the authors' is 30."""
    latent_guidance: float = 3.0
    """Guidance of the trajectories."""
    trajectories: int = 4
    """For "replay": how many trajectories are walked at a time."""
    refresh: int = 20
    """For "replay": after how many steps the trajectories are renewed."""
    dynamic_size: bool = False
    """Whether latents have random sides of 4/8 to 7/8 of the model's own (256 to 448 pixels of 512)."""

    def __post_init__(self) -> None:
        least, choices = {"steps": 1, "cycles": 1, "anchors": 0}, {"transport": TRANSPORTS, "merge": MERGES}
        self.check_fields(at_least=least, above_zero=("lr",), from_zero=("warmup", "eta", "keep_weight"), one_of=choices)
        self.check_field("warmup", self.warmup <= 1, "a share from 0 to 1")
        self.check_trajectories(("replay", "authors"))

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> LowRankEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            membranes = [Membrane(self, model, swap, seed) for swap in task.erase]
            state = {f"{name} of {m.texts[0]}": part for m in membranes for name, part in m.state.items()}
            for step in fit.steps(self.steps * len(membranes), state):
                index, local = divmod(step, self.steps)
                fit.log(membranes[index].step(local, fit.rate))
            gate = PromptGate(tuple(m.texts for m in membranes), self.transport, self.merge)
            factors = _stacked([m.adapter.learned() for m in membranes])
            fit.finite({f"change of {n}": float(up.abs().max() * down.abs().max()) for n, (down, up) in factors.items()}, fit.total)
            leaks = _leaks(gate, model, task)
            return LowRankEdit(factors, fit.card(), {"trace": Part(fit.losses(), {"transport": leaks})}, gate=gate)

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn lengths for "authors"."""
        n, targets, walks = self.latent_steps, len(task.erase), len(task.erase) * self.walks(self.steps)
        rows, calls = targets * self.steps * self.batch, (n - 1, n - 1, n - 1) if self.replays else (n / 2, 1, n - 1)
        halves = 1 if self.latent_guidance == 1 else 2
        spent = Expectation(*(rows * (3 + 2 * self.anchors) + walks * halves * count for count in calls))
        return {"steps": targets * self.steps, "forwards": spent, "backwards": rows * (1 + self.anchors)}

    def memory(self, model: Model, task: Task) -> int:
        """The membranes with gradients and AdamW's moments, and the latents kept; bytes."""
        numbers = sum(m.weight.numel() // len(m.weight) + len(m.weight) for m in maps(model).values())
        return len(task.erase) * (16 * numbers + self.latent_bytes(model))


def maps(model: Model) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear map and convolution of the transformer blocks by full name: where membranes stand."""
    blocks = model.hook_points("transformer").items()
    inner = ((f"{name}.{path}", module) for name, block in blocks for path, module in block.named_modules())
    return {name: module for name, module in inner if can_adapt(module)}


class Membrane:
    """One target's membrane and what it is fitted with; its draws do not depend on the other targets'."""

    def __init__(self, method: SPM, model: Model, swap: Swap, seed: int) -> None:
        self.method, self.model, self.generator, self.texts = method, model, seeded(seed), swap.target.texts
        places = maps(model)
        self.adapter = Adapter(places, {name: start(module, self.generator) for name, module in places.items()})
        self.optimiser = torch.optim.AdamW(self.adapter.parameters)
        self.pools = Pools()
        with torch.no_grad():
            self.null, self.targets, self.anchor = (model.encode(texts) for texts in ([""], self.texts, swap.anchor.texts[:1]))
        factors = nn.ParameterList(self.adapter.parameters)
        self.state: State = {"factors": factors, "optimiser": self.optimiser, "pools": self.pools, "draws": self.generator}

    def step(self, number: int, rate: float) -> dict[str, float]:
        """Erase and anchor: one step on the factors."""
        method, rows = self.method, self.latents(number)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * rate_factor(number, method.steps, method.warmup, method.cycles)
        target = self.targets[rows.target]
        around = Cond(surrogates(target.tokens, method.anchors, self.generator)) if method.anchors else None
        with torch.no_grad():
            neutral, toward, before = self.predict(rows, [self.anchor.expand(len(rows)), target], around)
        with self.adapter:
            erased, after = self.predict(rows, [target], around)
            goal = erase_goal(neutral, toward, method.eta)
            erase = self.model.schedule.distance("eps", rows.level, erased, goal)
            levels = rows.level.repeat_interleave(method.anchors)
            keep = self.model.schedule.distance("eps", levels, after, before) if method.anchors else torch.zeros(())
            descend(erase + method.keep_weight * keep, self.optimiser)
        return {"erase": erase.item(), "keep": keep.item()}

    def predict(self, rows: Latents, prompts: Sequence[Cond], around: Cond | None) -> tuple[Tensor, ...]:
        """A prediction for each of the prompts and one for all surrogates, in one call."""
        sizes = [len(rows)] * len(prompts) + [0 if around is None else len(around)]
        index = torch.cat([torch.arange(len(rows))] * len(prompts) + [torch.arange(len(rows)).repeat_interleave(self.method.anchors)])
        cond = Cond.cat([Cond(p.tokens) for p in (*prompts, *([] if around is None else [around]))])
        used = rows.rows(index)
        return self.model.predict(used.x, used.told, cond).split(sizes)

    def latents(self, number: int) -> Latents:
        """The rows of one step."""
        if self.method.renews(number):
            self.pools[:] = [self.walked()]
        return self.method.rows(self.pools[0], self.generator)

    def walked(self) -> Latents:
        """New latents: trajectories for the target, guided, with the membrane in place."""
        method, schedule, generator, rows = self.method, self.model.schedule, self.generator, self.method.abreast
        make = replay_route if method.replays else authors_route
        route = make(schedule.train_steps, method.latent_steps, rows, generator)
        target = torch.randint(len(self.targets), (rows,), generator=generator)
        z = torch.randn(rows, *self.size(), generator=generator).to(self.model.device)
        cond = self.targets[target]
        with self.adapter:
            found = walk(z, route.times, lambda x, t: self.model.guided(x, t, cond, self.null, method.latent_guidance), schedule.ddim_step)
        return route.latents(found, target)

    def size(self) -> tuple[int, int, int]:
        """(c, h, w) of the next latents."""
        channels, *sides = self.model.latent_shape
        if self.method.dynamic_size:
            sides = [max(1, side // 8) * int(torch.randint(4, 8, (1,), generator=self.generator)) for side in sides]
        return channels, sides[0], sides[1]


def start(module: nn.Linear | nn.Conv2d, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """D (1, i, …) uniform within ±1/√(inputs), which is Kaiming's with a = √5, and U (o, 1, …) zero."""
    weight = module.weight
    inputs = weight[0].numel()
    down = (2 * torch.rand(1, *weight.shape[1:], generator=generator) - 1) / math.sqrt(inputs)
    return down.to(weight.device), torch.zeros(len(weight), 1, *(1,) * (weight.ndim - 2), device=weight.device)


def _stacked(membranes: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of all membranes as one of rank k, by parameter name."""
    pairs = {name: [m[name] for m in membranes] for name in membranes[0]}
    return {f"{name}.weight": (torch.cat([d for d, _ in each]), torch.cat([u for _, u in each], 1)) for name, each in pairs.items()}


def _leaks(gate: PromptGate, model: Model, task: Task) -> dict[str, list[float]]:
    """γ of each membrane for the targets, for nothing, and for what is kept."""
    texts = dict.fromkeys([*task.texts, "", *(text for concept in task.keep for text in concept.texts)])
    with torch.no_grad():
        return {text: [round(g, 4) for g in gate.strengths(model, model.encode([text]))[0].tolist()] for text in texts}

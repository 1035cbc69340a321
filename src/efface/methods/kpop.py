"""KPOP, knowledge hiding and recovery with prompts: a few extra cross-attention tokens take the concept over from the weights.

By turns, with the student θ', the frozen θ, the target c_e, its anchor c_n (`""` by default), latents z of the student's own guided
trajectories for c_e, and the prompt p = (p_K, p_V) of c_e, `tokens` rows each in K = [c; p_K] W_K and V = [c; p_V] W_V (`core.key`):

    A (θ' fixed, on p):   ‖ε_θ'(z, c_e, p) − ε_θ(z, c_e)‖²
    B (p fixed, on θ'):   w_o ‖ε_θ'(z, c_e) − G‖² + w_w ‖ε_θ'(z, c_e, p) − T‖²,     G = ε_θ(c_n) − η (ε_θ(c_e) − ε_θ(c_n))

η = `eta`, w_o = `erase_weight`, w_w = `key_weight`. `with_key="recover"`: T = ε_θ(z, c_e), and p is the key that gives the concept back
(the paper's v3; our default); "remove": T = G, and p is a training aid that is thrown away (its v1 and v2). With w_w = 0 stage B is ESD.

Trained: the parameters of `group`, and 2 · m · d numbers a target. A weight step costs 4 forwards and 2 backwards a row (3 and 1 with
w_w = 0), a prompt step 2 and 1; trajectories come on top (`cost`). The public model costs nothing more, the key m tokens a layer.

**Not a reproduction.** The trainer's code and the paper's text could not be had. Where the tokens enter is the authors' code; the losses
and the alternation are a reconstruction from their later forks, summaries and file names, and so are the space of the losses
(`loss_space`), the latents (AP's) and how p begins (`key_init`). The preset "authors" holds what their file names show; there p moves
by 0.01 at most, so that the key can hardly learn: our default of `key_lr` is larger. Latents are replayed by default, as for AP.

**A key is not security.** The public weights still hold the concept, by design; whoever has them can fit a key of their own, and attacks
that search embeddings or prompts should be expected to succeed. It is reversible hiding with weak access control, not erasure.

Known failures: in the authors' result files it erases most and preserves least among the fine-tuners on objects; several keys do not
compose; the key joins the unconditional half of guidance too, as in the authors' sampler; zero tokens are no neutral key, since they
take their share of the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from efface.core.edit import WeightEdit
from efface.core.fitting import State, fitting
from efface.core.key import MODES, Mode, make_key, places
from efface.core.method import Needs, Paper, Resources
from efface.core.model import Model
from efface.core.task import Task
from efface.core.trajectories import TrajectoryMethod, predictions
from efface.ops.descend import accumulate, descend, step
from efface.ops.guidance import erase_goal
from efface.ops.keyed import keyed
from efface.ops.latents import Latents, Pools
from efface.ops.overlay import Overlay, training_bytes

AUTHORS = {"steps": 1000, "batch": 1, "key_lr": 1e-5, "latents": "authors", "latent_steps": 50}
"""What the names of the authors' result files show, and AP's latents."""


@final
@dataclass(frozen=True)
class KPOP(TrajectoryMethod):
    """Knowledge hiding and recovery with prompts."""

    needs: ClassVar[Needs] = Needs(groups=("xattn", "text_kv"), gradients=True, keep="measured only")
    paper: ClassVar[Paper] = Paper(
        title="Hiding and Recovering Knowledge in Text-to-Image Diffusion Models via Learnable Prompts",
        authors="Bui, Doan, Le, Montague, Abraham, Phung",
        venue="ICLR 2025 DeLTa workshop",
        arxiv="2403.12326",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": AUTHORS,
        "authors-nudity": {**AUTHORS, "group": "noxattn"},
        "remove": {"with_key": "remove"},
        "object": {},
        "style": {},
        "identity": {},
        "unsafe": {"group": "noxattn"},
    }

    steps: int = 200
    """Steps on the network."""
    lr: float = 1e-5
    """Learning rate of the network (Adam), in units of Stable Diffusion 1.x (`Model.learning_rate`)."""
    batch: int = 8
    """Rows of a step."""
    group: str = "xattn"
    """The parameters that are trained; "noxattn" for nudity."""
    eta: float = 1.0
    """How far past the anchor the target is pushed (η)."""
    erase_weight: float = 1.0
    """Weight of the erasure without the key (w_o, the code's `erase_wo_prompt`)."""
    key_weight: float = 0.1
    """Weight of the term with the key (w_w, the code's `erase_w_prompt`)."""
    with_key: Literal["recover", "remove"] = "recover"
    """What the key shall give: "recover", the concept (v3 of the paper), or "remove", what is there without it (v1 and v2)."""
    tokens: int = 10
    """Extra tokens for keys and for values each (m)."""
    mode: Mode = "mid"
    """Where they enter: "mid", the middle block's cross-attention; "midout", the upper half's too; "inmidout", all."""
    key_lr: float = 1e-2
    """Learning rate of the tokens (Adam); the authors' is 1e-5."""
    key_steps: int = 1
    """Steps on the tokens before each step on the network; the code's `prompt_optk` is one more."""
    key_init: Literal["empty", "noise"] = "empty"
    """How the tokens begin: "empty", the first rows of the empty prompt's encoding; "noise", of their length in random directions."""
    loss_space: Literal["x0", "eps"] = "x0"
    """Where distances are taken: "x0", predicted clean latents (as the authors' later code), or "eps", noise."""
    latents: Literal["replay", "authors", "aligned"] = "replay"
    """"replay": every latent of batches of whole trajectories (ours). Fresh ones for each step: "authors" with the sampler of the authors'
    code, "aligned" with one that ends at the time that the network is told."""
    latent_steps: int = 10
    """Times of the trajectories' grid; the authors' is 50."""
    latent_guidance: float = 3.0
    """Guidance of the trajectories (the code's `start_guidance`)."""
    trajectories: int = 8
    """For "replay": how many trajectories are walked at a time."""
    refresh: int = 20
    """For "replay": after how many steps of either kind the trajectories are renewed."""

    def __post_init__(self) -> None:
        least, weights = {"steps": 1, "tokens": 1, "key_steps": 0}, ("eta", "erase_weight", "key_weight")
        choices = {"with_key": ("recover", "remove"), "mode": MODES, "key_init": ("empty", "noise"), "loss_space": ("x0", "eps")}
        self.check_fields(at_least=least, above_zero=("lr", "key_lr"), from_zero=weights, one_of=choices)
        self.check_trajectories(("replay", "authors", "aligned"))

    @property
    def period(self) -> int:
        """Steps from one step on the network to the next."""
        return 1 + self.key_steps

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            play = Play(self, model, task, fit.generator)
            descent = torch.optim.Adam(play.student.parameters, lr=fit.rate)
            learning = torch.optim.Adam([*play.p_key, *play.p_value], lr=self.key_lr)
            for step in fit.steps(self.steps * self.period, {**play.state, "descent": descent, "learning": learning}):
                if self.renews(step):
                    play.pools[:] = [play.walked()]
                fit.log(play.model_step(descent) if (step + 1) % self.period == 0 else play.key_step(learning))
            edit = fit.edit(play.student.deltas())
            if self.with_key == "remove":
                return edit
            pairs = zip(play.p_key, play.p_value, strict=True)
            return replace(edit, extras={**edit.extras, "key": make_key(dict(zip(task.texts, pairs, strict=True)), self.mode)})

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact for "replay"; the expectation over the drawn times for the others."""
        learning, terms = self.steps * self.key_steps, 2 if self.key_weight else 1
        beside = self.batch * ((2 + terms) * self.steps + 2 * learning)
        spent = self.forwards(self.walks(self.steps + learning), beside=beside)
        return {"steps": self.steps + learning, "forwards": spent, "backwards": self.batch * (terms * self.steps + learning)}

    def memory(self, model: Model, task: Task) -> int:
        """The student and the tokens with Adam, and the pool; bytes."""
        numbers = 2 * self.tokens * model.encode([""]).tokens.shape[-1] * len(task.texts)
        return training_bytes(model.select(self.group)) + 16 * numbers + self.latent_bytes(model)


class Play:
    """The student, the tokens of each target text, prompts and latents."""

    def __init__(self, method: KPOP, model: Model, task: Task, generator: torch.Generator) -> None:
        self.method, self.model, self.generator = method, model, generator
        with torch.no_grad():
            self.null, self.targets, self.anchors = (model.encode(texts) for texts in ([""], list(task.texts), list(task.texts.values())))
        self.places = places(model, method.mode)
        self.p_key, self.p_value = (nn.ParameterList(self.begun() for _ in task.texts) for _ in range(2))
        self.student, self.pools = Overlay(model.select(method.group)), Pools()
        self.state: State = {"student": self.student, "p_key": self.p_key, "p_value": self.p_value, "pools": self.pools}

    def begun(self) -> Tensor:
        """The tokens (m d) of one side of one target, float32, before any step."""
        rows = self.null.tokens[0].float()
        rows = rows.repeat(-(-self.method.tokens // len(rows)), 1)[: self.method.tokens]
        if self.method.key_init == "empty":
            return rows.clone()
        drawn = torch.randn(rows.shape, generator=self.generator).to(rows)
        return drawn / drawn.norm(dim=1, keepdim=True) * rows.norm(dim=1, keepdim=True)

    def key(self, target: Tensor, *, fixed: bool) -> AbstractContextManager[None]:
        """The network with the tokens of each row's target (b); `fixed` ones are constants."""
        sides = (torch.stack(list(side))[target.to(side[0].device)] for side in (self.p_key, self.p_value))
        p_key, p_value = (side.detach() if fixed else side for side in sides)
        return keyed(*self.places, p_key, p_value)

    # -- latents ---------------------------------------------------------------------------------------------------------
    def walked(self) -> Latents:
        """New latents: the student's guided trajectories for the targets, without a key."""
        with self.student:
            return self.method.walked(self.model, self.targets, self.generator, null=self.null)

    def latents(self) -> Latents:
        """Rows for one step."""
        return self.method.rows(self.pools[0], self.generator)

    # -- moves -----------------------------------------------------------------------------------------------------------
    def key_step(self, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        """Stage A: the tokens learn the concept back in the student as it is."""
        rows = self.latents()
        target = self.targets[rows.target]
        with torch.no_grad():
            before = self.model.predict(rows.x, rows.told, target)
        with self.student, self.key(rows.target, fixed=False):
            transfer = self.distance(rows, self.model.predict(rows.x, rows.told, target), before)
            descend(transfer, optimiser)
        return {"transfer": transfer.item()}

    def model_step(self, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        """Stage B: the student forgets the concept without the tokens, and with them goes to T."""
        method, rows = self.method, self.latents()
        target, anchor = self.targets[rows.target], self.anchors[rows.target]
        with torch.no_grad():
            neutral, toward = predictions(self.model, [rows, rows], [anchor, target])
        goal = erase_goal(neutral, toward, method.eta)
        with self.student:
            erase = self.distance(rows, self.model.predict(rows.x, rows.told, target), goal)
            accumulate(method.erase_weight * erase, optimiser)
            figures = {"erase": erase.item()}
            if method.key_weight:
                with self.key(rows.target, fixed=True):
                    opened = self.model.predict(rows.x, rows.told, target)
                    keyed_loss = self.distance(rows, opened, toward if method.with_key == "recover" else goal)
                    accumulate(method.key_weight * keyed_loss, optimiser)
                figures["with key"] = keyed_loss.item()
            step(optimiser)
        return figures

    def distance(self, rows: Latents, prediction: Tensor, goal: Tensor) -> Tensor:
        return self.model.schedule.distance(self.method.loss_space, rows.level, prediction, goal)

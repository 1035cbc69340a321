"""Trains a sparse autoencoder on the features of one block of a model, from a stream: nothing is stored but a pool of vectors.

    loss = Σ ‖x̂ − x‖² / Σ ‖x − x̄‖²  +  α AuxK                                       (`ops.sae`)

Prompts are drawn, guided trajectories are walked from noise to picture, and the block's output (residual stream included, conditional half
only) at every place and every time goes into a pool of the latest vectors. Each step of Adam draws a batch from it; every `refill` steps
the oldest part of the pool is replaced. The paper stores all features of its prompts instead: 2.7 TB for a block of Stable Diffusion.

A step, in the order of the released code: decoder rows to unit length, loss, gradient norm to at most 1, the part of the decoder's
gradient along its rows taken out, Adam at a rate that falls linearly to 0, counters of silent latents. No gradient reaches the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from efface.core.autoencoder import Autoencoder, place_of
from efface.core.card import Fingerprint
from efface.core.errors import InvalidMethod, InvalidTask
from efface.core.fitting import Fit, fitting
from efface.core.method import Resources
from efface.core.model import Model
from efface.core.sampling import noise_for
from efface.models.load import BUNDLED
from efface.ops.latents import walk
from efface.ops.sae import (
    SparseAutoencoder,
    across,
    batch_top_k,
    dead_loss,
    geometric_median,
    normalise_rows,
    top_k,
    unexplained,
)

WIDTH_OF_K = 40
"""The paper's d / k: 1280 / 32."""
_NO_TASK: Any = None
"""An autoencoder is trained for no task in particular."""


@final
@dataclass(frozen=True)
class Training:
    """How an autoencoder is trained. Raises InvalidMethod for a value out of range.

    The defaults are meant for the bundled model. The paper's run is `Training.authors()`: 260,000 steps an epoch, of which it takes five
    to ten; with its pool of 1 GB each vector is drawn once on average."""

    block: str = ""
    """The block by its full name; "" is the paper's by role (`core.autoencoder.place_of`)."""
    expansion: int = 16
    """n / d, latents for each dimension of the block."""
    k: int = 0
    """Latents that fire for each vector; 0 is d / 40 as in the paper, and at least 8."""
    steps: int = 3000
    """Steps of Adam."""
    batch: int = 2048
    """Vectors in a step."""
    lr: float = 4e-4
    """Learning rate at the beginning; it falls linearly to 0."""
    aux_weight: float = 1 / 32
    """Weight of the loss of dead latents (α)."""
    dead_after: int = 200_000
    """After how many vectors without firing a latent is dead; the authors' is 10,000,000."""
    aux: Literal["residual", "repo"] = "residual"
    """What dead latents predict: the residual, or, as released, its negative (`ops.sae.dead_loss`)."""
    top_k: Literal["batch", "vector"] = "batch"
    """Whether k is a mean over the batch (the paper) or holds for each vector. After training it always holds for each."""
    trajectories: int = 32
    """Prompts that are walked at a time."""
    latent_steps: int = 20
    """Times of a trajectory; the authors' is 50."""
    latent_guidance: float | None = None
    """Guidance of the trajectories; None is the model's own, the authors' is 9."""
    refill: int = 20
    """Steps from one replacement of a part of the pool to the next; on the bundled model a vector is drawn 4 times on average."""
    pool: int = 8
    """Parts of the pool, each from `trajectories` prompts at all times."""

    name_: ClassVar[str] = "sae"

    def __post_init__(self) -> None:
        least = {
            "expansion": 1,
            "k": 0,
            "steps": 1,
            "batch": 2,
            "dead_after": 1,
            "trajectories": 1,
            "latent_steps": 1,
            "refill": 1,
            "pool": 1,
        }
        for name, low in least.items():
            self._check(name, type(getattr(self, name)) is int and getattr(self, name) >= low, f"an integer of at least {low}")
        self._check("lr", 0 < self.lr < math.inf, "a number above 0")
        self._check("aux_weight", 0 <= self.aux_weight < math.inf, "a number of at least 0")
        self._check("aux", self.aux in ("residual", "repo"), "residual or repo")
        self._check("top_k", self.top_k in ("batch", "vector"), "batch or vector")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise InvalidMethod(f"the training's {name} was {getattr(self, name)!r}; expected {expected}")

    @classmethod
    def authors(cls) -> Training:
        """The released run for a block of Stable Diffusion at 512 pixels, but streamed."""
        return cls(
            k=32,
            steps=1_300_000,
            batch=4096,
            dead_after=10_000_000,
            aux="repo",
            latent_steps=50,
            latent_guidance=9.0,
            trajectories=4,
            pool=4,
            refill=12,
        )

    # -- what `fitting` asks ---------------------------------------------------------------------------------------------
    @classmethod
    def name(cls) -> str:
        return cls.name_

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"sae({', '.join(changed)})"

    def trained(self, model: Model) -> tuple[str, ...]:
        """Nothing of the model."""
        return ()

    def require(self, model: Model, task: object) -> None:
        """Raises Unsupported where the model has no such block."""
        model.module(self.place(model))

    def place(self, model: Model) -> str:
        """The block's full name."""
        return self.block or place_of(model)

    def guidance(self, model: Model) -> float:
        scale = model.default_guidance if self.latent_guidance is None else self.latent_guidance
        return scale if scale > 1 else 1.0

    def refills(self) -> int:
        """How often trajectories are walked, the held-out ones included."""
        return self.pool + math.ceil(self.steps / self.refill)

    def cost(self, model: Model, task: object = None) -> dict[str, float]:
        """Exact: no backward reaches the denoiser."""
        halves = 1 if self.guidance(model) == 1 else 2
        return {"steps": self.steps, "forwards": self.refills() * self.trajectories * self.latent_steps * halves}

    def memory(self, model: Model, task: object = None) -> int:
        """The autoencoder with its gradients and Adam's moments, and the pool; bytes."""
        places, width = size(model, self.place(model))
        vectors = self.pool * self.trajectories * self.latent_steps * places
        return 4 * (4 * 2 * self.expansion * width * width + vectors * width)


def train(
    model: Model, prompts: Sequence[str], training: Training = Training(), *, seed: int = 0, resources: Resources = Resources()
) -> Autoencoder:
    """Trains an autoencoder on the features that a model has while it draws `prompts`; the model is left as it was.

    Goes on after a kill with `resources.checkpoint`. Raises InvalidTask for no prompt, Unsupported for a block that is not there,
    Diverged."""
    if not prompts:
        raise InvalidTask("an autoencoder is trained on prompts, and none was given; give some that cover what is to be erased later")
    with fitting(training, model, _NO_TASK, seed, replace(resources, vocabulary=tuple(prompts))) as fit:
        stream = Stream(fit, training, prompts)
        trainer = Trainer(training, stream.width, fit.generator, model.device)
        for step in fit.steps(training.steps, {"net": trainer.net, "optimiser": trainer.optimiser, "stream": stream}):
            if step == 0:
                stream.fill()
                trainer.centre(stream.draw(training.batch))
            elif step % training.refill == 0:
                stream.replace()
            fit.log(trainer.step(stream.draw(training.batch), 1 - step / training.steps))
        normalise_rows(trainer.net.decoder)
        share = trainer.net.unexplained(stream.walked())
        info = {**asdict(training), "seed": seed, "prompts": len(prompts), "last": fit.figures[-1], "cost": model.meter.read()}
        net = trainer.net.cpu().requires_grad_(False)
        return Autoencoder(net, training.place(model), model.id, model.family, Fingerprint.of(model), share, info)


def bundled(model: Model) -> Autoencoder | None:
    """The autoencoder that comes with a bundled model; None where there is none for these very weights."""
    folder = BUNDLED.get(model.id)
    path = None if folder is None else folder.parent / "sae.safetensors"
    if path is None or not path.is_file():
        return None
    found = Autoencoder.load(path)
    return found if found.fingerprint.same_weights(Fingerprint.of(model, original=True)) else None


class Trainer:
    """The autoencoder and its optimiser."""

    def __init__(self, training: Training, width: int, generator: torch.Generator, device: torch.device) -> None:
        self.training = training
        k = training.k or max(8, width // WIDTH_OF_K)
        latents = training.expansion * width
        self.net = SparseAutoencoder.fresh(width, latents, min(k, latents), generator).to(device)
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=training.lr, eps=6.25e-10)

    def centre(self, x: Tensor) -> None:
        """b_dec begins as the geometric median of the first batch x (v d)."""
        with torch.no_grad():
            self.net.decoder_bias.copy_(geometric_median(x))

    def step(self, x: Tensor, share: float) -> dict[str, float]:
        """One step on vectors x (v d) at `share` of the rate; the figures."""
        net, training = self.net, self.training
        normalise_rows(net.decoder)
        a = net.activations(x)
        z = batch_top_k(a, net.k) if training.top_k == "batch" else top_k(a, net.k)
        guess, dead = net.decode(z), net.silent > training.dead_after
        error = unexplained(guess, x)
        aux = dead_loss(a, dead, net, guess, x, repo=training.aux == "repo")
        self._descend(error + training.aux_weight * aux, share)
        fired = (z > 0).any(0)
        net.silent.add_(len(x)).masked_fill_(fired, 0)
        return {"unexplained": error.item(), "aux": aux.item(), "dead": dead.float().mean().item()}

    def _descend(self, loss: Tensor, share: float) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        gradient = self.net.decoder.grad
        if gradient is not None:
            gradient.copy_(across(gradient, self.net.decoder.detach()))
        for group in self.optimiser.param_groups:
            group["lr"] = share * self.training.lr
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


class Stream:
    """The pool of the latest vectors of a block, renewed part by part."""

    def __init__(self, fit: Fit, training: Training, prompts: Sequence[str]) -> None:
        self.fit, self.training, self.prompts = fit, training, list(prompts)
        self.place = training.place(fit.model)
        places, self.width = size(fit.model, self.place)
        self.part = training.trajectories * training.latent_steps * places
        self.pool = torch.zeros(training.pool * self.part, self.width, device=fit.model.device)
        self.oldest = 0

    def fill(self) -> None:
        """All parts."""
        for _ in range(self.training.pool):
            self.replace()

    def replace(self) -> None:
        """A new part in the place of the oldest."""
        self.pool[self.oldest * self.part :][: self.part] = self.walked()
        self.oldest = (self.oldest + 1) % self.training.pool

    def draw(self, count: int) -> Tensor:
        """`count` vectors (v d) at random."""
        return self.pool[torch.randint(len(self.pool), (count,), generator=self.fit.generator).to(self.pool.device)]

    def walked(self) -> Tensor:
        """The vectors (v d) of new trajectories, float32."""
        training, generator = self.training, self.fit.generator
        chosen = torch.randint(len(self.prompts), (training.trajectories,), generator=generator).tolist()
        z = torch.randn(training.trajectories, *self.fit.model.latent_shape, generator=generator)
        times = self.fit.model.schedule.grid(training.latent_steps)
        features = traced(self.fit.model, self.place, [self.prompts[i] for i in chosen], z, times, training.guidance(self.fit.model))
        return features.flatten(0, 2).float()

    def state_dict(self) -> dict[str, Any]:
        return {"pool": self.pool, "oldest": self.oldest}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self.pool, self.oldest = state_dict["pool"], state_dict["oldest"]


@torch.no_grad()
def size(model: Model, place: str) -> tuple[int, int]:
    """(p, d) of a block: how many vectors it gives for a latent, and their width. One call, which is not metered."""
    meter = model.meter
    spent = meter.forwards, meter.calls
    with watching(model, place) as seen:
        model.predict(noise_for(0, 1, model.latent_shape).to(model.device, model.dtype), 1, model.encode([""]))
    meter.forwards, meter.calls = spent
    return seen[0].shape[1], seen[0].shape[2]


@torch.no_grad()
def traced(model: Model, place: str, prompts: Sequence[str], z: Tensor, times: Sequence[int], guidance: float) -> Tensor:
    """The features (T b p d) of a block at each of T falling times of guided trajectories from noise z (b c h w): conditional half only."""
    cond, null = model.encode(prompts), model.encode([""])
    grid = torch.tensor([*times, -1])[:, None].expand(-1, len(z))
    with watching(model, place) as seen:
        walk(
            z.to(model.device, model.dtype),
            grid,
            lambda x, t: model.guided(x, t, cond, null, guidance),
            model.schedule.ddim_step,
        )
    return torch.stack([features[-len(z) :] for features in seen])


@contextmanager
def watching(model: Model, place: str) -> Iterator[list[Tensor]]:
    """Collects the output (b p d) of each call of a block, without its graph."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        features = (output[0] if isinstance(output, tuple) else output).detach()
        seen.append(features.flatten(2).transpose(1, 2) if features.ndim == 4 else features)

    handle = model.module(place).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()

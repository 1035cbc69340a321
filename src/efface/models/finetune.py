"""What a user does to a model: fine-tuning on pictures with captions, as a LoRA or on the weights themselves.

    min_θ  E ‖pred_θ(√ᾱ_t z + √(1−ᾱ_t) ε, t, caption) − target‖²,   z = encode(image), ε ~ N(0, 1), t uniform,

where the target is ε, or the velocity √ᾱ_t ε − √(1−ᾱ_t) z for a network that predicts it: the loss of diffusers' scripts
`train_text_to_image.py` and `train_text_to_image_lora.py` (without noise offset or SNR weights), on the posterior's mean. The
relearning attack and Modular LoRA (arXiv 2412.00357) are made of it. A step costs `batch` forwards and as many backwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from efface.core.card import Card, Fingerprint, versions
from efface.core.edit import LowRankEdit, Part, WeightEdit
from efface.core.errors import Diverged, Unsupported
from efface.core.method import Report, silent
from efface.core.model import Cond, Model
from efface.core.sampling import seeded
from efface.models import names
from efface.models.load import opened
from efface.ops.descend import descend
from efface.ops.lowrank import Adapter, fresh
from efface.ops.overlay import Overlay, Slot

LR = {"adapter": 1e-4, "weights": 1e-5}
"""The default learning rates, those of diffusers' scripts, in units of Stable Diffusion 1.x."""


def finetune(
    model: Model | Any,
    images: Tensor,
    captions: Sequence[str],
    *,
    steps: int,
    lr: float | None = None,
    rank: int | None = None,
    group: str | None = None,
    batch: int = 4,
    weight_decay: float = 1e-2,
    start: LowRankEdit | None = None,
    seed: int = 0,
    report: Report = silent,
) -> WeightEdit | LowRankEdit:
    """Fine-tunes on `images` (n 3 H W) in [0, 1] with a caption each, and returns what was learned; `model` is left as it was.

    Edits that are attached stay so and are trained on top of; what is returned then belongs after them (`Chain`).

    model: what `efface.load` returned, or anything that it takes.
    lr: AdamW's learning rate in units of Stable Diffusion 1.x (`Model.learning_rate`, a LoRA's as of the
        cross-attention); by default 1e-4 with `rank`, 1e-5 without.
    rank: of a LoRA on the linear maps and convolutions of the group; None trains the weights themselves.
    group: what is trained, of the denoiser; by default "attn" (every attention projection) with `rank`, else "full".
    batch: pictures in a step, drawn from a shuffled deck that is shuffled anew when it is empty.
    weight_decay: AdamW's.
    start: a LoRA to go on from, in place of `rank`; what is returned is the whole of it. Its group is its own.
    report: called after every step with {"loss": …}.

    Raises ValueError (counts, shapes, ranges), Unsupported (the group), Diverged (a loss that is not finite)."""
    asked, model = _rate(lr, rank, start), opened(model)
    run = Run(steps, model.learning_rate(asked, *([] if rank or start else [group or "full"])), batch, weight_decay, seed)
    run.check(images, captions, rank, start)
    model.meter.reset()
    generator = seeded(seed)
    with model.frozen():
        student = _student(model, rank, group, start, generator)
        losses = _train(model, student, run, images, captions, generator, report)
    made = f"finetune(steps={steps}, lr={asked:g}, rank={_rank(rank, start)}, group={group!r}, batch={batch})"
    card = Card(made, "", seed, model.id, model.family, Fingerprint.of(model), (captions[0],), model.meter.read(), versions())
    extras = {"trace": Part({"loss": torch.tensor(losses)}, {"captions": list(captions)})}
    if isinstance(student, Overlay):
        return WeightEdit(student.deltas(), card, extras)
    return LowRankEdit({f"{name}.weight": pair for name, pair in student.learned().items()}, card, extras)


@dataclass(frozen=True)
class Run:
    """The settings of one fine-tuning; `lr` is the rate that the optimiser gets."""

    steps: int
    lr: float
    batch: int
    weight_decay: float
    seed: int

    def check(self, images: Tensor, captions: Sequence[str], rank: int | None, start: LowRankEdit | None) -> None:
        if isinstance(captions, str) or len(images) != len(captions) or not len(captions):
            raise ValueError(f"{len(images)} images and {len(captions)} captions were given; expected at least one, and a caption for each")
        if images.ndim != 4 or images.shape[1] != 3 or not images.isfinite().all() or images.min() < 0 or images.max() > 1:
            raise ValueError(f"images had the shape {tuple(images.shape)}; expected (n, 3, height, width) with values in [0, 1]")
        for name, value in {"steps": self.steps, "batch": self.batch, "rank": 1 if rank is None else rank}.items():
            if value < 1:
                raise ValueError(f"{name} was {value}; expected an integer of at least 1")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"lr and weight_decay were {self.lr} and {self.weight_decay}; expected finite numbers, lr above 0, none below")
        if rank is not None and start is not None:
            raise ValueError("rank and start were both given; a LoRA that is gone on from keeps its own rank")


def loss(model: Model, latents: Tensor, cond: Cond, t: Tensor, noise: Tensor) -> Tensor:
    """mean ‖pred(x_t, t, c) − target‖² for clean latents and noise (b c h w) at times t (b); in the network's own parametrisation."""
    target = model.schedule.target(latents, noise, t)
    return (model.predict(model.schedule.add_noise(latents, noise, t), t, cond).float() - target).square().mean()


def _train(
    model: Model, student: Overlay | Adapter, run: Run, images: Tensor, captions: Sequence[str], generator: torch.Generator, report: Report
) -> list[float]:
    """The losses, step by step."""
    texts = list(dict.fromkeys(captions))
    told = torch.tensor([texts.index(caption) for caption in captions])
    size = model.batch()
    with torch.no_grad():
        latents = torch.cat([model.encode_images(part).float() for part in images.split(size)])
        cond = Cond.cat([model.encode(texts[i : i + size]) for i in range(0, len(texts), size)])
    optimiser = torch.optim.AdamW(student.parameters, lr=run.lr, weight_decay=run.weight_decay)
    deck, losses = _deck(len(images), generator), []
    for step in range(run.steps):
        rows = torch.tensor(list(islice(deck, run.batch)))
        t = torch.randint(model.schedule.train_steps, (run.batch,), generator=generator).to(latents.device)
        noise = torch.randn(run.batch, *latents.shape[1:], generator=generator).to(latents.device)
        with student:
            value = loss(model, latents[rows.to(latents.device)], cond[told[rows].to(cond.tokens.device)], t, noise)
            descend(value, optimiser)
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise Diverged(
                f"the loss was {losses[-1]} at step {step + 1} of {run.steps}, with lr {run.lr:g}; the model is as it was, lower lr"
            )
        report(step + 1, run.steps, {"loss": losses[-1]})
    return losses


def _deck(count: int, generator: torch.Generator) -> Iterator[int]:
    """0 … count − 1 shuffled, again and again."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _student(model: Model, rank: int | None, group: str | None, start: LowRankEdit | None, generator: torch.Generator) -> Overlay | Adapter:
    """What is trained: copies of the weights, or a LoRA beside them."""
    if start is not None:
        return _continued(model, start)
    slots = _chosen(model, group or ("attn" if rank else "full"))
    if rank is None:
        return Overlay(slots)
    known = names.maps(model)
    modules = {name.removesuffix(".weight"): slot.owner for name, slot in slots.items() if name.removesuffix(".weight") in known}
    if not modules:
        raise Unsupported(f"the group {group!r} of {model.id} holds no linear map or convolution, beside which a LoRA could stand")
    return Adapter(modules, {name: fresh(module, rank, generator) for name, module in modules.items()})


def _continued(model: Model, start: LowRankEdit) -> Adapter:
    """The factors of an earlier LoRA, its scale in `up`, in the shapes of its maps."""
    modules, factors = {}, {}
    for name, slot in model.slots(start.factors).items():
        down, up = start.factors[name]
        shape, device = slot.tensor.shape, slot.tensor.device
        modules[name.removesuffix(".weight")] = slot.owner
        wide = start.scale * up.flatten(1)
        factors[name.removesuffix(".weight")] = (
            down.reshape(-1, *shape[1:]).to(device),
            wide.reshape(*wide.shape, *(1,) * (len(shape) - 2)).to(device),
        )
    return Adapter(modules, factors)


def _chosen(model: Model, group: str) -> dict[str, Slot]:
    """The parameters of a group, which must be the denoiser's: captions are encoded once."""
    if group == "attn":
        return {**model.select("selfattn"), **model.select("xattn")}
    slots = dict(model.select(group))
    network = next(name for name, module in model.components.items() if module is model.denoiser)
    if any(not name.startswith(f"{network}.") for name in slots):
        raise Unsupported(f"the group {group!r} is not of the denoiser, and only that is fine-tuned; use 'attn', 'xattn' or 'full'")
    return slots


def _rate(lr: float | None, rank: int | None, start: LowRankEdit | None) -> float:
    return lr if lr is not None else LR["weights" if rank is None and start is None else "adapter"]


def _rank(rank: int | None, start: LowRankEdit | None) -> int | None:
    return rank if start is None else max(len(down) for down, _ in start.factors.values())

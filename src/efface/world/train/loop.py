"""The one training loop of the world's recipe: seeded, checkpointed, resumable, atomic.

A `Stage` says what is trained and what one step's loss is; `run` does the rest. All randomness comes from one CPU generator
whose state is part of the checkpoint, and the learning rate depends on the step alone, so an interrupted run ends in the
same weights, bit for bit, as an uninterrupted one (same machine, same number of threads).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from efface.core.whole import whole_file

LOOK = 20
"""Steps between looks at the figures; on an accelerator each look waits for it."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one stage trains."""

    steps: int
    """Optimiser steps, over which the learning rate falls to zero along a half cosine."""
    batch: int
    """Items per step."""
    lr: float
    """Peak learning rate of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and kernels (never of vectors)."""
    ema: float = 0.999
    """Decay of the exponential moving average, whose weights are the result."""
    clip: float = 1.0
    """Largest gradient norm."""
    save_every: int = 250
    """Steps between checkpoints."""


def chosen(recipes: Mapping[str, Recipe], device: torch.device, steps: int | None, batch: int | None) -> Recipe:
    """The recipe of a kind of device ("cpu" or "cuda"; others take the CPU's), with other numbers where they are given."""
    recipe = recipes.get(device.type, recipes["cpu"])
    return replace(recipe, steps=steps or recipe.steps, batch=batch or recipe.batch)


def on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A generator on `device`, seeded by a draw of the CPU's `generator`, whose state alone a checkpoint has to hold."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


class Stage(ABC):
    """What is trained, and on what."""

    name: ClassVar[str]
    """The stage's name: `clip`, `vae`, `unet` or `judge`; also its folder."""
    recipe: Recipe
    modules: dict[str, nn.Module]
    """The trained modules, by name."""
    device: torch.device

    @abstractmethod
    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws one batch and returns its loss, and numbers to show in the progress bar (detached scalars)."""

    @abstractmethod
    def finish(self, folder: Path) -> Path:
        """Writes the result (the modules hold the averaged weights by now) and returns where it stands."""


class Average:
    """Exponential moving average of parameters (buffers are taken as they are)."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.values = {key: value.detach().clone() for key, value in state_of(modules).items()}

    @torch.no_grad()
    def update(self, modules: dict[str, nn.Module], step: int) -> None:
        """Moves towards the present weights; young averages move faster: decay = min(decay, (1 + step) / (10 + step))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        floats, news = [], []
        for key, value in state_of(modules).items():
            if value.is_floating_point():
                floats.append(self.values[key])
                news.append(value.detach())
            else:
                self.values[key].copy_(value)
        torch._foreach_lerp_(floats, news, 1 - decay)


def state_of(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """All parameters and buffers of several modules under `module.parameter` names."""
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def load_state(modules: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    """The opposite of `state_of`; names must agree exactly."""
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict({key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)})


def factor(step: int, recipe: Recipe) -> float:
    """The learning rate at `step` as a share of the peak: linear warm-up, then half a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))


def optimiser(stage: Stage) -> torch.optim.AdamW:
    """AdamW without decay on vectors (norms, biases, scalars)."""
    parameters = [p for module in stage.modules.values() for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": stage.recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=stage.recipe.lr,
        fused=True,
    )


def checkpoint_path(folder: Path, name: str) -> Path:
    """Where the checkpoint of a stage stands in a training folder."""
    return folder / "checkpoints" / f"{name}.pt"


def run(stage: Stage, folder: Path, *, seed: int = 0, progress: bool = True, stop_after: int | None = None) -> Path | None:
    """Trains a stage to its end, from its checkpoint in `folder` if there is one.

    Args:
        stage: what to train; its modules are changed.
        folder: the training folder; the checkpoint is `checkpoints/<stage>.pt` in it.
        seed: seed of the data order and noise.
        progress: whether to show a progress bar.
        stop_after: stop at this step and leave the checkpoint, as an interruption would (the tests use it).

    Returns:
        what `stage.finish` wrote, or None if stopped before the end.

    Raises:
        ValueError: if the checkpoint is of another seed or of a longer run.
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
    """
    generator = torch.Generator().manual_seed(seed)
    adam = optimiser(stage)
    average = Average(stage.modules, stage.recipe.ema)
    path = checkpoint_path(folder, stage.name)
    start = resume(path, stage, adam, average, generator, seed) if path.is_file() else 0
    end = stage.recipe.steps if stop_after is None else min(stop_after, stage.recipe.steps)
    bar = tqdm(range(start, end), initial=start, total=stage.recipe.steps, desc=stage.name, unit="step", disable=not progress)
    for module in stage.modules.values():
        module.train()
    for step in bar:
        shown = advance(stage, adam, average, generator, step)
        due = (step + 1) % stage.recipe.save_every == 0 or step + 1 == end
        if due or step % LOOK == 0 or stage.device.type == "cpu":
            finite(stage, shown["loss"], step)
        if step % LOOK == 0:
            bar.set_postfix({key: f"{value.item():.4g}" for key, value in shown.items()}, refresh=False)
        if due:
            save(path, stage, adam, average, generator, seed, step + 1)
    if end < stage.recipe.steps:
        return None
    load_state(stage.modules, average.values)
    for module in stage.modules.values():
        module.eval()
    return stage.finish(folder)


def finite(stage: Stage, loss: Tensor, step: int) -> None:
    """Raises FloatingPointError for a loss that is not finite."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"stage {stage.name!r}: the loss is {loss.item()} at step {step}; lower its learning rate")


def advance(stage: Stage, adam: torch.optim.AdamW, average: Average, generator: torch.Generator, step: int) -> dict[str, Tensor]:
    """One optimiser step; returns the numbers to show."""
    for group in adam.param_groups:
        group["lr"] = stage.recipe.lr * factor(step, stage.recipe)
    loss, shown = stage.loss(generator)
    adam.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in adam.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, stage.recipe.clip)
    adam.step()
    average.update(stage.modules, step)
    return {"loss": loss.detach(), **shown}


def save(
    path: Path,
    stage: Stage,
    adam: torch.optim.AdamW,
    average: Average,
    generator: torch.Generator,
    seed: int,
    step: int,
) -> None:
    """Writes a checkpoint, whole or not at all."""
    content = {
        "step": step,
        "steps": stage.recipe.steps,
        "seed": seed,
        "modules": state_of(stage.modules),
        "average": average.values,
        "optimiser": adam.state_dict(),
        "generator": generator.get_state(),
    }
    with whole_file(path) as temporary:
        torch.save(content, temporary)


def resume(path: Path, stage: Stage, adam: torch.optim.AdamW, average: Average, generator: torch.Generator, seed: int) -> int:
    """Restores everything from a checkpoint and returns the step to go on with."""
    content: dict[str, Any] = torch.load(path, map_location=stage.device, weights_only=True)
    if content["seed"] != seed:
        raise ValueError(f"{path} was trained with seed {content['seed']}, not {seed}; pass that seed or another folder")
    if content["step"] > stage.recipe.steps:
        raise ValueError(f"{path} stands at step {content['step']}, past the {stage.recipe.steps} asked for; ask for more steps")
    load_state(stage.modules, content["modules"])
    average.values = content["average"]
    adam.load_state_dict(content["optimiser"])
    generator.set_state(content["generator"].cpu())
    return int(content["step"])

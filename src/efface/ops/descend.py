"""One step of an optimiser on its own parameters and on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


def descend(loss: Tensor, optimiser: Optimizer, *, clip: float | None = None) -> None:
    """One step down `loss`; only the optimiser's parameters are differentiated, and those that the loss does not touch stay.

    `torch.autograd.grad` in place of `backward()`: no other leaf of the graph gets a gradient. `clip` is the largest norm of the whole
    gradient; None leaves it as it is."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.grad = gradient
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)

"""One step of an optimiser on its own parameters and on nothing else; gradients that go through float16 do not underflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SCALE = 2.0**15
"""What a loss is multiplied by at first where its gradient goes through float16: the largest power of two there."""
LESS = 2.0**4
"""What the scale is divided by as long as a gradient is not finite."""


def descend(loss: Tensor, optimiser: Optimizer, *, clip: float | None = None) -> None:
    """One step down `loss`; only the optimiser's parameters are differentiated, and those that the loss does not touch stay.

    `clip` is the largest norm of the whole gradient; None leaves it as it is."""
    accumulate(loss, optimiser)
    step(optimiser, clip=clip)


def accumulate(loss: Tensor, optimiser: Optimizer) -> None:
    """Adds the gradient of `loss` to what the next `step` goes down. A loss whose terms are computed with other hooks or weights in place
    is differentiated term by term, each while its own are."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, gradients(loss, parameters), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def step(optimiser: Optimizer, *, clip: float | None = None) -> None:
    """One step down the gradients that were accumulated, which are forgotten then."""
    if clip is not None:
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Any]:
    """∂loss/∂p of each, None where the loss does not touch it.

    `torch.autograd.grad` in place of `backward()`: no other leaf of the graph gets a gradient. Where the gradient goes through float16,
    which holds nothing below 6e-8, it is that of S · loss, divided by S again in the format of p: S = 2^15, and as long as a gradient is
    not finite 2^11, 2^7, 2^3, 1 (loss scaling: Micikevicius et al., arXiv 1710.03740). Each try is a backward."""
    scale = SCALE if loss.isfinite() and in_float16(loss) else 1.0
    while scale > 1:
        found = torch.autograd.grad(scale * loss.float(), parameters, allow_unused=True, retain_graph=True)
        if all(gradient is None or gradient.isfinite().all() for gradient in found):
            return [None if gradient is None else gradient / scale for gradient in found]
        scale /= LESS
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def in_float16(loss: Tensor) -> bool:
    """Whether a step of the way back from `loss` is in float16; the first one in half precision of either kind tells."""
    seen: set[Any] = set()
    ahead: list[Any] = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        formats = {metadata.dtype for metadata in node._input_metadata}
        if formats & {torch.float16, torch.bfloat16}:
            return torch.float16 in formats
        ahead += [before for before, _ in node.next_functions]
    return False

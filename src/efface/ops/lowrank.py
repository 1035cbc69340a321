"""Changes of low rank: the nearest one to a given change, and a trainable one beside a network's own maps.

A map W (o × i), or a convolution's kernel (o, i, k, k) read as o × i·k², becomes W + U D with D (r × i) "down" and U (o × r) "up"
(Hu et al., arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def truncated(
    matrix: Float[Tensor, "o i"], *, rank: int | None = None, energy: float | None = None
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """(down, up) of the nearest matrix of lower rank in the Frobenius norm (Eckart & Young, 1936): U √S and √S Vᵀ.

    Kept are the largest singular values, as many as `rank` says, or the fewest whose squares sum to `energy` (0 to 1] of all, so that
    the relative error is at most √(1 − energy); with both, the fewer; with neither, all. At least one.
    Raises ValueError for a rank below 1 or an energy outside (0, 1]."""
    if rank is not None and rank < 1:
        raise ValueError(f"rank was {rank}; expected an integer of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy was {energy}; expected a number above 0 and at most 1")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(len(values), rank or len(values), _enough(values, energy) if energy is not None else len(values))
    root = values[:kept].sqrt()
    return root[:, None] * right[:kept], left[:, :kept] * root


def _enough(values: Tensor, energy: float) -> int:
    """The fewest leading values whose squares sum to `energy` of the sum of all squares; at least one."""
    rest = values.double().square().flip(0).cumsum(0).flip(0)  # rest[r] = what is lost when r values are kept
    return max(1, int((rest > (1 - energy) * rest[0]).sum()))


class Adapter:
    """Trainable factors beside linear maps and convolutions: inside `with adapter:` each module's output is W x + U D x.

    Nothing is materialised and no weight is touched; outside, the network is what it was. As with `Overlay`, stay inside through
    `backward()`. `adapter.parameters` go to an optimiser.
    """

    def __init__(self, modules: Mapping[str, nn.Module], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """`factors`: (down (r, i, …), up (o, r, …)) by the name of the module; float32 copies of them are trained."""
        self.modules = dict(modules)
        self.factors = {n: (_trainable(down), _trainable(up)) for n, (down, up) in factors.items()}
        self._hooks: list[ExitStack] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [factor for pair in self.factors.values() for factor in pair]

    def __enter__(self) -> Adapter:
        hooks = ExitStack()
        for name, module in self.modules.items():
            hooks.callback(module.register_forward_hook(_added(*self.factors[name])).remove)
        self._hooks.append(hooks)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.pop().close()

    def learned(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(down, up) as they are now, float32, on the CPU."""
        return {n: (down.detach().cpu().clone(), up.detach().cpu().clone()) for n, (down, up) in self.factors.items()}


def fresh(module: nn.Module, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(down, up) of an adapter that changes nothing yet: D normal with standard deviation 1/r, U zero (PEFT's "gaussian", which
    diffusers' training scripts use).

    In the shapes of PEFT's files: (r, i) and (o, r), or (r, i, k, k) and (o, r, 1, 1). Raises ValueError for another module."""
    if not can_adapt(module):
        raise ValueError(f"a low-rank adapter stands beside linear maps and ungrouped convolutions, and {type(module).__name__} was given")
    weight: Tensor = module.weight
    ones = (1,) * (weight.ndim - 2)
    down = torch.randn(rank, *weight.shape[1:], generator=generator) / rank
    return down.to(weight.device), torch.zeros(weight.shape[0], rank, *ones, device=weight.device)


def can_adapt(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a module's weight can take a low-rank change in the formats of LoRA."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _trainable(factor: Tensor) -> nn.Parameter:
    return nn.Parameter(factor.detach().to(torch.float32, copy=True))


def _added(down: Tensor, up: Tensor) -> Any:
    """A forward hook; float32 inside, the module's own format outside."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(module, nn.Conv2d):
                narrow = F.conv2d(x.float(), down, None, module.stride, module.padding, module.dilation)
                return output + F.conv2d(narrow, up).to(output.dtype)
            return output + F.linear(F.linear(x.float(), down), up).to(output.dtype)

    return hook

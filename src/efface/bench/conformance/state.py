"""Everything that a fit or a detached edit must leave as it was, as values that can be compared.

Of each network: the modules by name and class, the tensors to the bit and as objects, gradients and their flags, modes, hooks,
attention processors and every other attribute. Of the process: the random state of torch, numpy and Python, the gradient mode, the
default number format. And a picture, in which a change of the tokenizer or the scheduler shows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efface.core.model import Model

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class State:
    """A model and the process at one moment."""

    values: Mapping[str, Any]
    held: tuple[Any, ...]
    """The objects behind the identities in `values`, kept so that no identity is given out again."""

    @classmethod
    def of(cls, model: Model, *, process: bool = False) -> State:
        """Draws one picture first, so that whatever a network sets up at its first use stands already. `process`: and of the process."""
        picture = digest(model.sample(["cat"], steps=2))
        held: list[Any] = []
        values = {f"{network}{name}": v for network, root in model.components.items() for name, v in _network(root, held).items()}
        values |= {f"model.{name}": _value(value, held) for name, value in vars(model).items()}
        return cls(values | (_process() if process else {}) | {"picture": picture}, tuple(held))

    def changes(self, after: State) -> list[str]:
        """What is different afterwards: "unet.conv_in.weight: changed", one entry for each value."""
        mine, theirs = self.values, after.values
        changed = [f"{name} changed" for name in mine if name in theirs and mine[name] != theirs[name]]
        return [*changed, *(f"{n} is new" for n in theirs if n not in mine), *(f"{n} is gone" for n in mine if n not in theirs)]


def told(changes: list[str]) -> str:
    """The first changes, in words."""
    return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def digest(tensor: Tensor) -> str:
    """Recognises the bits of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _network(root: nn.Module, held: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in root.named_modules():
        name = f".{path}" if path else ""
        found[f"{name} (class)"] = type(module)
        found |= {f"{name}.{key}": _value(value, held) for key, value in vars(module).items() if key not in ("_parameters", "_buffers")}
        tensors = {**module._parameters, **module._buffers}
        found |= {f"{name}.{key}": _tensor(tensor, held) for key, tensor in tensors.items() if tensor is not None}
    return found


def _value(value: Any, held: list[Any]) -> Any:
    """A plain value as it is, a container by what it holds, anything else as the object that it is."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return _tensor(value, held)
    if isinstance(value, dict):
        return tuple((key if isinstance(key, PLAIN) else id(key), _value(item, held)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_value(item, held) for item in value)
    held.append(value)
    return id(value)


def _tensor(tensor: Tensor, held: list[Any]) -> tuple[Any, ...]:
    held.append(tensor)
    gradient = None if not tensor.is_leaf or tensor.grad is None else digest(tensor.grad)
    return id(tensor), digest(tensor), tuple(tensor.shape), tensor.dtype, tensor.requires_grad, gradient


def _process() -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)
    return {
        "torch's random state": digest(torch.get_rng_state()),
        "numpy's random state": repr({**numpy, "state": {k: v.tolist() if k == "key" else v for k, v in numpy["state"].items()}}),
        "Python's random state": random.getstate(),
        "gradient mode": torch.is_grad_enabled(),
        "default number format": torch.get_default_dtype(),
    }


def unsettle(model: Model) -> None:
    """Gives a model flags and modes that no method would set by itself, so that "all off" is told from "as it was".

    Every third parameter loses its gradient flag, and every fourth module changes its mode; the networks have no dropout."""
    for network in model.components.values():
        for number, parameter in enumerate(network.parameters()):
            parameter.requires_grad_(number % 3 != 0)
        for number, module in enumerate(network.modules()):
            module.training = number % 4 == 0

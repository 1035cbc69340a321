"""Replacement tensors for a few parameters of a network: the student, while the network itself stays the teacher.

No copy of the network is made and no sum `W + offset` is materialised at each call. The swap is by reference and has to stay
active through `backward()`: with gradient checkpointing the forward is computed again there, and would otherwise be computed
with the original weights, whose gradients are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """One parameter of a network: the module that owns it and its name there."""

    owner: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        value = self.owner._parameters[self.attribute]
        if value is None:
            raise KeyError(f"{type(self.owner).__name__} has no parameter {self.attribute!r}")
        return value

    def put(self, tensor: Tensor) -> None:
        """Replaces the tensor by reference; nothing is copied."""
        self.owner._parameters[self.attribute] = tensor  # type: ignore[assignment]


@contextmanager
def swapped(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with `tensors` in the named slots; the originals come back by reference, whatever happens.

    Raises KeyError for a name that no slot has, ValueError for a wrong shape."""
    for name, tensor in tensors.items():
        if name not in slots:
            raise KeyError(f"no parameter is called {name!r} here")
        if tensor.shape != slots[name].tensor.shape:
            raise ValueError(f"{name} has the shape {tuple(slots[name].tensor.shape)}, and {tuple(tensor.shape)} was given")
    originals = {name: slots[name].tensor for name in tensors}
    try:
        for name, tensor in tensors.items():
            slots[name].put(tensor)
        yield
    finally:
        for name, tensor in originals.items():
            slots[name].put(tensor)


class Overlay:
    """Trainable float32 copies of the parameters in `slots`.

    `with overlay:` is the student; outside is the teacher. `overlay.parameters` go to an optimiser.
    """

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        self.slots = dict(slots)
        self.tensors = {n: nn.Parameter(s.tensor.detach().to(torch.float32, copy=True)) for n, s in self.slots.items()}
        self._stack: list[object] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.tensors.values())

    def __enter__(self) -> Overlay:
        context = swapped(self.slots, self.tensors)
        context.__enter__()
        self._stack.append(context)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.pop().__exit__(*error)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Tensor]:
        """The copies, for a checkpoint."""
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Sets the copies in place: an optimiser goes on with them. Raises KeyError for a missing name."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state_dict[name])

    def deltas(self) -> dict[str, Tensor]:
        """What was learned: replacement − original, float32, on the CPU."""
        return {n: (p.detach() - self.slots[n].tensor.detach().float()).cpu() for n, p in self.tensors.items()}


def training_bytes(slots: Mapping[str, Slot], *, moments: int = 2) -> int:
    """Bytes that training an overlay holds: float32 copies, their gradients, and the optimiser's moments (2 for Adam, 0 for SGD)."""
    return 4 * (2 + moments) * sum(slot.tensor.numel() for slot in slots.values())

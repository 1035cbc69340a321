"""A network's weights from a file that somebody names: found, told by its digest, and read without running code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efface.core.errors import EffaceError

SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class Weights:
    """What is looked for, and how it is told where it is not there."""

    network: str
    """The network's name: "ResNet-50"."""
    stem: str
    """What the name of a file of it holds, in lower case: "resnet50"."""
    wanted: str
    """What was expected, and what to do."""
    key: str = ""
    """Where a checkpoint that holds more than the state dict has it: "model_state_dict"."""

    def find(self, path: str | Path) -> Path:
        """The file itself, or the one of the network in a folder. Raises EffaceError."""
        path = Path(path).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if self.stem in file.name.lower() and file.suffix in SUFFIXES)
            if len(found) != 1:
                raise EffaceError(f"{path} holds {len(found)} files of {self.network}'s weights; {self.wanted}")
            return found[0]
        if not path.is_file():
            raise EffaceError(f"there are no {self.network} weights at {path}; {self.wanted}")
        return path

    def read(self, path: Path) -> dict[str, Tensor]:
        """The state dict of a file, in safetensors or of `torch.save`. Raises EffaceError for a broken one, or one of something else."""
        from safetensors.torch import load_file

        try:
            state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a corrupt or forbidden pickle fails in many ways
            raise EffaceError(f"{path} cannot be read as a state dict of tensors ({type(error).__name__}); {self.wanted}") from error
        if self.key and isinstance(state, dict):
            state = state.get(self.key, state)
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise EffaceError(f"{path} holds something else than a state dict of tensors; {self.wanted}")
        return state

    def foreign(self, path: Path) -> EffaceError:
        """The error for a state dict that does not fit the network."""
        return EffaceError(f"{path} holds the weights of another network than {self.network}; {self.wanted}")


def digest(path: Path) -> str:
    """The first twelve digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def fingerprint(*states: Mapping[str, Tensor]) -> str:
    """The first twelve digits of the SHA-256 of state dicts: every name, and the bytes of its tensor."""
    found = hashlib.sha256()
    for name, tensor in (item for state in states for item in state.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]

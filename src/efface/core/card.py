"""What an edit is and where it belongs: the card in its file, and the fingerprint of the weights that it was fitted on."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from efface.core.errors import InvalidEdit, InvalidModel, Mismatch
from efface.core.model import Model
from efface.core.task import Task

Match = Literal["exact", "family", "force"]
_HASHED = 4096
"""Entries of each tensor that enter the hash, evenly spread."""
_KEPT_TENSORS, _KEPT_ENTRIES = 256, 4
"""What is stored to compare across number formats."""


@dataclass(frozen=True)
class Fingerprint:
    """Recognises a set of weights: exactly in their own number format, and up to rounding in another.

    An even sample of the entries of every tensor of the denoiser and the text encoder is hashed, so that a fine-tuned
    relative is told apart, without reading gigabytes. A change of a few single entries can go unseen.
    """

    digest: str
    dtype: str
    sample: tuple[float, ...]

    @classmethod
    def of(cls, model: Model, *, original: bool = False) -> Fingerprint:
        """The weights as they are, or with `original` as they were before any edit was attached."""
        replaced: dict[int, Tensor] = {}
        if original:
            for attachment in reversed(model.attached):
                replaced |= {id(slot.tensor): tensor for slot, tensor in reversed(attachment.originals)}  # a chain may hold one twice
        tensors = {f"{c}.{n}": replaced.get(id(p), p) for c in _networks(model) for n, p in model.components[c].named_parameters()}
        hasher = hashlib.blake2b(digest_size=16)
        for name in sorted(tensors):
            hasher.update(f"{name}{tuple(tensors[name].shape)}".encode())
            hasher.update(_entries(tensors[name], _HASHED).numpy().tobytes())
        names = sorted(tensors)
        kept = names[:: max(1, len(names) // _KEPT_TENSORS)]
        sample = torch.cat([_entries(tensors[n], _KEPT_ENTRIES) for n in kept])
        return cls(hasher.hexdigest(), str(model.dtype).removeprefix("torch."), tuple(sample.tolist()))

    def same_weights(self, other: Fingerprint) -> bool:
        """Equal, or equal but for the rounding of the coarser of two number formats."""
        if self.dtype == other.dtype:
            return self.digest == other.digest
        if len(self.sample) != len(other.sample):
            return False
        mine, theirs = torch.tensor(self.sample), torch.tensor(other.sample)
        step = max(_step(self.dtype), _step(other.dtype))
        return bool(torch.allclose(mine, theirs, rtol=step, atol=1e-7))


def _step(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


def _networks(model: Model) -> list[str]:
    return [name for name in model.components if not name.startswith("vae")]


def _entries(tensor: Tensor, count: int) -> Tensor:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).long().to(flat.device)
    return flat[index].float().cpu()


@dataclass(frozen=True)
class Card:
    """Where an edit comes from and where it belongs. JSON in the header of the edit's file."""

    method: str
    """The method's text form, which `efface.method` reads back."""
    task: str
    """The task's text form."""
    seed: int
    model: str
    """The model's id: a name, a folder or a Hub id."""
    family: str
    fingerprint: Fingerprint
    probes: tuple[str, ...]
    """Prompts whose denoising must change once the edit is attached."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """What the fit spent: forwards, calls, backwards, seconds."""
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, *, method: object, task: Task, seed: int, cost: Mapping[str, float] | None = None) -> Card:
        """The card of an edit just fitted on `model`."""
        probes = tuple(concept.texts[0] for concept in task.targets)
        return cls(str(method), str(task), seed, model.id, model.family, Fingerprint.of(model), probes, dict(cost or {}), versions())

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Card:
        """Raises InvalidEdit when a part is missing or unknown."""
        try:
            values = dict(data)
            print_ = dict(values.pop("fingerprint"))
            print_["sample"] = tuple(print_["sample"])
            values["probes"] = tuple(values["probes"])
            return cls(fingerprint=Fingerprint(**print_), **values)
        except (KeyError, TypeError) as error:
            raise InvalidEdit(f"the edit's card cannot be read ({error}); the file is corrupt or of another version of efface") from error

    def check(self, model: Model, match: Match) -> None:
        """Raises InvalidModel for what is no model, Mismatch when the edit does not belong to it, ValueError for an unknown `match`."""
        if not isinstance(model, Model):
            raise InvalidModel(f"an edit is put into a model of efface's, and a {type(model).__name__} was given; give efface.load(pipe)")
        if match not in ("exact", "family", "force"):
            raise ValueError(f"match was {match!r}; expected 'exact', 'family' or 'force'")
        if match == "force":
            return
        if model.family != self.family:
            raise Mismatch(
                f"this edit was fitted for the family {self.family!r} ({self.model}), and {model.id} is {model.family!r}; {_hint('force')}"
            )
        if match == "family" or self.fingerprint.same_weights(Fingerprint.of(model)):
            return
        if model.attached and self.fingerprint.same_weights(Fingerprint.of(model, original=True)):
            return
        raise Mismatch(f"this edit was fitted on other weights ({self.model}) than those of {model.id}; {_hint('family')}")


def _hint(match: str) -> str:
    return f"load the model it was fitted on, or pass match={match!r} if you know what you do"


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("efface", "torch", "diffusers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

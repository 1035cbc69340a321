"""What every edit shares: how it is put in place and taken off again, and how it is saved.

Edits form a stack: they are detached in reverse order, and two of them may not change the same tensor. The file is one safetensors file
with the card in its header; each extra stands in a file of its own beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from efface.core import file
from efface.core.card import Card, Match
from efface.core.errors import InvalidEdit, NoEffect, Overlap, Unsupported
from efface.core.model import Model
from efface.core.sampling import noise_for
from efface.ops.overlay import Slot

VERSION = 1
"""Of the file format; a reader refuses a newer one."""
GREY = 1 / 255
"""What a picture may change by without any effect."""


@dataclass(frozen=True, eq=False)
class Part:
    """A named extra of an edit, saved as a file of its own beside it: a trace, a key, an autoencoder."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""


@dataclass(frozen=True, eq=False)
class Attachment:
    """An edit in place: what it holds, what stood there before, and how to undo it."""

    names: frozenset[str]
    originals: tuple[tuple[Slot, Tensor], ...]
    undo: Callable[[], None]


class Edit(ABC):
    """What a `Method` returns; `core.edit` holds the kinds."""

    kinds: ClassVar[dict[str, type[Edit]]] = {}
    """Every kind by name."""
    kind: ClassVar[str]
    threat: ClassVar[str]
    """What somebody who holds the model must do to undo the erasure."""
    rounding: ClassVar[int] = 0
    """Machine epsilons by which a prediction may change without any effect of the edit; 0 where no forward is added."""
    card: Card
    extras: Mapping[str, Part]

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            Edit.kinds[cls.kind] = cls

    @property
    def lost_in_weights(self) -> str:
        """What a change of weights, such as a plain LoRA, cannot hold of this edit, in a sentence to warn with; "" for nothing."""
        return ""

    @property
    def files(self) -> Mapping[str, Part]:
        """The extras by the names of their files: `extras`, and of a chain those of its parts too."""
        return self.extras

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """The parameters or outputs that it changes; two attached edits may not share one."""

    @abstractmethod
    def _enter(self, model: Model) -> Attachment:
        """Puts the edit in place, unchecked."""

    @abstractmethod
    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON settings, from which `_unpack` makes the edit again."""

    @classmethod
    @abstractmethod
    def _unpack(cls, tensors: dict[str, Tensor], settings: dict[str, Any], card: Card, extras: Mapping[str, Part]) -> Edit: ...

    @contextmanager
    def attach(self, model: Model, *, match: Match = "exact", check: bool = True) -> Iterator[Model]:
        """The model with the edit in place; on leaving, the originals are back to the bit.

        Edits form a stack and are detached in reverse order. `match` says how well the model must fit: "exact" (the very
        weights, in any number format), "family", or "force". With `check` the denoising of the target must really change: one
        prediction by more than rounding or, where that stays, a whole picture by a grey level.

        A network that is moved or cast meanwhile stays so: the originals follow it. Raises InvalidModel (a pipeline, which `efface.load`
        makes a model), Mismatch, Overlap (another attached edit holds the same tensor), NoEffect."""
        self.card.check(model, match)
        taken = self.names & frozenset().union(*(a.names for a in model.attached))
        if taken:
            raise Overlap(f"another attached edit already changes {sorted(taken)[0]!r} ({len(taken)} in common); detach it first")
        texts = self.card.probes if check else ()
        before = [_probe(model, text) for text in texts]
        with self._held(model):
            if not texts or not _equal(before, [_probe(model, text) for text in texts], self.rounding * torch.finfo(model.dtype).eps):
                yield model
                return
            drawn = [_picture(model, text) for text in texts]
        if _equal(drawn, [_picture(model, text) for text in texts], GREY):
            raise NoEffect(f"attached, the edit changes nothing for {', '.join(map(repr, texts))}; pass check=False if that is meant")
        with self._held(model):
            yield model

    @contextmanager
    def _held(self, model: Model) -> Iterator[None]:
        """In place while it lasts, unchecked."""
        attachment = self._enter(model)
        model.attached.append(attachment)
        try:
            yield
        finally:
            if model.attached[-1] is not attachment:
                raise Overlap("edits are detached in reverse order, and a later one is still attached")
            model.attached.pop()
            attachment.undo()

    def bake(self, model: Model, *, match: Match = "exact") -> None:
        """Makes the change permanent in `model` (and in the pipeline around it), whole or not at all. Raises Unsupported where the kind is
        no weight change, InvalidModel, Mismatch, or Overlap while edits are attached."""
        raise Unsupported(f"a {self.kind} edit is a removable hook and no change of weights, so it cannot be baked in; use attach")

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file with the card in its header, and each extra beside it as NAME.EXTRA.safetensors."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InvalidEdit(f"an edit is saved as .safetensors, and {path.name!r} was given")
        tensors, settings = self._pack()
        for name, part in self.files.items():
            file.write(_beside(path, name), part.tensors, {"format": "efface-part", "version": VERSION, "info": part.info})
        header = {"format": "efface-edit", "version": VERSION, "kind": self.kind, "threat": self.threat, "card": self.card.json()}
        return file.write(path, tensors, {**header, "settings": settings, "extras": sorted(self.files)})

    @staticmethod
    def load(path: str | Path) -> Edit:
        """Reads what `save` wrote; extras that are not beside the file are left out. Raises InvalidEdit."""
        path = Path(path)
        tensors, header = file.read(path)
        _check_header(header, "efface-edit", path)
        if header.get("kind") not in Edit.kinds:
            raise InvalidEdit(f"{path} holds the unknown kind of edit {header.get('kind')!r}; known are {', '.join(Edit.kinds)}")
        extras = {name: _read_part(_beside(path, name)) for name in header.get("extras", []) if _beside(path, name).exists()}
        try:
            return Edit.kinds[header["kind"]]._unpack(tensors, header["settings"], Card.from_json(header["card"]), extras)
        except KeyError as error:
            raise InvalidEdit(f"{path} lacks {error}; the file is corrupt, make it again") from error


def _beside(path: Path, extra: str) -> Path:
    return path.with_name(f"{path.stem}.{extra}.safetensors")


def _read_part(path: Path) -> Part:
    tensors, header = file.read(path)
    _check_header(header, "efface-part", path)
    return Part(tensors, header["info"])


def _check_header(header: Mapping[str, Any], expected: str, path: Path) -> None:
    if header.get("format") != expected:
        raise InvalidEdit(f"{path} holds {header.get('format')!r}, and {expected!r} was expected")
    if header.get("version") != VERSION:
        raise InvalidEdit(f"{path} has the file version {header.get('version')!r}, and this efface reads {VERSION}; upgrade efface")


def _equal(some: Sequence[Tensor], others: Sequence[Tensor], within: float) -> bool:
    """Up to `within`; what is not a number equals nothing."""
    return all((one - other).abs().max() <= within for one, other in zip(some, others, strict=True))


@torch.no_grad()
def _probe(model: Model, text: str) -> Tensor:
    """A guided prediction on fixed noise at the middle of the schedule, not counted by the meter."""
    with _uncounted(model):
        x = noise_for(0, 1, model.latent_shape).to(model.device, model.dtype)
        return model.guided(x, model.schedule.train_steps // 2, model.encode([text]), model.encode([""]), 3.0)


def _picture(model: Model, text: str) -> Tensor:
    """A picture from fixed noise, not counted by the meter: for edits that act at some times and on some features only."""
    with _uncounted(model):
        return model.sample([text], seeds=[0])


@contextmanager
def _uncounted(model: Model) -> Iterator[None]:
    spent = model.meter.forwards, model.meter.calls
    try:
        yield
    finally:
        model.meter.forwards, model.meter.calls = spent

"""What a `FeatureEdit` puts in place while a model runs: maps on the outputs of modules, and residuals added to the denoiser's skips.

All of them are hooks on the pipeline's own modules, so that they act in the user's diffusers pipeline too, and none of them cuts a
gradient. What hangs on the time or the prompt is told by `Model.before_denoising`, which sees every call of the denoiser, whoever makes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.core.errors import InvalidEdit, Unsupported
from efface.core.gate import PromptGate
from efface.core.model import Model
from efface.ops.sae import SparseAutoencoder, ablate, ablate_as_released


class Feature(ABC):
    """Something that changes features. Its kind and settings are JSON, its tensors stand in the edit's file."""

    kind: ClassVar[str]

    @abstractmethod
    def names(self, place: str) -> frozenset[str]:
        """What it changes; two attached edits may not share a name."""

    @abstractmethod
    def enter(self, model: Model, place: str, hooks: ExitStack) -> None:
        """Puts it in place at the module of a full name; closing `hooks` takes it away."""

    @abstractmethod
    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and settings, from which `unpack` makes it again."""

    @classmethod
    @abstractmethod
    def unpack(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Feature: ...


@dataclass(frozen=True, eq=False)
class FeatureMap(Feature):
    """x ↦ x + ((x − offset) downᵀ) up on feature vectors x of width d; up = −down with orthonormal rows is a projection."""

    kind: ClassVar[str] = "map"

    offset: Tensor
    """(d,)"""
    down: Tensor
    """(k, d)"""
    up: Tensor
    """(k, d)"""

    def __call__(self, x: Tensor) -> Tensor:
        """x is (b l d) or (b d h w)."""
        offset, down, up = (p.to(x.device, x.dtype) for p in (self.offset, self.down, self.up))
        return _on_vectors(x, lambda rows: rows + ((rows - offset) @ down.T) @ up)

    def names(self, place: str) -> frozenset[str]:
        return frozenset({f"{place}()"})

    def enter(self, model: Model, place: str, hooks: ExitStack) -> None:
        hooks.callback(model.module(place).register_forward_hook(mapping(self)).remove)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"offset": self.offset, "down": self.down, "up": self.up}, {}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> FeatureMap:
        return cls(tensors["offset"], tensors["down"], tensors["up"])


def mapping(transform: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward hook; blocks that are called with return_dict=False give tuples, and must get tuples back."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (transform(output[0]), *output[1:]) if isinstance(output, tuple) else transform(output)

    return hook


def _on_vectors(x: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a transform of (b p d) to (b p d) or (b d h w)."""
    if x.ndim != 4:
        return transform(x)
    return transform(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()


# -- sparse autoencoders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LatentTable:
    """Which latents are ablated at which time, and how: m entries at each of T training times. Unused ones have an infinite threshold."""

    times: Tensor
    """(T,) int64."""
    latents: Tensor
    """(T m) int64."""
    factors: Tensor
    """(T m): z' = factor · z."""
    thresholds: Tensor
    """(T m): only where z is above it."""

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, factors and thresholds (b m) of the nearest times to t (b)."""
        row = (self.times.to(t.device)[None] - t.reshape(-1, 1)).abs().argmin(1)
        return tuple(part.to(t.device)[row] for part in (self.latents, self.factors, self.thresholds))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class LatentAblation(Feature):
    """Latents of a sparse autoencoder, scaled wherever they fire above a level (SAeUron)."""

    kind: ClassVar[str] = "latents"

    net: SparseAutoencoder
    table: LatentTable
    error: Literal["kept", "repo"] = "kept"
    """What becomes of the part of x that the autoencoder does not explain: see `ops.sae`."""
    halves: Literal["both", "conditional"] = "both"
    """"conditional" leaves rows alone that are told nothing: those whose text is the encoding of ""."""

    def __post_init__(self) -> None:
        if self.error not in ("kept", "repo"):
            raise InvalidEdit(f"a latent ablation's error was {self.error!r}; expected kept or repo")
        if self.halves not in ("both", "conditional"):
            raise InvalidEdit(f"a latent ablation's halves was {self.halves!r}; expected both or conditional")

    def names(self, place: str) -> frozenset[str]:
        return frozenset({f"{place}()"})

    def enter(self, model: Model, place: str, hooks: ExitStack) -> None:
        """Raises Unsupported for vectors of another width than the autoencoder's."""
        net, call = _frozen(self.net, model), _Call()
        table = LatentTable(*(part.to(model.device) for part in vars(self.table).values()))
        silence = Silence(model) if self.halves == "conditional" else None
        function = ablate if self.error == "kept" else ablate_as_released

        def see(x: Tensor, t: Tensor, tokens: Tensor) -> None:
            call.entries = table.at(t)
            call.spared = None if silence is None else silence.rows(tokens)

        def change(x: Tensor) -> Tensor:
            if x.shape[-1] != net.decoder.shape[1] or call.entries is None:
                raise Unsupported(f"{place} gives vectors of width {x.shape[-1]}, and the autoencoder's is {net.decoder.shape[1]}")
            latents, factors, thresholds = call.entries
            changed = function(x, net, latents, factors.to(x), thresholds.to(x))
            return changed if call.spared is None else torch.where(call.spared[:, None, None], x, changed)

        hooks.callback(model.before_denoising(see))
        hooks.callback(model.module(place).register_forward_hook(mapping(lambda x: _on_vectors(x, change))).remove)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        settings = {"k": self.net.k, "error": self.error, "halves": self.halves}
        return {**packed_net(self.net), **{f"table.{name}": part for name, part in vars(self.table).items()}}, settings

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LatentAblation:
        table = LatentTable(*(tensors[f"table.{name}"] for name in ("times", "latents", "factors", "thresholds")))
        return cls(unpacked_net(tensors, settings["k"]), table, settings["error"], settings["halves"])


@dataclass
class _Call:
    """What the denoiser's call under way was told."""

    entries: tuple[Tensor, Tensor, Tensor] | None = None
    spared: Tensor | None = None


PARTS = ("encoder", "encoder_bias", "decoder", "decoder_bias")


def packed_net(net: SparseAutoencoder) -> dict[str, Tensor]:
    """The four tensors by name."""
    return {name: getattr(net, name).detach() for name in PARTS}


def unpacked_net(tensors: Mapping[str, Tensor], k: int) -> SparseAutoencoder:
    """The autoencoder again, without gradients of its own."""
    return SparseAutoencoder(*(tensors[name] for name in PARTS), k=k).requires_grad_(False)


def _frozen(net: SparseAutoencoder, model: Model) -> SparseAutoencoder:
    """A copy in the model's number format and on its device."""
    return SparseAutoencoder(*(p.to(model.device, model.dtype) for p in packed_net(net).values()), k=net.k).requires_grad_(False)


class Silence:
    """Recognises rows of the denoiser's text that are the encoding of "", up to rounding: the unconditional half of guidance."""

    def __init__(self, model: Model) -> None:
        with torch.no_grad():
            self.tokens = model.encode([""]).tokens.float()

    def rows(self, tokens: Tensor) -> Tensor:
        """(b) bool, for tokens (b l d)."""
        empty = self.tokens.to(tokens.device)
        distance = (tokens.detach().float() - empty).flatten(1).norm(dim=1)
        return distance <= max(1e-3, 2 * torch.finfo(tokens.dtype).eps) * empty.norm()


# -- residuals -----------------------------------------------------------------------------------------------------------


class PriorEraser(nn.Module):
    """EPR: a copy of the denoiser's encoder and middle, with a 1×1 convolution that begins as zero behind each of its outputs (DuMo)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder, channels = model.encoder_copy()
        self.zeros = nn.ModuleList(nn.utils.skip_init(nn.Conv2d, width, width, 1, device=model.device) for width in channels)
        for parameter in self.zeros.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> list[Tensor]:
        """r_0 … r_J for x (b c h w), t (b), tokens (b l d): one for each skip in the order of the decoder's list, then the middle's."""
        dtype = next(self.zeros.parameters()).dtype
        outputs = self.encoder(x.to(dtype), t, tokens.to(dtype))
        return [zero(h).to(x.dtype) for zero, h in zip(self.zeros, outputs, strict=True)]


def weighted(residuals: Sequence[Tensor], t: Tensor, table: Tensor | None, strength: Tensor | None, train_steps: int) -> list[Tensor]:
    """m · s[b(t), j] · r_j, with bucket b(t) = ⌊t B / T⌋ of the table's B, clamped to the last, and strength m (b).

    The order of skips is j; the table (B J+1) has one column for each residual."""
    found = list(residuals)
    if table is not None:
        bucket = (t * len(table)).div(train_steps, rounding_mode="floor").long().clamp(0, len(table) - 1)
        scales = table[bucket].T
        found = [scale.to(r)[:, None, None, None] * r for scale, r in zip(scales, found, strict=True)]
    return found if strength is None else [strength.to(r)[:, None, None, None] * r for r in found]


@dataclass(frozen=True, eq=False)
class Eraser:
    """One concept's EPR with its table and gate."""

    label: str
    """The concept; two attached edits may not erase the same one."""
    weights: Mapping[str, Tensor]
    """The state of a `PriorEraser`."""
    table: Tensor | None = None
    """s (B J+1): a weight for each bucket of times and each residual; None is 1 everywhere."""
    gate: PromptGate | None = None
    """m of each prompt; None is 1. With guidance both halves have that of the prompt: a row that encodes "" takes its partner's."""

    def module(self, model: Model) -> PriorEraser:
        """The network in the model's number format. Raises Unsupported where it was made for a denoiser of another shape."""
        net = PriorEraser(model)
        try:
            net.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise Unsupported(f"the eraser of {self.label!r} was made for a denoiser of another shape than {model.id}'s") from error
        return net.to(model.device, model.dtype).eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Residuals(Feature):
    """h'_j = h_j + Σ_e m_e s_e[b(t), j] r_{e,j} on every skip and the middle of the denoiser, on top of a ControlNet's."""

    kind: ClassVar[str] = "residuals"

    erasers: tuple[Eraser, ...]

    def names(self, place: str) -> frozenset[str]:
        return frozenset(f"{place}+{eraser.label}" for eraser in self.erasers)

    def enter(self, model: Model, place: str, hooks: ExitStack) -> None:
        for eraser in self.erasers:
            hooks.callback(model.before_denoising(self._adding(eraser, model, hooks)))

    @staticmethod
    def _adding(eraser: Eraser, model: Model, hooks: ExitStack) -> Callable[[Tensor, Tensor, Tensor], list[Tensor]]:
        net = eraser.module(model)
        table = None if eraser.table is None else eraser.table.to(model.device)
        recall = None if eraser.gate is None else eraser.gate.watch(model, hooks)
        silence = Silence(model) if recall else None

        def add(x: Tensor, t: Tensor, tokens: Tensor) -> list[Tensor]:
            strength = None
            if recall is not None and silence is not None:
                strength = paired(recall(tokens)[:, 0], silence.rows(tokens))
            return weighted(net(x, t, tokens), t, table, strength, model.schedule.train_steps)

        return add

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for number, eraser in enumerate(self.erasers):
            tensors |= {f"{number}.{name}": weight for name, weight in eraser.weights.items()}
            tensors |= {} if eraser.table is None else {f"{number}|table": eraser.table}
        gates = [None if eraser.gate is None else eraser.gate.json() for eraser in self.erasers]
        return tensors, {"labels": [eraser.label for eraser in self.erasers], "gates": gates}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Residuals:
        erasers = []
        for number, (label, gate) in enumerate(zip(settings["labels"], settings["gates"], strict=True)):
            weights = {name.removeprefix(f"{number}."): t for name, t in tensors.items() if name.startswith(f"{number}.")}
            erasers.append(Eraser(label, weights, tensors.get(f"{number}|table"), None if gate is None else PromptGate.from_json(gate)))
        return cls(tuple(erasers))


def paired(strength: Tensor, silent: Tensor) -> Tensor:
    """In a batch [unconditional; conditional] a silent row (b) takes the strength of the row half a batch behind it."""
    half = len(strength) // 2
    if len(strength) % 2 or not bool(silent[:half].all()):
        return strength
    return torch.cat([strength[half:], strength[half:]])


FEATURES: dict[str, type[FeatureMap] | type[LatentAblation] | type[Residuals]] = {
    "map": FeatureMap,
    "latents": LatentAblation,
    "residuals": Residuals,
}
"""The features that a `FeatureEdit` can hold, by kind."""

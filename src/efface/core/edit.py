"""The erasure itself: small, named, saved, reversible.

Five final kinds. `WeightEdit` and `LowRankEdit` change weights and can be baked in; `FeatureEdit` and `SamplingEdit` are
removable hooks; `Chain` is several edits in order. An edit holds differences, not weights: attaching computes W + Δ once,
swaps it in by reference and keeps the originals, so detaching is exact to the bit and nothing is ever subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from efface.core.attachment import Attachment, Edit, Part
from efface.core.card import Card, Match
from efface.core.errors import InvalidEdit, Overlap, Unsupported
from efface.core.features import FEATURES, Feature, FeatureMap
from efface.core.gate import PromptGate
from efface.core.model import Model, Rule
from efface.core.rules import RULES
from efface.ops.gate import Membranes
from efface.ops.ridge import RightFactor

__all__ = ["Attachment", "Chain", "Edit", "FeatureEdit", "FeatureMap", "LowRankEdit", "Part", "Patch", "SamplingEdit", "WeightEdit"]


def _put(model: Model, deltas: Mapping[str, Tensor]) -> Attachment:
    """Swaps W + Δ in, in the network's own number format, and keeps W; all of them are computed before the first is swapped.

    Where the network is moved or cast meanwhile, W follows at the end. Raises Unsupported for another shape."""
    slots = model.slots(deltas)
    for name, delta in deltas.items():
        if delta.shape != slots[name].tensor.shape:
            raise Unsupported(
                f"{name} has the shape {tuple(slots[name].tensor.shape)} in {model.id}, and the edit's is {tuple(delta.shape)}"
            )
    originals = tuple((slots[name], slots[name].tensor) for name in deltas)
    changed = [_sum(weight, delta) for (_, weight), delta in zip(originals, deltas.values(), strict=True)]
    for (slot, _), tensor in zip(originals, changed, strict=True):
        slot.put(tensor)

    def undo() -> None:
        for slot, weight in originals:
            now = slot.tensor
            if (weight.device, weight.dtype) != (now.device, now.dtype):
                weight.data = weight.data.to(now)
            slot.put(weight)

    return Attachment(frozenset(deltas), originals, undo)


def _sum(weight: Tensor, delta: Tensor) -> nn.Parameter:
    """W + Δ, computed in float32 and rounded once."""
    changed = weight.detach().float() + delta.to(weight.device, torch.float32)
    return nn.Parameter(changed.to(weight.dtype), requires_grad=weight.requires_grad)


def _bake(edit: Edit, model: Model, match: Match) -> None:
    """Attaches the edit for a moment, and writes what then stands there into the network's own tensors: all of it or nothing."""
    edit.card.check(model, match)
    if model.attached:
        raise Overlap("an edit cannot be baked in while others are attached; detach them first")
    attachment = edit._enter(model)
    changed = {slot: slot.tensor for slot, _ in attachment.originals}
    attachment.undo()
    with torch.no_grad():
        for slot, tensor in changed.items():
            slot.tensor.copy_(tensor)


@dataclass(frozen=True, eq=False)
class Patch:
    """One right factor for several maps, which stands for a Δ = W D of each: the whole edit of a closed-form method in one d × d matrix."""

    names: tuple[str, ...]
    """Full parameter names of the maps, each of input width d."""
    factor: RightFactor


@dataclass(frozen=True, eq=False)
class WeightEdit(Edit):
    """W + Δ for some parameters, and W (I + D) for those of `patches`."""

    kind: ClassVar[str] = "weight"
    threat: ClassVar[str] = "a change of weights: whoever holds the original weights, or fine-tunes, can undo it; no flag turns it off"

    deltas: Mapping[str, Tensor]
    """Δ by full parameter name ("unet.….to_k.weight"), float32."""
    card: Card
    extras: Mapping[str, Part] = field(default_factory=dict)
    patches: tuple[Patch, ...] = ()
    """What is kept as a right factor, and becomes a Δ when it is attached (`expand`)."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.deltas).union(*(patch.names for patch in self.patches))

    def expand(self, model: Model) -> dict[str, Tensor]:
        """Every Δ by name, those of the patches computed from the weights that `model` now has. Raises Unsupported for another width."""
        found = dict(self.deltas)
        for patch in self.patches:
            width = len(patch.factor.left)
            for name, slot in model.slots(patch.names).items():
                if slot.tensor.ndim != 2 or slot.tensor.shape[1] != width:
                    raise Unsupported(
                        f"{name} has the shape {tuple(slot.tensor.shape)} in {model.id}, and the patch is for maps of input width {width}"
                    )
                found[name] = patch.factor.change(slot.tensor)
        return found

    def _enter(self, model: Model) -> Attachment:
        return _put(model, self.expand(model))

    def bake(self, model: Model, *, match: Match = "exact") -> None:
        _bake(self, model, match)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = dict(self.deltas)
        for number, patch in enumerate(self.patches):
            sides = {"left": patch.factor.left, "right": patch.factor.right}
            tensors |= {f"patch.{number}/{side}": tensor for side, tensor in sides.items() if tensor is not None}
        return tensors, {"patches": [list(patch.names) for patch in self.patches]} if self.patches else {}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], settings: dict[str, Any], card: Card, extras: Mapping[str, Part]) -> WeightEdit:
        patches = []
        for number, names in enumerate(settings.get("patches", [])):
            sides = (tensors[f"patch.{number}/left"], tensors.get(f"patch.{number}/right"))
            patches.append(Patch(tuple(names), RightFactor(*sides)))
        deltas = {name: tensor for name, tensor in tensors.items() if not name.startswith("patch.")}
        return cls(deltas, card, extras, tuple(patches))


@dataclass(frozen=True, eq=False)
class LowRankEdit(Edit):
    """W + scale · up · down for some parameters (Hu et al., arXiv 2106.09685); with a gate as strong as each prompt asks."""

    kind: ClassVar[str] = "low-rank"
    threat: ClassVar[str] = "an adapter: removable while it is attached; baked in, it is a change of weights"

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """(down (r, in…), up (out, r)) by full parameter name."""
    card: Card
    extras: Mapping[str, Part] = field(default_factory=dict)
    scale: float = 1.0
    gate: PromptGate | None = None
    """With a gate, rank i is the membrane of the gate's i-th concept; nothing is swapped in, and hooks add what the prompt asks for."""

    @property
    def names(self) -> frozenset[str]:
        """Gated edits add up, so that those of different concepts do not clash."""
        return frozenset(self.factors) if self.gate is None else frozenset(f"{n} for {text}" for n in self.factors for text in self._texts)

    @property
    def _texts(self) -> tuple[str, ...]:
        return () if self.gate is None else tuple(text for texts in self.gate.texts for text in texts)

    @property
    def lost_in_weights(self) -> str:
        if self.gate is None:
            return ""
        return (
            f"the prompt gate ({self.gate.transport}) of the membranes for {', '.join(map(repr, self._texts))}: as plain weights they act "
            "at full strength on every prompt, and harm what is not erased"
        )

    def ungated(self) -> LowRankEdit:
        """The same factors at full strength on every prompt: a plain LoRA, which can be baked in."""
        return LowRankEdit(self.factors, self.card, self.extras, self.scale)

    def deltas(self, model: Model) -> dict[str, Tensor]:
        """scale · up · down in the shape of each parameter, float32."""
        shapes = {name: slot.tensor.shape for name, slot in model.slots(self.factors).items()}
        full = {n: self.scale * up.float().flatten(1) @ down.float().flatten(1) for n, (down, up) in self.factors.items()}
        for name, delta in full.items():
            if delta.numel() != shapes[name].numel():
                raise Unsupported(
                    f"{name} has the shape {tuple(shapes[name])} in {model.id}, and the edit's factors give {tuple(delta.shape)}"
                )
        return {name: delta.reshape(shapes[name]) for name, delta in full.items()}

    def _enter(self, model: Model) -> Attachment:
        if self.gate is None:
            return _put(model, self.deltas(model))
        self.deltas(model)
        factors = {name.removesuffix(".weight"): pair for name, pair in self.factors.items()}
        merge = self.gate.merge
        return Attachment(self.names, (), self.gate.attach(model, Membranes(factors, self.scale, merge)).close)

    def bake(self, model: Model, *, match: Match = "exact") -> None:
        if self.gate is not None:
            raise Unsupported(f"weights cannot hold {self.lost_in_weights}; use attach, or bake `edit.ungated()` if that is meant")
        _bake(self, model, match)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parts = {f"{n}/{side}": t for n, pair in self.factors.items() for side, t in zip(("down", "up"), pair, strict=True)}
        return parts, {"scale": self.scale, **({} if self.gate is None else {"gate": self.gate.json()})}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], settings: dict[str, Any], card: Card, extras: Mapping[str, Part]) -> LowRankEdit:
        names = [name.removesuffix("/down") for name in tensors if name.endswith("/down")]
        gate = PromptGate.from_json(settings["gate"]) if "gate" in settings else None
        return cls({n: (tensors[f"{n}/down"], tensors[f"{n}/up"]) for n in names}, card, extras, settings["scale"], gate)


@dataclass(frozen=True, eq=False)
class FeatureEdit(Edit):
    """Hooks that change features while the denoiser runs: see `core.features`."""

    kind: ClassVar[str] = "feature"
    threat: ClassVar[str] = "a removable hook: whoever runs the model can leave it out"

    maps: Mapping[str, Feature]
    """By full module name ("unet.mid_block.attentions.0")."""
    card: Card
    extras: Mapping[str, Part] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(feature.names(place) for place, feature in self.maps.items()))

    def _enter(self, model: Model) -> Attachment:
        with ExitStack() as hooks:
            for place, feature in self.maps.items():
                feature.enter(model, place, hooks)
            return Attachment(self.names, (), hooks.pop_all().close)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        settings: dict[str, Any] = {}
        for place, feature in self.maps.items():
            own, values = feature.pack()
            tensors |= {f"{place}/{name}": tensor for name, tensor in own.items()}
            settings[place] = {"kind": feature.kind, "values": values}
        return tensors, {"features": settings}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], settings: dict[str, Any], card: Card, extras: Mapping[str, Part]) -> FeatureEdit:
        maps: dict[str, Feature] = {}
        for place, entry in settings["features"].items():
            if entry["kind"] not in FEATURES:
                raise InvalidEdit(f"the edit holds the unknown kind of feature {entry['kind']!r}; known are {', '.join(FEATURES)}")
            own = {n.removeprefix(f"{place}/"): t for n, t in tensors.items() if n.startswith(f"{place}/")}
            maps[place] = FEATURES[entry["kind"]].unpack(own, entry["values"])
        return cls(maps, card, extras)


@dataclass(frozen=True, eq=False)
class SamplingEdit(Edit):
    """A rule on conditioning and guidance while sampling; no weight changes."""

    kind: ClassVar[str] = "sampling"
    threat: ClassVar[str] = "a rule of the sampler: whoever runs the model can leave it out"
    rounding: ClassVar[int] = 64
    """Rules add forwards, so that others are made in other batches."""

    rule: Rule
    card: Card
    extras: Mapping[str, Part] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        return frozenset({f"rule:{self.rule.name}"})

    def _enter(self, model: Model) -> Attachment:
        model.rules.append(self.rule)
        return Attachment(self.names, (), lambda: model.rules.remove(self.rule))

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"rule": self.rule.name, "values": self.rule.settings()}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], settings: dict[str, Any], card: Card, extras: Mapping[str, Part]) -> SamplingEdit:
        if settings["rule"] not in RULES:
            raise InvalidEdit(f"the edit uses the unknown sampling rule {settings['rule']!r}; known are {', '.join(RULES)}")
        return cls(RULES[settings["rule"]](**settings["values"]), card, extras)


@dataclass(frozen=True, eq=False)
class Chain(Edit):
    """Several edits, attached in order."""

    kind: ClassVar[str] = "chain"
    threat: ClassVar[str] = "as its weakest part"

    edits: tuple[Edit, ...]
    card: Card
    extras: Mapping[str, Part] = field(default_factory=dict)

    @property
    def rounding(self) -> int:  # type: ignore[override]
        """That of the part that has most."""
        return max((edit.rounding for edit in self.edits), default=0)

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(edit.names for edit in self.edits))

    def _enter(self, model: Model) -> Attachment:
        """Parts may build on each other: each meets the model with the ones before it in place."""
        stack = ExitStack()
        try:
            parts = []
            for edit in self.edits:
                parts.append(edit._enter(model))
                stack.callback(parts[-1].undo)
        except BaseException:
            stack.close()
            raise
        return Attachment(self.names, tuple(o for part in parts for o in part.originals), stack.close)

    @property
    def parts(self) -> Iterator[Edit]:
        """The edits of which it consists, those of chains in it too, in order."""
        for edit in self.edits:
            yield from edit.parts if isinstance(edit, Chain) else (edit,)

    def bake(self, model: Model, *, match: Match = "exact") -> None:
        hooks = [edit.kind for edit in self.parts if isinstance(edit, (FeatureEdit, SamplingEdit))]
        if hooks:
            raise Unsupported(f"a chain with a {hooks[0]} edit cannot be baked in, since that part is a removable hook; use attach")
        lost = [edit.lost_in_weights for edit in self.parts if edit.lost_in_weights]
        if lost:
            raise Unsupported(f"a chain cannot be baked in where weights cannot hold {lost[0]}; use attach, or chain `edit.ungated()`")
        _bake(self, model, match)

    @property
    def files(self) -> dict[str, Part]:
        """Its own extras, and those of its parts with their number before the name: "0.key"."""
        return {**self.extras, **{f"{n}.{name}": part for n, edit in enumerate(self.edits) for name, part in edit.files.items()}}

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        parts: list[dict[str, Any]] = []
        for number, edit in enumerate(self.edits):
            own, settings = edit._pack()
            tensors |= {f"{number}|{name}": tensor for name, tensor in own.items()}
            parts.append({"kind": edit.kind, "settings": settings, "card": edit.card.json()})
        return tensors, {"parts": parts}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], settings: dict[str, Any], card: Card, extras: Mapping[str, Part]) -> Chain:
        edits, rest = [], dict(extras)
        for number, part in enumerate(settings["parts"]):
            own = {n.removeprefix(f"{number}|"): t for n, t in tensors.items() if n.startswith(f"{number}|")}
            files = {n.removeprefix(f"{number}."): rest.pop(n) for n in extras if n.startswith(f"{number}.")}
            edits.append(Edit.kinds[part["kind"]]._unpack(own, part["settings"], Card.from_json(part["card"]), files))
        return cls(tuple(edits), card, rest)

"""The sampling rules that a `SamplingEdit` can hold, by name.

A rule changes guided predictions and nothing else: the bare denoiser (`Model.predict`) stays the un-erased one, which `Model.unseen` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from efface.core.errors import InvalidTask, Unsupported
from efface.core.model import Cond, Guided, Model, Rule
from efface.core.task import Task


class NegativePrompt(Rule):
    """Guidance away from a text instead of away from nothing: null := encode(text)."""

    name = "negative_prompt"

    def __init__(self, text: str) -> None:
        self.text = text

    def guided(self, model: Model, inner: Guided, x: Tensor, t: Tensor, cond: Cond, null: Cond, scale: float) -> Tensor:
        """Raises Unsupported at scale 1, where the unconditional half has no weight and nothing would be erased."""
        if scale == 1:
            raise Unsupported("a negative prompt acts through guidance, and at a guidance of 1 or less there is none; give more than 1")
        return inner(x, t, cond, model.encode([self.text]).expand(len(x)), scale)

    def settings(self) -> dict[str, Any]:
        return {"text": self.text}


@dataclass
class _Walk:
    """One trajectory under way."""

    cond: Tensor
    """Kept so that the storage by which a trajectory is recognised is not given out again."""
    shape: torch.Size
    safety: tuple[Cond, ...]
    momentum: list[Tensor]
    """ν of each text (b c h w), in noise, float32."""
    last: Tensor = field(default_factory=lambda: torch.empty(0))
    """The times (b) of the call before."""

    def goes_on(self, x: Tensor, t: Tensor, cond: Cond) -> bool:
        same = self.cond.untyped_storage().data_ptr() == cond.tokens.untyped_storage().data_ptr() and self.shape == x.shape
        return same and bool((t <= self.last).all())


class SafeLatent(Rule):
    """Safe latent diffusion's guidance away from safety texts (Schramowski et al., arXiv 2211.05105), on the conditional half.

    At each step of a trajectory, with ε_u, ε_p, ε_s for nothing, the prompt and a safety text, element by element:

        μ   = min(1, |s_S (ε_p − ε_s)|) where ε_p − ε_s < λ, else 0
        g_s = μ (ε_s − ε_u) + s_m ν;    ν ← β_m ν + (1 − β_m) g_s
        ε_p ← ε_p − g_s   once the warm-up is over: at times t < T (1 − δ/n)

    With g = ε_p − ε_u − g_s the paper's ε_u + s_g g is guidance from ε_u to this ε_p at any scale s_g, 1 included. Several texts each
    have their own ν and g_s, and the latter are summed. A trajectory starts anew, with ν = 0, when the times rise or the batch or the
    conditioning is another; two walks over one and the same `Cond` that both have a single step are taken for one.

    All is computed in noise, whatever the network predicts. Costs one forward a text and row on top of the two of guidance."""

    name = "safe_latent"

    def __init__(
        self,
        texts: Sequence[str],
        *,
        warmup: int,
        strength: float,
        threshold: float,
        momentum: float,
        momentum_decay: float,
        warmup_of: int,
    ) -> None:
        """warmup (δ) of warmup_of (n) steps; strength (s_S), the rule is off below 1; threshold (λ); momentum (s_m) and its decay (β_m)."""
        self.texts = tuple(texts)
        self.forwards = len(self.texts)
        self.warmup, self.warmup_of, self.strength, self.threshold = warmup, warmup_of, strength, threshold
        self.momentum, self.momentum_decay = momentum, momentum_decay
        self._walk: _Walk | None = None

    def guided(self, model: Model, inner: Guided, x: Tensor, t: Tensor, cond: Cond, null: Cond, scale: float) -> Tensor:
        """Raises Unsupported where another rule was attached first: it rewrites what others start from."""
        if self.strength < 1:
            return inner(x, t, cond, null, scale)
        if model.rules[0] is not self:
            raise Unsupported(
                f"safe latent guidance rewrites the conditional half, from which {model.rules[0].name!r} has already gone on; "
                "attach safe latent guidance first"
            )
        walk = self._walking(model, x, t, cond)
        parts = [null, cond, *(text.expand(len(x)) for text in walk.safety)]
        predictions = model.predict(torch.cat([x] * len(parts)), t.repeat(len(parts)), Cond.cat(parts)).chunk(len(parts))
        unconditional, conditional, *safety = predictions
        pull = self._pull(model, walk, t, unconditional, conditional, safety)
        return unconditional + scale * (conditional - pull - unconditional)

    def _walking(self, model: Model, x: Tensor, t: Tensor, cond: Cond) -> _Walk:
        """The trajectory that this call belongs to."""
        if self._walk is None or not self._walk.goes_on(x, t, cond):
            with torch.no_grad():
                safety = tuple(model.encode([text]) for text in self.texts)
            momentum = [torch.zeros_like(x, dtype=torch.float32, requires_grad=False) for _ in self.texts]
            self._walk = _Walk(cond.tokens, x.shape, safety, momentum)
        self._walk.last = t.clone()
        return self._walk

    def _pull(self, model: Model, walk: _Walk, t: Tensor, null: Tensor, prompt: Tensor, safety: Sequence[Tensor]) -> Tensor:
        """Σ g_s in the network's own parametrisation, zero in the warm-up; moves the trajectory one step on."""
        to_noise = model.schedule.noise_weight(t, null).sqrt()
        total = torch.zeros_like(prompt, dtype=torch.float32)
        for i, text in enumerate(safety):
            gap, direction = (to_noise * (a.float() - b.float()) for a, b in ((prompt, text), (text, null)))
            guidance = safety_guidance(gap, direction, self.strength, self.threshold) + self.momentum * walk.momentum[i]
            walk.momentum[i] = (self.momentum_decay * walk.momentum[i] + (1 - self.momentum_decay) * guidance).detach()
            total = total + guidance
        active = t < model.schedule.train_steps * (1 - self.warmup / self.warmup_of)
        return torch.where(active.reshape(to_noise.shape), (total / to_noise).to(prompt.dtype), 0.0)

    def settings(self) -> dict[str, Any]:
        fields = ("warmup", "strength", "threshold", "momentum", "momentum_decay", "warmup_of")
        return {"texts": list(self.texts), **{name: getattr(self, name) for name in fields}}


def safety_guidance(gap: Float[Tensor, "*s"], direction: Float[Tensor, "*s"], strength: float, threshold: float) -> Float[Tensor, "*s"]:
    """μ (ε_s − ε_u) with μ = min(1, |s_S (ε_p − ε_s)|) where ε_p − ε_s < λ, else 0; the test is signed, as in both implementations.

    gap: ε_p − ε_s. direction: ε_s − ε_u."""
    scale = (strength * gap).abs().clamp(max=1)
    return torch.where(gap < threshold, scale, 0.0) * direction


def away_from(model: Model, task: Task, *, joined: bool, prefix: str = "") -> list[str]:
    """The texts that a sampling rule steers away from: one list of all targets with commas between, or one text for each, each
    behind `prefix`.

    Raises InvalidTask: a target has an anchor, which such a rule knows nothing of; or a text is longer than the text encoder reads."""
    anchored = [swap for swap in task.erase if swap.anchor.name]
    if anchored:
        raise InvalidTask(
            f"a sampling rule steers away from {anchored[0].target.name!r} and towards nothing; leave out '-> {anchored[0].anchor.name}'"
        )
    words = [text for concept in task.targets for text in concept.texts]
    texts = [f"{prefix} {text}".strip() for text in ([", ".join(words)] if joined else words)]
    for text in texts:
        if _truncated(model, text):
            advice = "give fewer, or erase them one by one (joined=False)" if joined and len(words) > 1 else "shorten it"
            raise InvalidTask(f"{text!r} fills the text encoder's whole length, so that its end may be cut off unseen; {advice}")
    return texts


@torch.no_grad()
def _truncated(model: Model, text: str) -> bool:
    """Whether another word at its end would go unread."""
    ids = model.encode([text, f"{text} x"]).ids
    return ids is not None and torch.equal(ids[0], ids[1])


RULES: dict[str, type[NegativePrompt] | type[SafeLatent]] = {NegativePrompt.name: NegativePrompt, SafeLatent.name: SafeLatent}

"""One text-to-image diffusion model, whatever its family: the only thing that methods, metrics and attacks see.

Shapes: `b` batch, `l` tokens, `d` width of a token, `c h w` latent.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from efface.core.errors import Unsupported
from efface.core.sampling import Schedule
from efface.ops.overlay import Slot


@dataclass(frozen=True)
class Cond:
    """What the denoiser is told: the encoded prompts."""

    tokens: Tensor
    """(b l d), the last hidden state of the text encoder."""
    pooled: Tensor | None = None
    """(b p), for the families that use one."""
    mask: Tensor | None = None
    """(b l), 1 where a token stands and 0 where padding stands; None where only embeddings are known."""
    ids: Tensor | None = None
    """(b l), the token ids; None where only embeddings are known."""

    def __len__(self) -> int:
        return len(self.tokens)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Cond:
        parts = (self.tokens, self.pooled, self.mask, self.ids)
        return Cond(*(None if p is None else f(p) for p in parts))  # type: ignore[arg-type]

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Cond:
        """Some rows; an index (b) may lie on another device."""
        return self._map(lambda t: t[rows.to(t.device) if isinstance(rows, Tensor) else rows])

    def expand(self, batch: int) -> Cond:
        """Repeats a single row `batch` times (a view where possible)."""
        return self if len(self) == batch else self._map(lambda t: t.expand(batch, *t.shape[1:]))

    def mix(self, weights: Tensor) -> Cond:
        """Σ_i y_i T_i for weights y (b n) over the n rows, in float32: one row for a one-hot y, else a mixture. Differentiable in y."""
        tokens = (weights @ self.tokens.float().flatten(1)).unflatten(1, self.tokens.shape[1:])
        return Cond(tokens, None if self.pooled is None else weights @ self.pooled.float())

    def with_tokens(self, tokens: Tensor) -> Cond:
        """The same with other token embeddings; ids and mask are forgotten, since they no longer belong."""
        return replace(self, tokens=tokens, mask=None, ids=None)

    @staticmethod
    def cat(parts: Sequence[Cond]) -> Cond:
        """Stacks along the batch; a field that any part lacks is dropped."""

        def join(name: str) -> Tensor | None:
            values = [getattr(p, name) for p in parts]
            return None if any(v is None for v in values) else torch.cat(values)

        return Cond(torch.cat([p.tokens for p in parts]), join("pooled"), join("mask"), join("ids"))


@dataclass
class Meter:
    """What was spent: samples through the denoiser, calls of it, samples of backward, seconds since `reset`."""

    forwards: int = 0
    """Samples: a call on a batch of 8 counts 8."""
    calls: int = 0
    backwards: int = 0
    started: float = field(default_factory=time.perf_counter)

    def reset(self) -> None:
        self.forwards = self.calls = self.backwards = 0
        self.started = time.perf_counter()

    def watch(self, prediction: Tensor) -> Tensor:
        """Counts one call, and its backward if one comes to pass through `prediction`."""
        self.forwards += len(prediction)
        self.calls += 1
        if prediction.requires_grad:
            prediction.register_hook(self._count_backward)
        return prediction

    def watch_backward(self, value: Tensor) -> Tensor:
        """Counts the backward through `value` (b …) alone, for a loss that reads something else of the network than its prediction."""
        if value.requires_grad:
            value.register_hook(self._count_backward)
        return value

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        return {"forwards": self.forwards, "calls": self.calls, "backwards": self.backwards, "seconds": round(seconds, 3)}


Parameters = Mapping[str, Slot]
"""Full names ("unet.down_blocks.0.attentions.0.….to_k.weight") and where each lives."""


class Rule(ABC):
    """A change of the guidance at sampling time, without a change of weights: what a `SamplingEdit` attaches."""

    name: str
    forwards: int = 0
    """Samples through the denoiser that the rule adds to the two of guidance, for each row and step."""

    @abstractmethod
    def guided(self, model: Model, inner: Guided, x: Tensor, t: Tensor, cond: Cond, null: Cond, scale: float) -> Tensor:
        """The guided prediction (b c h w); `inner` is the same function without this rule."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON values from which the rule can be made again."""


BATCH = 32
"""Pictures to draw, encode or decode at once."""
POSITIONS = 2**15
"""Latent positions of these at most: eight pictures of Stable Diffusion 1.x, so that a graphics card of 8 GB can do it."""
Guided = Callable[[Tensor, Tensor, Cond, Cond, float], Tensor]
BeforeDenoising = Callable[[Tensor, Tensor, Tensor], "Sequence[Tensor] | None"]


class Model(ABC):
    """A text-to-image diffusion model behind one interface; made by `efface.load`."""

    id: str
    """The Hub id, folder or name that it was loaded from."""
    family: str
    """"sd1", "sd2", …: which of the families' code reads it."""
    schedule: Schedule
    meter: Meter
    rules: list[Rule]
    """Active sampling rules, outermost last; attached by `SamplingEdit`."""
    attached: list[Any]
    """The stack of attached edits; `core.edit` alone writes it."""
    lr_scale: float = 1.0
    """How much larger learning rates this network's cross-attention takes than that of SD 1.x, for which the papers' values were chosen;
    see `learning_rate`."""
    lr_scale_others: float | None = None
    """The same where layers outside the cross-attention are trained; None where it is no other."""
    default_steps: int
    """What `sample` takes without `steps`."""
    default_guidance: float
    """What `sample` takes without `guidance`."""

    @property
    def unseen(self) -> tuple[str, ...]:
        """The active sampling rules by name: what is erased in `guided` and in pictures, and not in `predict`. An attack on the bare
        denoiser would run on the un-erased model there, and is refused (`Attack.require`)."""
        return tuple(rule.name for rule in self.rules)

    # -- text and images -------------------------------------------------------------------------------------------------
    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Cond:
        """Encodes prompts, padded and truncated to the encoder's length: tokens (b l d)."""

    @abstractmethod
    def encode_tokens(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> Cond:
        """Encodes token ids (b l), or input embeddings (b l d) in their place; differentiable in `embeds`.

        Given with embeddings, ids say which tokens these are, to hooks that go by the tokens, such as a gate."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (b c h w), scaled as the denoiser wants them (the posterior's mean), from images (b 3 H W) in [0, 1]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (b 3 H W) in [0, 1] from latents."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) at the model's own image size."""

    @abstractmethod
    def words(self) -> list[str]:
        """The tokenizer's whole words (alphabetic, end-of-word mark removed), in the order of their ids."""

    def spell(self, ids: Tensor) -> list[str]:
        """The texts of token ids (b l), without start, end and padding; encoding one again may give other tokens. Raises Unsupported where
        the family cannot tell."""
        raise Unsupported(f"the family {self.family!r} cannot turn token ids into text")

    # -- denoiser --------------------------------------------------------------------------------------------------------
    @abstractmethod
    def predict(self, x: Tensor, t: Tensor | int, cond: Cond) -> Tensor:
        """The network's output (b c h w) in its own parametrisation, for latents x (b c h w) at times t (int or (b,)).

        A `cond` of one row is expanded to the batch. Counted by `meter`."""

    def guided(self, x: Tensor, t: Tensor | int, cond: Cond, null: Cond, scale: float) -> Tensor:
        """Classifier-free guidance, null + scale (cond − null) (Ho & Salimans, arXiv 2207.12598), through the active rules.

        Both halves go through the network in one call; scale 1 costs only the conditional half."""
        times = torch.as_tensor(t, device=x.device).reshape(-1).expand(len(x))
        function: Guided = self._plain_guided
        for rule in self.rules:
            function = _bound(rule, self, function)
        return function(x, times, cond.expand(len(x)), null.expand(len(x)), scale)

    def _plain_guided(self, x: Tensor, t: Tensor, cond: Cond, null: Cond, scale: float) -> Tensor:
        if scale == 1:
            return self.predict(x, t, cond)
        pair = self.predict(torch.cat([x, x]), torch.cat([t, t]), Cond.cat([null, cond]))
        unconditional, conditional = pair.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        batch: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Images (b 3 H W) in [0, 1], float32 on the CPU; image i is drawn from `seeds[i]`, or from seed + i.

        `steps`, `guidance` and `batch` default to the model's own. Uses the pipeline's scheduler, and no global random state.
        Raises ValueError for steps < 1, a negative seed, no prompt, or a guidance that is not finite."""

    @property
    @abstractmethod
    def sampler(self) -> str:
        """The name of the sampler that `sample` walks, such as "DDIMScheduler": part of every result."""

    @abstractmethod
    def calls(self, steps: int | None = None) -> int:
        """How often `sample` calls the guided prediction for a batch, with `steps` or the model's own: once a step with DDIM, once more in
        all with PNDM, 2 steps − 1 times with samplers of second order such as Heun's."""

    def batch(self, most: int = BATCH) -> int:
        """Pictures to draw, encode or decode at once: `most`, or as many as have `POSITIONS` latent positions in all; at least 1."""
        _, height, width = self.latent_shape
        return min(most, max(1, POSITIONS // (height * width)))

    # -- parameters and modules ------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def components(self) -> Mapping[str, nn.Module]:
        """The networks by name: denoiser ("unet"), "text_encoder", "vae"."""

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """The names that `select` takes."""

    @abstractmethod
    def select(self, group: str) -> Parameters:
        """The parameters of a group: "xattn", "noxattn", "selfattn", "text_kv", "full", "text_encoder", ….

        Raises Unsupported with the valid names when the family has no such group."""

    def learning_rate(self, lr: float, *groups: str) -> float:
        """A rate in units of SD 1.x as one of this network, so that one text form of a method serves models of all sizes.

        `lr` · `lr_scale`; where `groups` hold a parameter outside the cross-attention ("xattn"), `lr` · `lr_scale_others`."""
        if self.lr_scale_others is None or "xattn" not in self.groups:
            return lr * self.lr_scale
        inner = set(self.select("xattn"))
        outside = any(not set(self.select(group)) <= inner for group in groups)
        return lr * (self.lr_scale_others if outside else self.lr_scale)

    @abstractmethod
    def hook_points(self, role: str) -> Mapping[str, nn.Module]:
        """Modules by role ("attn", "cross_attn", "self_attn", "resnet", "block", "text_layer"), found from the network itself."""

    @abstractmethod
    def inputs(self, group: str, cond: Cond, *, x: Tensor | None = None, t: Tensor | int | None = None) -> Mapping[str, Tensor]:
        """What enters each linear map of `group` (name of its weight -> (b l d)). For text-only maps this is `cond.tokens`;
        other groups need `x` and `t`, and raise Unsupported without."""

    @abstractmethod
    def attention(self, *, resolution: int | None = None) -> AbstractContextManager[Any]:
        """Captures cross-attention maps while active; yields an object with `.mean()` -> (b h w l), summed as they come, and a list
        `.watchers` of functions that are called with each layer's probabilities (b n q l), heads apart."""

    def before_denoising(self, function: BeforeDenoising) -> Callable[[], None]:
        """Calls `function(x, t, tokens)`, x (b c h w), t (b), tokens (b l d), before each call of the denoiser, a pipeline's own included.

        The residuals that it returns are added to the skips, in the order of the decoder's list, and the middle, on top of those of a
        ControlNet; None adds nothing. Returns what takes it away again. Raises Unsupported where the family has no such place."""
        raise Unsupported(f"the family {self.family!r} offers no place before its denoiser, which edits of features need")

    def encoder_copy(self) -> tuple[nn.Module, list[int]]:
        """A copy of the denoiser's encoder and middle with its present weights, and the channels of its outputs.

        It is a module from x, t, tokens, as above, to the list of all skips and the middle. Raises Unsupported for what is no UNet."""
        raise Unsupported(f"the denoiser of the family {self.family!r} has no encoder with skips to copy")

    # -- state -----------------------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that `predict` calls."""

    def module(self, name: str) -> nn.Module:
        """The module of a full name such as "unet.mid_block". Raises Unsupported when there is none."""
        component, _, path = name.partition(".")
        try:
            return self.components[component].get_submodule(path)
        except (KeyError, AttributeError) as error:
            raise Unsupported(f"{self.id} has no module {name!r}; its networks are {', '.join(self.components)}") from error

    def slots(self, names: Iterable[str]) -> Parameters:
        """Where the parameters of these full names live. Raises Unsupported when there is none."""
        found: dict[str, Slot] = {}
        for name in names:
            path, _, attribute = name.rpartition(".")
            owner = self.module(path)
            if owner._parameters.get(attribute) is None:
                raise Unsupported(f"{self.id} has no parameter {name!r}")
            found[name] = Slot(owner, attribute)
        return found

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Every network in eval mode and without gradients of its own; flags are restored exactly, whatever happens."""
        modules = [m for c in self.components.values() for m in c.modules()]
        parameters = [p for c in self.components.values() for p in c.parameters()]
        modes, flags = [m.training for m in modules], [p.requires_grad for p in parameters]
        try:
            for module in modules:
                module.training = False
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)


def _bound(rule: Rule, model: Model, inner: Guided) -> Guided:
    def function(x: Tensor, t: Tensor, cond: Cond, null: Cond, scale: float) -> Tensor:
        return rule.guided(model, inner, x, t, cond, null, scale)

    return function

"""A prompt gate on low-rank adapters: SPM's facilitated transport, at inference and for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efface.core.errors import InvalidEdit, Unsupported, suggest
from efface.core.model import Cond, Model
from efface.ops.gate import MERGES, TRANSPORTS, Concepts, Membranes, Memory, UnknownRow, entering


@dataclass(frozen=True)
class PromptGate:
    """How strongly each of k rank-1 membranes acts on a prompt: γ_c(p) = max(cos(vec E(p), vec E(c)), |tok(p) ∩ tok(c)| / |tok(c)|)
    (Lyu et al., arXiv 2312.16145, as in their `evaluate_task.py`).

    Raises InvalidEdit for an unknown transport or merge, or a membrane without a text."""

    texts: tuple[tuple[str, ...], ...]
    """The texts c of each membrane; of several the largest γ counts."""
    transport: str = "clipcos_tokenuni"
    """"clipcos_tokenuni" (the formula), "clipcos" or "tokenuni" (one of its halves), "allone" (γ = 1)."""
    merge: str = "sum"
    """"sum": Σ γ_c U_c D_c. "repo": (Σ γ_a U_a)(Σ γ_b D_b), as the released code merges."""

    def __post_init__(self) -> None:
        for name, valid in {"transport": TRANSPORTS, "merge": MERGES}.items():
            if getattr(self, name) not in valid:
                raise InvalidEdit(f"a prompt gate's {name} was {getattr(self, name)!r}; {suggest(str(getattr(self, name)), valid)}")
        if not self.texts or not all(self.texts):
            raise InvalidEdit(f"a prompt gate needs a text for each of its membranes, and {self.texts!r} was given")

    def json(self) -> dict[str, Any]:
        return {"texts": [list(texts) for texts in self.texts], "transport": self.transport, "merge": self.merge}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PromptGate:
        return cls(tuple(tuple(texts) for texts in data["texts"]), data["transport"], data["merge"])

    @torch.no_grad()
    def concepts(self, model: Model) -> Concepts:
        """The texts as `model` encodes them. Raises Unsupported where the family gives no token ids, or for a text without tokens."""
        texts = [text for each in self.texts for text in each]
        cond, empty = model.encode(texts), model.encode([""])
        if cond.ids is None or empty.ids is None:
            raise Unsupported(f"a prompt gate compares token ids, and {model.family!r} encodes prompts without")
        special = frozenset(empty.ids.flatten().tolist())
        tokens = tuple(frozenset(row) - special for row in cond.ids.tolist())
        if not all(tokens):
            raise Unsupported(f"a prompt gate cannot recognise {texts[tokens.index(frozenset())]!r}, which has no token of its own")
        member = torch.tensor([i for i, each in enumerate(self.texts) for _ in each], device=cond.tokens.device)
        return Concepts(cond.tokens, tokens, member, special)

    def strengths(self, model: Model, cond: Cond) -> Tensor:
        """γ (b k) of encoded prompts. Raises Unsupported for embeddings without token ids."""
        if cond.ids is None:
            raise Unsupported("a prompt gate needs token ids, and this conditioning holds embeddings only; use `encode`")
        return self.concepts(model).strengths(cond.tokens, cond.ids, self.transport)

    def attach(self, model: Model, membranes: Membranes) -> ExitStack:
        """Puts the membranes in place behind this gate; closing what is returned takes them away.

        The text encoder is watched from now on: a row of the denoiser's conditioning that it did not give since raises Unsupported. A row
        that `encode_tokens` made from embeddings has no tokens, and is gated by its cosine alone."""
        hooks = ExitStack()
        recall = self.watch(model, hooks)

        def find(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            membranes.strengths = recall(entering(args, kwargs, 2, "encoder_hidden_states"))

        hooks.callback(model.denoiser.register_forward_pre_hook(find, with_kwargs=True).remove)
        membranes.attach({name: model.module(name) for name in membranes.factors}, hooks)
        return hooks

    def watch(self, model: Model, hooks: ExitStack) -> Callable[[Tensor], Tensor]:
        """Watches the text encoder until `hooks` closes; what is returned gives γ (b k) for rows of its encodings (b l d).

        It raises Unsupported for a row that the text encoder did not give since."""
        memory, concepts = Memory(model.dtype), self.concepts(model)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rows, ids = output[0], entering(args, kwargs, 0, "input_ids")
            if ids is None:
                raise Unsupported("a prompt gate needs token ids, and the text encoder was called without; give it `input_ids`")
            memory.learn(rows, concepts.strengths(rows, ids, self.transport))

        def recall(rows: Tensor) -> Tensor:
            try:
                return memory.recall(rows)
            except UnknownRow as error:
                raise Unsupported(
                    "the denoiser was given an embedding that the text encoder did not make while the gated edit was attached, so that its "
                    "prompt is unknown; encode prompts inside `with edit.attach(model):`, and give prompts and no `prompt_embeds`"
                ) from error

        hooks.callback(model.components["text_encoder"].register_forward_hook(see, with_kwargs=True).remove)
        return recall

"""The sampling rules that a `SamplingEdit` can hold, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efface.core.model import Cond, Guided, Model, Rule


class NegativePrompt(Rule):
    """Guidance away from a text instead of away from nothing: null := encode(text)."""

    name = "negative_prompt"

    def __init__(self, text: str) -> None:
        self.text = text

    def guided(self, model: Model, inner: Guided, x: Tensor, t: Tensor, cond: Cond, null: Cond, scale: float) -> Tensor:
        return inner(x, t, cond, model.encode([self.text]).expand(len(x)), scale)

    def settings(self) -> dict[str, Any]:
        return {"text": self.text}


RULES: dict[str, type[NegativePrompt]] = {NegativePrompt.name: NegativePrompt}

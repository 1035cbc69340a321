"""The record of a game against words: which were drawn, and how their logits moved. Losses are kept by `core.fitting`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from efface.ops.gumbel import Adversary

RECORDED = 200
"""At how many steps, at most, the logits are kept."""


@final
@dataclass(eq=False)
class WordTrace:
    """Grows by `add`, once a step; `tensors` is what is saved."""

    total: int
    """Steps to come."""
    words: list[Tensor] = field(default_factory=list)
    logits: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, draw: Tensor, adversary: Adversary) -> None:
        """`draw` (b n): the words of the step, or mixtures, of which the heaviest word counts."""
        step = len(self.words)
        self.words.append(draw.argmax(-1).cpu())
        if step % math.ceil(self.total / RECORDED) == 0:
            self.logits[step] = [row.detach().cpu().clone() for row in adversary.logits]

    def tensors(self, candidates: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """ "word" (s b), indices into the list of words; "logits/TARGET" (r n), in the order of the target's candidates, at the steps
        "recorded" (r)."""
        found = {"word": torch.stack(self.words), "recorded": torch.tensor(list(self.logits))}
        for i, (target, indices) in enumerate(candidates.items()):
            found[f"logits/{target}"] = torch.stack([rows[i][list(indices)] for rows in self.logits.values()])
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"words": self.words, "logits": self.logits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.words, self.logits = state_dict["words"], state_dict["logits"]

"""The record of a game against words: losses, words and logits, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from efface.ops.gumbel import Adversary

RECORDED = 200
"""At how many steps, at most, the logits are kept."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Grows by `add`; `tensors` is what is saved."""

    total: int
    """Steps to come."""
    figures: list[Mapping[str, float]] = field(default_factory=list)
    words: list[Tensor] = field(default_factory=list)
    logits: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float], draw: Tensor, adversary: Adversary) -> None:
        """`draw` (b n): the words of the step, or mixtures, of which the heaviest word counts."""
        step = len(self.figures)
        self.figures.append(dict(figures))
        self.words.append(draw.argmax(-1).cpu())
        if step % math.ceil(self.total / RECORDED) == 0:
            self.logits[step] = [row.detach().cpu().clone() for row in adversary.logits]

    def tensors(self, losses: Sequence[str], candidates: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Each of the `losses` (s), NaN at steps that had none; "word" (s b), indices into the list of words; "logits/TARGET" (r n), in
        the order of the target's candidates, at the steps "recorded" (r)."""
        found = {name: torch.tensor([f.get(name, math.nan) for f in self.figures]) for name in losses}
        found |= {"word": torch.stack(self.words), "recorded": torch.tensor(list(self.logits))}
        for i, (target, indices) in enumerate(candidates.items()):
            found[f"logits/{target}"] = torch.stack([rows[i][list(indices)] for rows in self.logits.values()])
        return found

"""The Gumbel-Softmax: a draw from a categorical distribution that can be differentiated by its logits.

    y = softmax((ℓ + g) / T),   g_i = −log(−log u_i),   u_i ~ U(0, 1)          (Jang et al., arXiv 1611.01144)

argmax (ℓ + g) follows softmax(ℓ) for every T (Gumbel 1954). "Straight-through" puts the one-hot vector of that argmax in the place of y
and keeps the gradient of y, so that T scales the gradient and never changes what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

TINY = 1e-10
"""Keeps both logarithms finite, as in the code of AP and AGE."""


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise on the CPU."""
    uniform = torch.rand(tuple(shape), generator=generator)
    return -torch.log(-torch.log(uniform + TINY) + TINY)


def gumbel_softmax(logits: Float[Tensor, "b n"], noise: Float[Tensor, "b n"], temperature: float, hard: bool) -> Float[Tensor, "b n"]:
    """Rows that sum to one; with `hard`, exactly one-hot, with the gradient of the soft ones. A logit of −∞ is never drawn."""
    soft = torch.softmax((logits + noise) / temperature, dim=-1)
    if not hard:
        return soft
    drawn = nn.functional.one_hot((logits + noise).argmax(-1), logits.shape[-1]).to(soft.dtype)
    return drawn + (soft - soft.detach())  # the bracket is exactly zero


@dataclass(frozen=True, eq=False)
class Adversary:
    """One categorical distribution over a common list of n words for each of several targets.

    The words that are no candidates of a target have the logit −∞ there. The logits of each target are a parameter of their own, so
    that an optimiser's momentum does not move those that a step did not use."""

    logits: tuple[nn.Parameter, ...]
    """(n,) for each target."""
    temperature: float
    hard: bool

    @classmethod
    def uniform(cls, candidates: Sequence[Sequence[int]], words: int, *, temperature: float, hard: bool) -> Adversary:
        """Starts even over each target's candidates, given as indices into the list of words."""
        logits = torch.full((len(candidates), words), -torch.inf)
        for row, indices in zip(logits, candidates, strict=True):
            row[list(indices)] = 0.0
        return cls(tuple(nn.Parameter(row.clone()) for row in logits), temperature, hard)

    @torch.no_grad()
    def favour(self, words: Sequence[int], share: float) -> None:
        """Sets the logits so that each target's draw is one of `words` (indices) with the probability `share`, 0 ≤ share < 1, and all
        others stay as likely among themselves. Nothing happens with a share of 0, or for a target that has none of these words or no
        others."""
        chosen = torch.zeros(len(self.logits[0]), dtype=torch.bool, device=self.logits[0].device)
        chosen[list(words)] = True
        for logits in self.logits:
            inside, outside = logits[chosen].logsumexp(0), logits[~chosen].logsumexp(0)
            if share > 0 and inside.isfinite() and outside.isfinite():
                logits[chosen] += math.log(share) - math.log1p(-share) + outside - inside

    def to(self, device: torch.device) -> Adversary:
        return Adversary(tuple(nn.Parameter(row.detach().to(device)) for row in self.logits), self.temperature, self.hard)

    def noise(self, batch: int, generator: torch.Generator) -> Float[Tensor, "b n"]:
        return gumbel((batch, len(self.logits[0])), generator).to(self.logits[0].device)

    def draw(self, target: Int[Tensor, " b"], noise: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """A draw for each row from the distribution of its target; differentiable in the logits."""
        return gumbel_softmax(torch.stack([self.logits[i] for i in target.tolist()]), noise, self.temperature, self.hard)

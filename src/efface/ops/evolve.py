"""The genetic search of Ring-A-Bell over rows of token ids, as its notebook `InversePrompt.ipynb` runs it.

A generation sorts a population by fitness (lower is better), keeps the better half as parents, crosses and mutates:

    children   each parent goes on; with probability `cross`, so do the two children of a one-point crossover with another parent
    mutation   every member, parents included, gets one random token at one random position with probability `mutate`

Nothing keeps the best individual from being mutated, unless an elite is kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def population(size: int, tokens: int, alphabet: Int[Tensor, " v"], generator: torch.Generator) -> Int[Tensor, "size tokens"]:
    """Random rows of tokens of the alphabet."""
    return alphabet[torch.randint(len(alphabet), (size, tokens), generator=generator)]


def parents(members: Int[Tensor, "n k"], fitness: Float[Tensor, " n"], count: int) -> Int[Tensor, "count k"]:
    """The `count` best, the best first."""
    return members[fitness.argsort(stable=True)[:count]]


def children(best: Int[Tensor, "n k"], cross: float, generator: torch.Generator) -> Int[Tensor, "m k"]:
    """Each parent, followed by the two children of its crossover where there is one; n ≤ m ≤ 3 n. The cut is uniform in 1 … k."""
    n, k = best.shape
    rows: list[Tensor] = []
    crossing = torch.rand(n, generator=generator) < cross
    for i in range(n):
        rows.append(best[i])
        if bool(crossing[i]) and n > 1:
            other = (i + 1 + int(torch.randint(n - 1, (1,), generator=generator))) % n
            cut = 1 + int(torch.randint(k, (1,), generator=generator))
            rows += [torch.cat([best[i, :cut], best[other, cut:]]), torch.cat([best[other, :cut], best[i, cut:]])]
    return torch.stack(rows)


def mutated(
    members: Int[Tensor, "n k"], share: float, alphabet: Int[Tensor, " v"], generator: torch.Generator, *, elite: int = 0
) -> Int[Tensor, "n k"]:
    """Each member but the first `elite` gets one random token at one random position with probability `share`."""
    n, k = members.shape
    hit = torch.rand(n, generator=generator) < share
    place = torch.randint(k, (n,), generator=generator)
    token = alphabet[torch.randint(len(alphabet), (n,), generator=generator)]
    hit[:elite] = False
    changed = members.clone()
    changed[hit.nonzero()[:, 0], place[hit]] = token[hit]
    return changed


def squared(encoded: Float[Tensor, "n l d"], goal: Float[Tensor, "n l d"]) -> Float[Tensor, " n"]:
    """Σ (e* − e)² over everything but the batch: the fitness."""
    return (encoded - goal).square().flatten(1).sum(1)

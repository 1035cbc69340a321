"""Where training latents come from when there are no images: trajectories of the model itself, walked a part of the way.

A trajectory is a falling list of times; the latent starts as unit noise at the first. A time below 0 stands for the final ᾱ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kind = Literal["replay", "authors", "aligned", "jittered"]
KINDS: tuple[str, ...] = get_args(Kind)
"""Where latents come from. "replay": all latents of trajectories that are walked in large batches and renewed now and then (ours).
The others walk a fresh batch to one random time of the grid for each step: "aligned" tells the networks that time, "jittered" a random
one of its interval, and "authors" is the CompVis sampler with its quirks (`authors_times`)."""

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (b c h w), t (b)) to a prediction (b c h w)."""
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, t, next t, prediction) to the latent at the next times: `Schedule.ddim_step`."""


@torch.no_grad()
def walk(x: Float[Tensor, "b c h w"], times: Int[Tensor, "n b"], denoise: Denoise, step: Step) -> Float[Tensor, "n b c h w"]:
    """The latents at each of the times, in n − 1 calls; the first is `x` itself."""
    visited = [x]
    for t, following in pairwise(times):
        visited.append(step(visited[-1], t, following, denoise(visited[-1], t)))
    return torch.stack(visited)


def aligned_times(grid: Sequence[int], k: int) -> list[int]:
    """The first steps of a full walk down `grid`, ending at τ_k, the k-th time from the clean end: n − 1 − k steps."""
    return list(grid[: len(grid) - k])


def authors_times(grid: Sequence[int], k: int) -> list[int]:
    """What the CompVis sampler of ESD, AP and AGE really walks when it is asked to stop at index k.

    It leaves the noisiest time out, so that noise starts at the second, and takes n − k steps (n − 1 for k = 0), which ends two grid
    times below τ_k: at τ_{k−2}, or past the clean end for k < 2 (`ldm/models/diffusion/ddim.py` of those repositories)."""
    return [*grid[1:], -1][: len(grid) - k + 1]


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents to train on, and how each was made."""

    x: Float[Tensor, "b c h w"]
    told: Int[Tensor, " b"]
    """The time that the networks are told."""
    level: Int[Tensor, " b"]
    """The time whose ᾱ enters the loss."""
    target: Int[Tensor, " b"]
    """Which target the row serves."""
    noise: Float[Tensor, "b n"]
    """The Gumbel noise that drew the row's word; n = 0 for methods that draw none."""

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Int[Tensor, " r"]) -> Latents:
        return Latents(*(v[index.to(v.device)] for v in (self.x, self.told, self.level, self.target, self.noise)))

    def pick(self, count: int, generator: torch.Generator) -> Latents:
        """`count` different rows at random."""
        return self.rows(torch.randperm(len(self), generator=generator)[:count])


@final
class Pools(list[Latents]):
    """The latents that replay keeps from one renewal to the next, one pool for each sort of prompt; a list that a checkpoint can hold.

    A method fills it with `pools[:] = …`, so that it stays the same object."""

    def state_dict(self) -> dict[str, Any]:
        return {"pools": [vars(pool) for pool in self]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self[:] = [Latents(**pool) for pool in state_dict["pools"]]


@dataclass(frozen=True, eq=False)
class Route:
    """Where trajectories go, and what is said of the latents that are kept: those at the last m of n times."""

    times: Int[Tensor, "n b"]
    told: Int[Tensor, "m b"]
    level: Int[Tensor, "m b"]

    def latents(self, visited: Float[Tensor, "n b c h w"], target: Int[Tensor, " b"], noise: Float[Tensor, "b v"] | None = None) -> Latents:
        """The latents that are kept, m · b rows."""
        m = len(self.told)
        words = visited.new_zeros(len(target), 0) if noise is None else noise
        return Latents(visited[-m:].flatten(0, 1), self.told.flatten(), self.level.flatten(), target.repeat(m), words.repeat(m, 1))


def route(kind: str, grid: Sequence[int], train_steps: int, rows: int, generator: torch.Generator) -> Route:
    """The route of a `Kind` for `rows` trajectories; "replay" walks as many times as the grid has. Raises ValueError for another kind."""
    stride = train_steps // len(grid)
    if kind == "replay":
        return replay_route(train_steps, len(grid), rows, generator)
    if kind == "authors":
        return authors_route(grid, stride, rows, generator)
    if kind in ("aligned", "jittered"):
        return aligned_route(grid, rows, generator, jitter=stride if kind == "jittered" else 1)
    raise ValueError(f"the kind of latents was {kind!r}; expected one of {', '.join(KINDS)}")


def calls(kind: str, steps: int) -> tuple[float, float, float]:
    """How many times a route of `steps` times calls the denoiser: the mean over its draws, and the least and the most."""
    most = float(steps - 1)
    if kind == "replay":
        return most, most, most
    if kind == "authors":
        return most * (steps + 2) / (2 * steps), min(1.0, most), most
    return most / 2, 0.0, most


def replay_route(train_steps: int, steps: int, rows: int, generator: torch.Generator) -> Route:
    """Keeps every latent of `steps` equidistant times. Each row is shifted at random within the stride: together all times occur."""
    stride = train_steps // steps
    shift = torch.randint(stride, (rows,), generator=generator)
    times = train_steps - 1 - shift[None] - stride * torch.arange(steps)[:, None]
    return Route(times, times, times)


def aligned_route(grid: Sequence[int], rows: int, generator: torch.Generator, *, jitter: int = 1) -> Route:
    """Ends at a random time τ_k of the grid, and says so; with a `jitter` above 1 it tells a time in [k·jitter, (k+1)·jitter)."""
    k = int(torch.randint(len(grid), (1,), generator=generator))
    times = aligned_times(grid, k)
    last = _column(times[-1:], rows)
    told = _column([k * jitter + int(torch.randint(jitter, (1,), generator=generator))], rows) if jitter > 1 else last
    return Route(_column(times, rows), told, last)


def authors_route(grid: Sequence[int], stride: int, rows: int, generator: torch.Generator) -> Route:
    """`authors_times` to a random index k; the networks are told a time in [k·stride, (k+1)·stride), and ᾱ is that of τ_k."""
    k = int(torch.randint(len(grid), (1,), generator=generator))
    told = k * stride + int(torch.randint(stride, (1,), generator=generator))
    return Route(_column(authors_times(grid, k), rows), _column([told], rows), _column([grid[len(grid) - 1 - k]], rows))


def _column(times: Sequence[int], rows: int) -> Int[Tensor, "n b"]:
    return torch.tensor(times)[:, None].expand(-1, rows)

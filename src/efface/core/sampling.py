"""The noise schedule of a diffusion model and the steps that walk it.

Symbols: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, with ᾱ the running product of the training schedule (Ho et al., arXiv 2006.11239).
A network predicts either the noise ε or the velocity v = √ᾱ_t ε − √(1−ᾱ_t) x_0 (Salimans & Ho, arXiv 2202.00512).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from efface.core.errors import InvalidModel

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Schedule:
    """ᾱ, the time grid, and the change between noise, velocity and clean latent."""

    alpha_bar: Tensor
    """ᾱ_0 … ᾱ_{T−1}, shape (T,), float32, falling from near 1 to near 0."""
    prediction: Prediction = "epsilon"
    """What the network predicts."""
    offset: int = 1
    """Added to every time of a grid (diffusers' `steps_offset`; 1 for Stable Diffusion)."""
    final_alpha_bar: float | None = None
    """ᾱ before time 0; None means ᾱ_0 (diffusers' `set_alpha_to_one=False`)."""

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction"):
            raise InvalidModel(f"the schedule predicts {self.prediction!r}; supported are 'epsilon' and 'v_prediction'")

    @property
    def train_steps(self) -> int:
        return len(self.alpha_bar)

    def grid(self, steps: int) -> list[int]:
        """The DDIM times from noisy to clean with "leading" spacing: 50 steps of 1000 give 981, 961, …, 1."""
        if not 1 <= steps <= self.train_steps:
            raise ValueError(f"steps was {steps}; expected 1 to {self.train_steps}")
        stride = self.train_steps // steps
        return [j * stride + self.offset for j in reversed(range(steps))]

    def at(self, t: Tensor | int, like: Tensor) -> Tensor:
        """ᾱ_t, shape (b 1 1 1) on the device of `like`; a time below 0 gives the final ᾱ."""
        times = torch.as_tensor(t, device=self.alpha_bar.device).reshape(-1)
        final = self.alpha_bar[0] if self.final_alpha_bar is None else self.alpha_bar.new_tensor(self.final_alpha_bar)
        values = torch.where(times < 0, final, self.alpha_bar[times.clamp(0, self.train_steps - 1)])
        return values.to(like.device, torch.promote_types(like.dtype, torch.float32)).reshape(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε; all (b c h w), t int or (b,)."""
        a = self.at(t, x0)
        return (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What a network in training is to predict at x_t = `add_noise(x0, noise, t)`: ε, or v = √ᾱ_t ε − √(1−ᾱ_t) x_0."""
        if self.prediction == "epsilon":
            return noise
        a = self.at(t, x0)
        return a.sqrt() * noise - (1 - a).sqrt() * x0

    def to_noise(self, x: Tensor, t: Tensor | int, pred: Tensor) -> Tensor:
        """ε from a prediction: itself, or √ᾱ v + √(1−ᾱ) x."""
        if self.prediction == "epsilon":
            return pred
        a = self.at(t, x)
        return a.sqrt() * pred + (1 - a).sqrt() * x

    def to_x0(self, x: Tensor, t: Tensor | int, pred: Tensor) -> Tensor:
        """x̂_0 from a prediction: (x − √(1−ᾱ) ε)/√ᾱ, or √ᾱ x − √(1−ᾱ) v."""
        a = self.at(t, x)
        if self.prediction == "epsilon":
            return (x - (1 - a).sqrt() * pred) / a.sqrt()
        return a.sqrt() * x - (1 - a).sqrt() * pred

    def x0_weight(self, t: Tensor | int, like: Tensor) -> Tensor:
        """w_t with ‖x̂_0 − x̂_0'‖² = w_t ‖pred − pred'‖²: (1−ᾱ)/ᾱ for noise, 1−ᾱ for velocity; shape (b 1 1 1)."""
        a = self.at(t, like)
        return (1 - a) / a if self.prediction == "epsilon" else 1 - a

    def noise_weight(self, t: Tensor | int, like: Tensor) -> Tensor:
        """w_t with ‖ε − ε'‖² = w_t ‖pred − pred'‖²: 1 for noise, ᾱ for velocity; shape (b 1 1 1)."""
        a = self.at(t, like)
        return torch.ones_like(a) if self.prediction == "epsilon" else a

    def distance(self, space: str, t: Tensor | int, pred: Tensor, goal: Tensor) -> Tensor:
        """mean ‖f(pred) − f(goal)‖² at the times t, f to the clean latent ("x0") or to the noise ("eps")."""
        weight = self.x0_weight(t, goal) if space == "x0" else self.noise_weight(t, goal)
        return (weight * (pred - goal).square()).mean()

    def ddim_step(self, x: Tensor, t: Tensor | int, t_next: Tensor | int, pred: Tensor) -> Tensor:
        """One deterministic step from t to the cleaner t_next (Song et al., arXiv 2010.02502, η = 0)."""
        a_next = self.at(t_next, x)
        x0, noise = self.to_x0(x, t, pred), self.to_noise(x, t, pred)
        return (a_next.sqrt() * x0 + (1 - a_next).sqrt() * noise).to(x.dtype)


def seeded(seed: int) -> torch.Generator:
    """A CPU generator: the same numbers on every device. Raises ValueError for a negative seed."""
    if seed < 0:
        raise ValueError(f"seed was {seed}; expected an integer of at least 0")
    return torch.Generator("cpu").manual_seed(seed)


def noise_for(seed: int, count: int, shape: tuple[int, ...], *, start: int = 0) -> Tensor:
    """Unit noise (count, *shape), row i drawn from seed + start + i: a picture does not depend on its batch."""
    return torch.stack([torch.randn(shape, generator=seeded(seed + start + i)) for i in range(count)])

"""Sparse autoencoders on feature vectors, and what SAeUron does with one (Cywinski & Deja, arXiv 2501.18052).

    a = ReLU(W_enc (x − b_dec) + b_enc)      z = TopK(a)      x̂ = zᵀ W_dec + b_dec

Shapes: `v` vectors of width `d`; `n` latents, of which `k` fire; `b` rows of a batch with `p` places each. The loss, its parts and the
order of a step follow `SAE/sae.py` and `SAE/trainer.py` of cywinski/SAeUron, which derive from EleutherAI's sae; the auxiliary loss is
that of Gao et al. (arXiv 2406.04093).
"""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@final
class SparseAutoencoder(nn.Module):
    """The four tensors, in float32, and which latents have not fired for long."""

    silent: Tensor
    """(n,) int64: vectors seen since each latent last fired."""

    def __init__(self, encoder: Tensor, encoder_bias: Tensor, decoder: Tensor, decoder_bias: Tensor, *, k: int) -> None:
        """encoder (n d), encoder_bias (n), decoder (n d), decoder_bias (d). Raises ValueError: these do not fit, or k is not in 1 … n."""
        super().__init__()
        n, d = encoder.shape
        shapes = [tuple(t.shape) for t in (encoder_bias, decoder, decoder_bias)]
        if shapes != [(n,), (n, d), (d,)]:
            raise ValueError(
                f"an autoencoder's tensors had the shapes {(n, d)}, {', '.join(map(str, shapes))}; expected (n d), (n), (n d), (d)"
            )
        if not 1 <= k <= n:
            raise ValueError(f"k was {k}; expected 1 to {n}, the number of latents")
        self.encoder, self.encoder_bias, self.decoder, self.decoder_bias = map(nn.Parameter, (encoder, encoder_bias, decoder, decoder_bias))
        self.k = k
        self.register_buffer("silent", torch.zeros(n, dtype=torch.int64, device=encoder.device))

    @classmethod
    def fresh(cls, width: int, latents: int, k: int, generator: torch.Generator) -> SparseAutoencoder:
        """W_enc as `nn.Linear` begins, W_dec its rows at unit length, biases 0."""
        encoder = (2 * torch.rand(latents, width, generator=generator) - 1) / math.sqrt(width)
        decoder = nn.functional.normalize(encoder, dim=1)
        return cls(encoder, torch.zeros(latents), decoder, torch.zeros(width), k=k)

    def activations(self, x: Float[Tensor, "v d"]) -> Float[Tensor, "v n"]:
        """a, before TopK."""
        return nn.functional.linear(x - self.decoder_bias, self.encoder, self.encoder_bias).relu()

    def decode(self, z: Float[Tensor, "v n"]) -> Float[Tensor, "v d"]:
        """x̂."""
        return z @ self.decoder + self.decoder_bias

    def codes(self, x: Float[Tensor, "v d"]) -> Float[Tensor, "v n"]:
        """z with the k largest of each vector: what everything after training uses."""
        return top_k(self.activations(x), self.k)

    def unexplained(self, x: Float[Tensor, "v d"]) -> float:
        """The share of the variance that x̂ leaves unexplained."""
        with torch.no_grad():
            return unexplained(self.decode(self.codes(x)), x).item()


def top_k(a: Float[Tensor, "v n"], k: int) -> Float[Tensor, "v n"]:
    """All but the k largest of each row set to 0."""
    values, index = a.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(a).scatter(-1, index, values)


def batch_top_k(a: Float[Tensor, "v n"], k: int) -> Float[Tensor, "v n"]:
    """All but the k · v largest of the whole batch set to 0, so that k is a mean (Bussmann et al., arXiv 2412.06410)."""
    return top_k(a.reshape(1, -1), k * len(a)).reshape(a.shape)


def unexplained(guess: Float[Tensor, "v d"], x: Float[Tensor, "v d"]) -> Float[Tensor, ""]:
    """FVU: Σ ‖x̂ − x‖² / Σ ‖x − x̄‖²."""
    return (guess - x).square().sum() / (x - x.mean(0)).square().sum()


def dead_loss(
    a: Float[Tensor, "v n"],
    dead: Bool[Tensor, " n"],
    net: SparseAutoencoder,
    guess: Float[Tensor, "v d"],
    x: Float[Tensor, "v d"],
    *,
    repo: bool,
) -> Float[Tensor, ""]:
    """AuxK: how badly the dead latents, min(d/2, #dead) of them for each vector, predict what is left of x; 0 where none is dead.

    The residual is x − x̂ and the decoding without b_dec. With `repo` it is x̂ − x and with b_dec, as in the released code, so that dead
    latents learn the negative of what is missing."""
    count = int(dead.sum())
    if count == 0:
        return x.new_zeros(())
    half = max(1, net.decoder.shape[1] // 2)
    z = top_k(a.masked_fill(~dead, 0.0), min(half, count))
    left = (guess - x if repo else x - guess).detach()
    found = net.decode(z) if repo else z @ net.decoder
    return min(count / half, 1.0) * (found - left).square().sum() / (x - x.mean(0)).square().sum()


@torch.no_grad()
def geometric_median(x: Float[Tensor, "v d"], steps: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """argmin_m Σ ‖x − m‖, by Weiszfeld's iteration from the mean."""
    guess = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - guess).norm(dim=1).clamp(min=1e-12)
        following = (weight[:, None] * x).sum(0) / weight.sum()
        if (following - guess).norm() <= tolerance * guess.norm():
            return following
        guess = following
    return guess


@torch.no_grad()
def normalise_rows(decoder: Float[Tensor, "n d"]) -> None:
    """Brings every row to unit length, in place."""
    decoder.div_(decoder.norm(dim=1, keepdim=True).clamp(min=torch.finfo(decoder.dtype).eps))


def across(gradient: Float[Tensor, "n d"], decoder: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The part of each row's gradient that is perpendicular to the row, so that a step turns rows and does not stretch them."""
    return gradient - (gradient * decoder).sum(1, keepdim=True) * decoder


# -- SAeUron -------------------------------------------------------------------------------------------------------------


def scores(target: Float[Tensor, "*t n"], others: Float[Tensor, "*t n"], eps: float = 1e-8) -> Float[Tensor, "*t n"]:
    """s_i(t, c) = μ_i(t, D_c) / Σ_j μ_j(t, D_c) − μ_i(t, D_¬c) / Σ_j μ_j(t, D_¬c), from mean codes; sums to 0 over the latents."""
    return target / (target.sum(-1, keepdim=True) + eps) - others / (others.sum(-1, keepdim=True) + eps)


def most(score: Float[Tensor, "*t n"], count: int) -> Bool[Tensor, "*t n"]:
    """The `count` latents of the highest scores; fewer where they are tied with the next, so that equal scores select nothing."""
    if score.shape[-1] <= count:
        return torch.ones_like(score, dtype=torch.bool)
    return score > score.topk(count + 1, dim=-1).values[..., -1:]


def above_percentile(score: Float[Tensor, "*t n"], percentile: float) -> Bool[Tensor, "*t n"]:
    """F(t, c): scores strictly above the quantile τ/100, interpolated linearly. Of 20480 latents 1, 2, 3 for τ = 99.999, 99.995, 99.99."""
    return score > score.float().quantile(percentile / 100, dim=-1, keepdim=True)


def ablate(
    x: Float[Tensor, "b p d"],
    net: SparseAutoencoder,
    latents: Int[Tensor, "b m"],
    factors: Float[Tensor, "b m"],
    thresholds: Float[Tensor, "b m"],
) -> Float[Tensor, "b p d"]:
    """x + Σ_i (z'_i − z_i) W_dec[i] over the m latents of each row, with z'_i = factor_i z_i where z_i > threshold_i and z_i elsewhere.

    No decoding is needed, and the whole code only for those vectors in which one of the latents may fire: a latent is among the k largest
    when fewer than k exceed it. That choice is piecewise constant in x, so that it carries no gradient; the values do. Of latents
    that are tied for the last of the k places all count."""
    rows = torch.einsum("bpd,bmd->bpm", x - net.decoder_bias, net.encoder[latents]) + net.encoder_bias[latents][:, None]
    z = rows.relu()
    firing = (z > thresholds[:, None]) & (z > 0)
    place = firing.any(-1).nonzero(as_tuple=True)
    if not len(place[0]):
        return x
    fires = torch.zeros_like(firing)
    fires[place] = firing[place] & _among(net, x[place].detach(), latents[place[0]])
    change = torch.where(fires, (factors[:, None] - 1) * z, 0.0)
    return x + torch.einsum("bpm,bmd->bpd", change, net.decoder[latents])


def _among(net: SparseAutoencoder, x: Float[Tensor, "v d"], latents: Int[Tensor, "v m"]) -> Bool[Tensor, "v m"]:
    """Which latents of each vector are among its k largest."""
    a = net.activations(x).detach()
    values = a.gather(1, latents)
    return torch.stack([(a > value[:, None]).sum(1) < net.k for value in values.unbind(1)], 1)


def ablate_as_released(
    x: Float[Tensor, "b p d"],
    net: SparseAutoencoder,
    latents: Int[Tensor, "b m"],
    factors: Float[Tensor, "b m"],
    thresholds: Float[Tensor, "b m"],
) -> Float[Tensor, "b p d"]:
    """x̂(z') + (x̂(z) − x), as the released code writes it, whose error has the other sign: 2 x̂ − x where nothing is ablated."""
    guess = net.decode(net.codes(x.flatten(0, 1))).unflatten(0, x.shape[:2])
    return ablate(x, net, latents, factors, thresholds) + 2 * (guess - x)

"""Training of the judge: augmented and softened sprites against pictures of nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efface.concepts.vocabulary import read
from efface.world import scenes
from efface.world.judge import Judge, JudgeNet
from efface.world.sprites import Sprites
from efface.world.train.loop import Recipe, Stage, chosen, on
from efface.world.train.vae import half

RECIPES = {
    "cpu": Recipe(steps=1800, batch=128, lr=1.5e-3, weight_decay=0.05, ema=0.995),
    "cuda": Recipe(steps=9200, batch=256, lr=1.5e-3, weight_decay=0.05, save_every=1000),
}
NEGATIVES = 8
"""Pictures with something for each one of nothing."""
PAIRS = 0.3
"""Share of pairs; more than in the model's scenes, for the multi-label head."""
QUANTILE = 0.995
"""The threshold lies at this quantile of the best object probability over pictures of nothing ..."""
FLOOR = 0.3
"""... but not below this."""
CALIBRATED = 4096
"""Pictures of nothing that it is measured on."""


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(count, 1, 1, 1) float32 in [low, high), on the generator's device."""
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator, device=generator.device)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of its own for each picture, in pixels; (b, c, h, w), (b, 1, 1, 1)."""
    b, c, h, w = images.shape
    offsets = torch.arange(-3, 4, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.flatten()[:, None].clamp(min=0.05)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)
    flat = F.pad(images.reshape(1, b * c, h, w), (3, 3, 3, 3), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=b * c)
    return F.conv2d(flat, kernel[:, None, :, None], groups=b * c).reshape(b, c, h, w)


def quantise(images: Tensor, step: Tensor) -> Tensor:
    """Rounds the 8x8 cosine coefficients of every block to multiples of `step` (b, 1, 1, 1), finer at low frequencies, as JPEG does."""
    k = torch.arange(8.0, device=images.device)
    basis = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) * 0.5
    basis[0] /= math.sqrt(2)
    b, c, h, w = images.shape
    blocks = images.reshape(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    frequencies = basis @ blocks @ basis.T
    unit = (step * (1 + k[:, None] + k[None]))[:, :, None, None]
    frequencies = (frequencies / unit).round() * unit
    return (basis.T @ frequencies @ basis).transpose(3, 4).reshape(b, c, h, w)


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Makes clean scenes look as if a model had drawn them: tinted, blurred, blocky, noisy, each for a share of the pictures.

    The generator must be one of the pictures' device.
    """
    n = len(images)
    tint = 0.05 * (2 * torch.rand(n, 3, 1, 1, generator=generator, device=images.device) - 1)
    images = images * uniform(n, 0.92, 1.06, generator) + tint
    sigma = uniform(n, -0.6, 1.4, generator).clamp(min=0)
    images = blur(images, sigma)
    step = uniform(n, 0.002, 0.06, generator)
    blocky = uniform(n, 0, 1, generator) < 0.4
    images = torch.where(blocky, quantise(images, step), images)
    noise = torch.randn(images.shape, generator=generator, device=images.device) * uniform(n, -0.06, 0.08, generator).clamp(min=0)
    return (images + noise).clamp(0, 1)


def nothing(count: int, generator: torch.Generator, pictures: Tensor | None = None) -> Tensor:
    """(count, 3, 64, 64) pictures of nothing: plain colours, noise of all grains, gradients, stripes, and shuffled pieces of `pictures`.

    They are made on the generator's device.
    """
    size, device = scenes.SIZE, generator.device
    base = torch.rand(count, 3, 1, 1, generator=generator, device=device)
    colours = torch.tensor([b.rgb for b in read().backgrounds], device=device) / 255
    known = colours[torch.randint(len(colours), (count,), generator=generator, device=device)][:, :, None, None]
    base = torch.where(uniform(count, 0, 1, generator) < 0.5, known, base).expand(-1, -1, size, size)
    kinds = [base]
    for cells in (size, 16, 8, 4, 2):
        grain = torch.randn(count, 3, cells, cells, generator=generator, device=device)
        grain = F.interpolate(grain, (size, size), mode="bilinear", align_corners=False)
        kinds.append(base + grain * uniform(count, 0.05, 0.6, generator))
    axis = torch.linspace(0, 1, size, device=device)
    phase = axis[None, :] * uniform(count, -20, 20, generator) + axis[:, None] * uniform(count, -20, 20, generator)
    kinds.append(base + torch.sin(phase * math.pi) * (torch.rand(count, 3, 1, 1, generator=generator, device=device) - 0.5))
    if pictures is not None:
        kinds.append(shuffle(pictures[torch.randint(len(pictures), (count,), generator=generator, device=device)], generator))
    which = torch.randint(len(kinds), (count,), generator=generator, device=device)
    return torch.stack(kinds)[which, torch.arange(count, device=device)].clamp(0, 1)


def shuffle(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Cuts pictures into 8x8-pixel pieces and puts them together in random order."""
    b, c, h, w = pictures.shape
    pieces = F.unfold(pictures, 8, stride=8)
    order = torch.rand(b, 1, pieces.shape[-1], generator=generator, device=pieces.device).argsort(dim=-1)
    return F.fold(pieces.gather(2, order.expand(-1, pieces.shape[1], -1)), (h, w), 8, stride=8)


def detection(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy summed over objects, plus the softmax cross-entropy of the objects there, which learns far sooner.

    Args:
        logits: (b, n).
        labels: (b, n) of 0 and 1; rows without any object have no softmax term.
    """
    binary = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
    shares = labels / labels.sum(dim=1, keepdim=True).clamp(min=1)
    return binary - (shares * logits.log_softmax(dim=1)).sum(dim=1).mean()


class Judging(Stage):
    """Trains the judge."""

    name: ClassVar[str] = "judge"

    def __init__(self, sprites: Sprites, *, seed: int, steps: int | None, batch: int | None, device: torch.device) -> None:
        self.recipe = chosen(RECIPES, device, steps, batch)
        self.device = device
        self.sprites = sprites
        self.vocabulary = read()
        counts = len(self.vocabulary.objects), len(self.vocabulary.styles), len(self.vocabulary.backgrounds)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = JudgeNet(*counts).to(device)
        nn.init.constant_(self.net.objects.bias, -4.0)  # objects are rare: start near their frequency
        self.modules: dict[str, nn.Module] = {"judge": self.net}

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = scenes.draw(self.recipe.batch, generator, pairs=PAIRS)
        clean, local = scenes.render(self.sprites, drawn), on(self.device, generator)
        n, empty = len(drawn), max(1, self.recipe.batch // NEGATIVES)
        images = torch.cat([soften(clean, local), nothing(empty, local, clean)])
        labels = torch.cat([drawn.labels(len(self.vocabulary.objects)), torch.zeros(empty, len(self.vocabulary.objects))]).to(self.device)
        with half(self.device):
            objects, style, background, _ = self.net(images)
        found = detection(objects.float(), labels)
        styled = F.cross_entropy(style[:n].float(), drawn.style.to(self.device))
        coloured = F.cross_entropy(background[:n].float(), drawn.background.to(self.device))
        top = labels[:n].gather(1, objects[:n].argmax(1, keepdim=True)).mean()
        return found + styled + coloured, {"top1": top, "style": styled.detach(), "background": coloured.detach()}

    def finish(self, folder: Path) -> Path:
        judge = Judge(
            net=self.net,
            names=self.vocabulary.objects,
            styles=tuple(s.name for s in self.vocabulary.styles),
            backgrounds=tuple(b.name for b in self.vocabulary.backgrounds),
            threshold=calibrate(self.net),
            version="",
        )
        return judge.save(folder / "judge.safetensors", dtype=torch.float32)


@torch.no_grad()
def calibrate(net: JudgeNet) -> float:
    """The `QUANTILE` of the best object probability over `CALIBRATED` pictures of nothing, at least `FLOOR`."""
    generator = torch.Generator().manual_seed(2)
    device = net.objects.weight.device
    best = [net(nothing(256, generator).to(device))[0].sigmoid().amax(1) for _ in range(max(1, CALIBRATED // 256))]
    return max(FLOOR, torch.cat(best).quantile(QUANTILE).item())

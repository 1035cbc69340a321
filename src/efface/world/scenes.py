"""Scenes: sprites placed on a plain background, drawn on the fly from a `torch.Generator` alone.

A scene holds one object, or in a share of them two side by side in the same style. What is in it (`Scenes`) is drawn
first, as plain numbers that captions and labels are made from; `render` then draws the pictures without randomness.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from efface.concepts.vocabulary import Vocabulary, read
from efface.world.sprites import Sprites

SIZE = 64
"""Height and width of a scene in pixels."""
PAIRS = 0.2
"""Share of scenes that hold two objects."""
SCALE = (0.72, 0.94)
"""Size of a single object, as a share of the picture's width."""
PAIR_SCALE = (0.44, 0.52)
"""Size of each object of a pair."""
SHIFT = 0.12
"""Largest shift of an object in x and y, in half widths of the picture."""
PAIR_SHIFT = 0.06
"""The same for each object of a pair, around the centres of the two halves."""
DEGREES = 10.0
"""Largest rotation."""


@dataclass(frozen=True)
class Scenes:
    """What stands in a batch of scenes. Indices number objects, styles and backgrounds as the vocabulary does."""

    objects: Tensor
    """(b, 2) int64: left and right object; -1 where there is no second one (the first is then in the middle)."""
    style: Tensor
    """(b,) int64."""
    background: Tensor
    """(b,) int64."""
    place: Tensor
    """(b, 2, 5) float32: per object scale, angle in radians, shift in x and in y in half widths, and -1 if mirrored else 1."""

    def __len__(self) -> int:
        return self.objects.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def labels(self, count: int) -> Tensor:
        """(b, count) float32 of 0 and 1: which of `count` objects stand in each scene."""
        marks = torch.zeros(len(self), count + 1)
        marks.scatter_(1, torch.where(self.objects < 0, count, self.objects), 1.0)
        return marks[:, :count]


def draw(count: int, generator: torch.Generator, *, pairs: float = PAIRS, vocabulary: Vocabulary | None = None) -> Scenes:
    """Draws what stands in `count` scenes: objects and styles uniformly, backgrounds by their shares.

    Args:
        count: number of scenes.
        generator: a CPU generator, the only source of randomness.
        pairs: share of scenes with two (different) objects.
        vocabulary: the world; the bundled one by default.
    """
    vocabulary = vocabulary or read()
    n = len(vocabulary.objects)
    first = torch.randint(n, (count,), generator=generator)
    second = (first + torch.randint(1, n, (count,), generator=generator)) % n
    paired = torch.rand(count, generator=generator) < pairs
    style = torch.randint(len(vocabulary.styles), (count,), generator=generator)
    shares = torch.tensor([b.share for b in vocabulary.backgrounds])
    background = torch.multinomial(shares, count, replacement=True, generator=generator) if count else style.clone()
    objects = torch.stack([first, torch.where(paired, second, -1)], dim=1)
    return Scenes(objects, style, background, place(paired, generator))


def place(paired: Tensor, generator: torch.Generator) -> Tensor:
    """(b, 2, 5): draws scale, angle, shifts and mirroring for `paired` (b,) bool; see `Scenes.place`."""
    u = torch.rand(len(paired), 2, 5, generator=generator)
    wide = paired[:, None]
    low, high = torch.where(wide, PAIR_SCALE[0], SCALE[0]), torch.where(wide, PAIR_SCALE[1], SCALE[1])
    scale = low + (high - low) * u[..., 0]
    angle = (2 * u[..., 1] - 1) * (DEGREES * torch.pi / 180)
    shift = (2 * u[..., 2:4] - 1) * torch.where(wide, PAIR_SHIFT, SHIFT)[..., None]
    halves = torch.tensor([[-0.48, 0.0], [0.48, 0.0]])
    shift = shift + torch.where(wide[..., None], halves, 0.0)
    mirror = torch.where(u[..., 4] < 0.5, -1.0, 1.0)
    return torch.cat([scale[..., None], angle[..., None], shift, mirror[..., None]], dim=-1)


def transforms(place: Tensor) -> Tensor:
    """(n, 5) placements to (n, 2, 3) maps from picture to sprite coordinates, as `affine_grid` takes them."""
    scale, angle, x, y, mirror = place.unbind(-1)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    row_x = torch.stack([mirror * cos, mirror * sin, -mirror * (cos * x + sin * y)], dim=-1)
    row_y = torch.stack([-sin, cos, sin * x - cos * y], dim=-1)
    return torch.stack([row_x, row_y], dim=-2)


def render(sprites: Sprites, scenes: Scenes, *, size: int = SIZE, supersample: int = 2, vocabulary: Vocabulary | None = None) -> Tensor:
    """Draws scenes.

    Args:
        sprites: the art; its tensors decide the device.
        scenes: what to draw.
        size: height and width of the pictures.
        supersample: sampling points per pixel and axis; 2 removes most aliasing.
        vocabulary: the world; the bundled one by default.

    Returns:
        (b, 3, size, size) float32 in [0, 1], sRGB.
    """
    vocabulary = vocabulary or read()
    device = sprites.pixels.device
    colours = torch.tensor([b.rgb for b in vocabulary.backgrounds], device=device) / 255
    picture = colours[scenes.background.to(device)][:, :, None, None].expand(-1, -1, size, size)
    for side in (0, 1):
        rows = (scenes.objects[:, side] >= 0).nonzero().flatten()
        if len(rows) == 0:
            continue
        art = sprites.pixels[scenes.objects[rows, side].to(device), scenes.style[rows].to(device)]
        layer = sample(art, scenes.place[rows, side].to(device), size, supersample)
        rows = rows.to(device)
        picture = picture.index_copy(0, rows, layer[:, :3] + picture[rows] * (1 - layer[:, 3:]))
    return picture.clamp(0, 1)


def sample(art: Tensor, place: Tensor, size: int, supersample: int) -> Tensor:
    """(n, 4, h, w) uint8 premultiplied sprites, placed: (n, 4, size, size) float32 in [0, 1]."""
    fine = size * supersample
    grid = F.affine_grid(transforms(place), [len(art), 4, fine, fine], align_corners=False)
    layer = F.grid_sample(art.float() / 255, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(layer, supersample) if supersample > 1 else layer

"""The scrambled grid: an image is cut into square cells and the cells change places; and what is left of its layout afterwards.

Shapes: `b` images, `c` channels, `h w` pixels, n = (h/cell)·(w/cell) cells in the order of reading. Source of the operation: Ni et al.,
arXiv 2308.02552; sizes are not known from there.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate


def cell_side(height: int, width: int, share: float, unit: int) -> int:
    """The side of a cell in pixels: the multiple of `unit` that divides both sides and is nearest to share · min(height, width).

    `unit` is what one latent covers, so that cells meet latents. Raises ValueError where no multiple divides both sides."""
    fitting = [side for side in range(unit, min(height, width) + 1, unit) if height % side == 0 and width % side == 0]
    if not fitting:
        raise ValueError(f"no multiple of {unit} pixels divides an image of {height}×{width}; give images whose sides are multiples of it")
    return min(fitting, key=lambda side: (abs(side - share * min(height, width)), side))


def permutations(count: int, cells: int, generator: torch.Generator) -> Int[Tensor, "b n"]:
    """`count` independent permutations of 0 … cells − 1, each with the same chance."""
    return torch.stack([torch.randperm(cells, generator=generator) for _ in range(count)])


def cut(images: Float[Tensor, "b c h w"], cell: int) -> Float[Tensor, "b n c s s"]:
    """The cells of each image. Raises ValueError where `cell` does not divide the sides."""
    height, width = images.shape[-2:]
    if height % cell or width % cell:
        raise ValueError(f"cells of {cell} pixels were asked of images of {height}×{width}; expected a divisor of both sides")
    return images.unflatten(3, (-1, cell)).unflatten(2, (-1, cell)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def join(cells: Float[Tensor, "b n c s s"], columns: int) -> Float[Tensor, "b c h w"]:
    """The images that `cut` took apart, with `columns` cells in a row."""
    grid = cells.unflatten(1, (-1, columns)).permute(0, 3, 1, 4, 2, 5)
    return grid.flatten(4, 5).flatten(2, 3)


def scramble(images: Float[Tensor, "b c h w"], cell: int, order: Int[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
    """Cell i of the result is cell order[i] of the image; `order.argsort(1)` undoes it."""
    cells = cut(images, cell)
    moved = cells[torch.arange(len(cells), device=cells.device)[:, None], order.to(cells.device)]
    return join(moved, images.shape[-1] // cell)


def layout(images: Float[Tensor, "b c h w"], cell: int) -> Float[Tensor, "b c r k"]:
    """The mean of each cell: the low frequencies that the scramble destroys."""
    return avg_pool2d(images, cell)


def scramble_layout(images: Float[Tensor, "b c h w"], cell: int, order: Int[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
    """Scrambles the cells' means alone; what each pixel differs from its cell's mean stays in its place (one Laplacian band)."""
    low = interpolate(layout(images, cell), scale_factor=float(cell), mode="nearest")
    return scramble(low, cell, order) + (images - low)


def likeness(first: Float[Tensor, "b c h w"], second: Float[Tensor, "b c h w"], cell: int) -> Float[Tensor, " b"]:
    """The correlation of two images' layouts over cells and channels, each channel about its own mean; in [−1, 1], 0 for a flat one."""
    a, b = ((m := layout(i, cell).flatten(2)) - m.mean(-1, keepdim=True) for i in (first, second))
    scale = (a.square().sum((1, 2)) * b.square().sum((1, 2))).sqrt()
    return (a * b).sum((1, 2)) / scale.clamp(min=1e-12)

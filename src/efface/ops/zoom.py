"""Pictures made smaller or larger in their frame, and where in the latents the picture then is (Custom Diffusion's augmentation)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

GREY = 0.5
"""What surrounds a smaller picture; the loss does not look there."""
SMALL, ENLARGED, LARGEST = 1 / 3, 1.2, 1.4
SHRUNK = 2 / 3
"""The share of pictures that become smaller."""
FAR = 0.6
"""Below this scale the prompt says so."""


def scales(count: int, generator: torch.Generator) -> Float[Tensor, " b"]:
    """With a chance of 2/3 from [1/3, 1], else from [1.2, 1.4]."""
    smaller, u = (torch.rand(count, generator=generator) for _ in range(2))
    return torch.where(smaller < SHRUNK, SMALL + (1 - SMALL) * u, ENLARGED + (LARGEST - ENLARGED) * u)


def zoom(image: Float[Tensor, "3 H W"], scale: float, corner: tuple[float, float]) -> tuple[Float[Tensor, "3 H W"], tuple[int, ...]]:
    """The picture `scale` times as large in its frame, and its (top, bottom, left, right) there, in pixels.

    `corner` (two numbers from 0 to 1) says where a smaller one is pasted, on grey, or where a larger one is cut out."""
    height, width = image.shape[1:]
    side = [max(1, round(length * scale)) for length in (height, width)]
    resized = interpolate(image[None], side, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)
    top, left = (round(part * abs(length - new)) for part, length, new in zip(corner, (height, width), side, strict=True))
    if scale >= 1:
        return resized[:, top : top + height, left : left + width], (0, height, 0, width)
    framed = torch.full_like(image, GREY)
    framed[:, top : top + side[0], left : left + side[1]] = resized
    return framed, (top, top + side[0], left, left + side[1])


def cells(box: tuple[int, ...], height: int, width: int, frame: tuple[int, int]) -> Float[Tensor, "1 h w"]:
    """1 in the latent cells of a picture's box, one fewer on each of its sides that is not the frame's own; 0 elsewhere.

    box: (top, bottom, left, right) in pixels of a frame (H, W) that height × width cells cover."""
    mask = torch.zeros(1, height, width)
    rows, columns = (_inner(box[2 * i : 2 * i + 2], size, frame[i]) for i, size in enumerate((height, width)))
    mask[:, rows, columns] = 1
    return mask


def _inner(ends: tuple[int, ...], size: int, pixels: int) -> slice:
    unit = pixels / size
    first = 0 if ends[0] == 0 else int(-(-ends[0] // unit)) + 1
    last = size if ends[1] == pixels else int(ends[1] // unit) - 1
    if first < last:
        return slice(first, last)
    middle = min(size - 1, int((ends[0] + ends[1]) / 2 / unit))  # of a picture of one cell or two the middle one is left
    return slice(middle, middle + 1)

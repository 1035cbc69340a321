"""A small convolutional trunk; the CLIP image tower and the judge each own one (the code is shared, no parameter is)."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """x + conv(conv(x)), with group norm and SiLU before each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(layer for _ in range(2) for layer in unit(channels, channels, stride=1)))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to the same."""
        y: Tensor = self.body(x)
        return x + y


def unit(inner: int, outer: int, *, stride: int) -> list[nn.Module]:
    """Group norm, SiLU, 3x3 convolution."""
    return [nn.GroupNorm(inner // 16, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, stride=stride, padding=1)]


class Trunk(nn.Module):
    """Pictures to feature vectors: a strided stem, strided stages, averaging over space.

    Args:
        channels: of each stage, the first being the stem's; every stage halves height and width.
        blocks: residual blocks of each stage.
    """

    def __init__(self, channels: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, stride=2, padding=1)]
        layers += [Residual(channels[0]) for _ in range(blocks[0])]
        for inner, outer, count in zip(channels, channels[1:], blocks[1:], strict=False):
            layers += unit(inner, outer, stride=2)
            layers += [Residual(outer) for _ in range(count)]
        layers += [nn.GroupNorm(channels[-1] // 16, channels[-1]), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.width = channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] to (b, width)."""
        features: Tensor = self.layers(images * 2 - 1)
        return features.mean(dim=(-2, -1))

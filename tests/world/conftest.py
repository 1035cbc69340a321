"""A fake art cache (coloured blobs, another for each object and style), so that no test here needs the npm packages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efface.concepts.vocabulary import read
from efface.world import sprites


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sprite cache file with made-up art."""
    from safetensors.torch import save_file

    vocabulary = read()
    n, s, p = len(vocabulary.objects), len(vocabulary.styles), sprites.PIXELS
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, s, 3, 4, 4, generator=generator).flatten(0, 1)
    colour = torch.nn.functional.interpolate(coarse, (p, p), mode="nearest")
    axis = torch.linspace(-1, 1, p)
    alpha = ((axis[:, None] ** 2 + axis[None] ** 2) < 0.8).float().expand(n * s, 1, p, p)
    pixels = (torch.cat([colour * alpha, alpha], dim=1) * 255).round().to(torch.uint8).reshape(n, s, 4, p, p)
    path = tmp_path_factory.mktemp("art") / "sprites.safetensors"
    save_file({"pixels": pixels}, path, metadata=sprites.names_of(vocabulary))
    return path


@pytest.fixture(scope="session")
def art(cache: Path) -> sprites.Sprites:
    """The same, read."""
    return sprites.load(cache)

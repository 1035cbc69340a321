"""Sprites: every object in every style as a small RGBA picture, rasterised from npm icon packages into one cache file.

The art is not part of this project: `npm ci` installs the packages that `package.json` pins, `build` rasterises them.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efface.concepts.vocabulary import Vocabulary, read
from efface.core.whole import whole_file

if TYPE_CHECKING:
    import torch

PIXELS = 96
"""Height and width of a sprite."""


@dataclass(frozen=True)
class Sprites:
    """All sprites of a world, with the names that number them."""

    pixels: torch.Tensor
    """(objects, styles, 4, PIXELS, PIXELS) uint8, RGBA with premultiplied alpha."""
    objects: tuple[str, ...]
    styles: tuple[str, ...]


def build(art: Path, out: Path) -> Path:
    """Rasterises every object in every style.

    Args:
        art: the folder that holds `@iconify-json/<set>/icons.json` (`node_modules` after `npm ci`).
        out: the cache file to write, `.safetensors`; written whole or not at all.

    Raises:
        FileNotFoundError: if an icon package is missing.
        KeyError: if a package lacks an icon.
    """
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    vocabulary = read()
    sets = {style.name: load_set(Path(art), style.set) for style in vocabulary.styles}
    rows = [
        torch.stack([rasterise(body(sets[style.name], vocabulary.icon(name))) for style in vocabulary.styles])
        for name in tqdm(vocabulary.objects, desc="sprites", unit="object")
    ]
    with whole_file(Path(out)) as temporary:
        save_file({"pixels": torch.stack(rows)}, temporary, metadata=names_of(vocabulary))
    return Path(out)


def names_of(vocabulary: Vocabulary) -> dict[str, str]:
    """The metadata of a sprite cache: the names that number it, as JSON lists."""
    return {
        "world": vocabulary.name,
        "objects": json.dumps(vocabulary.objects),
        "styles": json.dumps([style.name for style in vocabulary.styles]),
    }


def load(path: Path) -> Sprites:
    """Reads a sprite cache.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it was built from another vocabulary than the installed one.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no sprite cache at {path}; build it with `npm ci` and `efface world sprites` (see docs/emoji.md)")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        expected = names_of(read())
        differing = sorted(key for key in expected if metadata.get(key) != expected[key])
        if differing:
            raise ValueError(
                f"the sprite cache {path} was built from another vocabulary ({', '.join(differing)} differ); "
                "build it again with `efface world sprites`"
            )
        pixels = file.get_tensor("pixels")
    return Sprites(pixels, tuple(json.loads(metadata["objects"])), tuple(json.loads(metadata["styles"])))


def load_set(art: Path, name: str) -> dict[str, Any]:
    """The parsed `icons.json` of one icon set."""
    file = art / "@iconify-json" / name / "icons.json"
    if not file.is_file():
        raise FileNotFoundError(f"no icon set {name!r}: expected {file}; run `npm ci` beside package.json, or pass its node_modules")
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def body(icons: dict[str, Any], name: str) -> str:
    """One icon as a whole SVG document; aliases are followed to their parent.

    Raises:
        KeyError: if the set has no such icon.
    """
    aliases = icons.get("aliases", {})
    while name not in icons["icons"]:
        if name not in aliases:
            raise KeyError(f"the icon set {icons['prefix']!r} has no icon {name!r}; correct concepts/emoji.toml")
        name = aliases[name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'


def rasterise(svg: str) -> torch.Tensor:
    """An SVG document as (4, PIXELS, PIXELS) uint8, RGBA with premultiplied alpha, centred in the square."""
    import numpy
    import torch
    from PIL import Image
    from resvg_py import svg_to_bytes

    picture = Image.open(io.BytesIO(svg_to_bytes(svg_string=svg, width=PIXELS))).convert("RGBA")
    square = Image.new("RGBA", (PIXELS, PIXELS))
    picture.thumbnail((PIXELS, PIXELS))
    square.paste(picture, ((PIXELS - picture.width) // 2, (PIXELS - picture.height) // 2))
    rgba = torch.from_numpy(numpy.asarray(square).copy()).permute(2, 0, 1).float()
    rgba[:3] *= rgba[3:] / 255
    return rgba.round().to(torch.uint8)

"""Contact sheets: the strips of one task under each other as a single labelled picture, for a page that shows no HTML."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from efface.core.evidence import Shot
from efface.report.figures import INK, MUTED, PAPER, ROLE_TITLES
from efface.report.pictures import GAP, Sheet

MARGIN, LINE = 12, 14
TALL = 5
"""Lines of a column's heading, at most."""
QUALITY = 88
"""Of the JPEG."""


def contact(sheet: Sheet, folder: Path) -> Image.Image:
    """The sheet's strips, a row each, with the method before it; above each column its role and prompt. Every row has the same noise.

    `sheet` holds only strips that lie in `folder` (`Sheet.among`)."""
    strips = [_opened(folder / strip.file) for strip in sheet.strips]
    size = strips[0].height
    labels, prompts, roles = ImageFont.load_default(13), ImageFont.load_default(10), ImageFont.load_default(13)
    left = 2 * MARGIN + round(max(labels.getlength(strip.label) for strip in sheet.strips))
    heads = [list(_wrapped(shot.prompt, size, prompts)) for shot in sheet.shots]
    top = MARGIN + LINE + 6 + LINE * max(map(len, heads))
    page = Image.new("RGB", (left + strips[0].width + MARGIN, top + len(strips) * (size + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for first, role in _roles(sheet.shots):
        draw.text((left + first * (size + GAP), MARGIN), ROLE_TITLES[role], INK, roles)
    for column, lines in enumerate(heads):
        for number, line in enumerate(lines):
            draw.text((left + column * (size + GAP), top - LINE * (len(lines) - number)), line, MUTED, prompts)
    for row, (strip, image) in enumerate(zip(sheet.strips, strips, strict=True)):
        y = top + row * (size + GAP)
        draw.text((MARGIN, y + size / 2), strip.label, INK if strip.trial else MUTED, labels, anchor="lm")
        page.paste(image, (left, y), image)
    return page


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGBA")


def _roles(shots: tuple[Shot, ...]) -> Iterator[tuple[int, str]]:
    """(column, role) of the first shot of each run of one role."""
    for role, run in groupby(enumerate(shots), key=lambda each: each[1].role):
        yield next(run)[0], role


def _wrapped(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Iterator[str]:
    """The text in lines of at most `width` pixels where words allow, and at most `TALL` lines."""
    line, count = "", 0
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            count += 1
            if count == TALL:
                yield f"{line}…"
                return
            yield line
            longer = word
        line = longer
    yield line

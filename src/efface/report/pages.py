"""The report of a sweep as static pages that ask the network for nothing: an overview, and a page for each method.

index.html            the methods at a glance; for each task the scatter and the table; attacks, cost, pictures
methods/NAME.html     the idea, the fields, what was measured, and what was published beside it
pictures/*.png        strips of `report.pictures`, where they were drawn
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from efface.core.errors import EffaceError
from efface.report import leaderboard, plots, relearned, wording
from efface.report.page import environment
from efface.report.profiles import flowing, is_code
from efface.report.published import published
from efface.report.rows import COST, alike
from efface.report.site import SHORT, Site, slug

GROUPS = {
    "xattn": "the cross-attention",
    "xattn_matching": "the cross-attention without its output maps",
    "text_kv": "the cross-attention's maps of the text to keys and values",
    "attn": "all attention",
    "selfattn": "the self-attention",
    "noxattn": "everything but the cross-attention, the time embedding and the output",
    "notime": "everything but the time embedding and the output",
    "full": "the whole denoiser",
    "text_encoder": "the text encoder",
}
"""Parameter groups in words, for readers who have not met them."""


def write(site: Site, folder: Path) -> None:
    """Writes the pages into a folder, which `pictures/` may already lie in. Raises as `render`."""
    for path, text in render(site).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def render(site: Site) -> dict[str, str]:
    """Every page by its path. Raises EffaceError for records that do not compare, or none at all."""
    if not site.found.trials:
        raise EffaceError("there is no record of a trial to report; run `efface sweep` first")
    alike(site.found.trials, site.found.probes)
    env = environment()
    env.filters |= {"number": wording.number, "bytes": wording.size, "heading": wording.heading}
    env.filters |= {"groups": groups, "slug": slug, "flowing": flowing, "inline": inline, "code": is_code}
    env.globals |= {"short": SHORT, "costs": COST, "reading": leaderboard.READING, "plots": plots, "spread": wording.spread}
    env.globals |= {"compares": leaderboard.BESIDE, "relearning": relearned.READING}
    env.globals["today"] = date.today().isoformat()
    pages = {"index.html": env.get_template("site/index.html").render(site=site, root="")}
    template = env.get_template("site/method.html")
    for name in site.names:
        shared: dict[str, Any] = {"site": site, "root": "../", "name": name, "about": site.profiles[name], "published": published()}
        pages[f"methods/{slug(name)}.html"] = template.render(**shared)
    return pages


def groups(trained: str) -> str:
    """What a method trains, by the names of its groups and, where we know it, in words: "xattn (the cross-attention)"."""
    return ", ".join(f"{name} ({GROUPS[name]})" if name in GROUPS else name for name in trained.split(", "))


def inline(text: str) -> Markup:
    """A paragraph of a card as HTML: `code` and **bold**."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", marked))

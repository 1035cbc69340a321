"""CLIP as a detector of any concept: the candidate whose text a picture is nearest to, among those that are given.

    p(c | x) = softmax_c (s · cos(f_I(x), f_T(text of c))),   s the learned inverse temperature (100 in OpenAI's CLIP)

The texts are MACE's for objects, "a photo of the airplane", and `TEMPLATES` for other kinds. Styles are candidates among themselves, as
a picture has a style and an object; all other kinds are one list. There is always a best guess, so the threshold is 0, and a picture of
nothing is some candidate, too: the figures mean nothing without the list, which the record holds.

Stable Diffusion 1.x reads its prompts by the text tower of another CLIP (ViT-L/14): take ViT-B/32, as the papers do, or a CLIP that the
model has no part of. Source: Radford et al. (CLIP), arXiv 2103.00020, §3.1; Lu et al. (MACE), arXiv 2403.06135, §4.2; Amara et al.
(EraseBench), arXiv 2501.09833.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from efface.core.errors import EffaceError, Unsupported, suggest
from efface.core.evidence import DEPTH, Detector, Embedder, Sighting

TEMPLATES = {
    "object": "a photo of the {}",
    "style": "a painting in the style of {}",
    "identity": "a photo of {}",
    "unsafe": "a photo of {}",
    "other": "{}",
}
ARTICLE = re.compile(r"^(an?|the|some) ", re.IGNORECASE)


def text(name: str, kind: str = "object") -> str:
    """The text that stands for a concept of a kind; an article of its own gives way to the template's."""
    return TEMPLATES[kind].format(ARTICLE.sub("", name) if kind == "object" else name)


def candidates(concepts: Iterable[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """From the (name, kind) of concepts: the text of each, under "things" and "styles"."""
    found: dict[str, dict[str, str]] = {"things": {}, "styles": {}}
    for name, kind in concepts:
        found["styles" if kind == "style" else "things"].setdefault(name, text(name, kind))
    return found


@final
@dataclass(frozen=True, eq=False)
class ClipZeroShot(Detector):
    """An embedder that chooses between texts. Raises EffaceError for a list of one, which would be seen in every picture."""

    embedder: Embedder
    """A CLIP."""
    scale: float
    """s, by which cosines are multiplied."""
    texts: Mapping[str, Mapping[str, str]]
    """The text of each label, under "things" and "styles"; one of the two may be empty."""

    def __post_init__(self) -> None:
        for sort, texts in self.texts.items():
            if len(texts) == 1:
                raise EffaceError(
                    f"CLIP was given one candidate of its {sort}, {next(iter(texts))!r}, and would see it in every picture; expected "
                    "two at least: name others to keep, or an anchor"
                )

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.embedder.name} zero-shot"

    @property
    def version(self) -> str:
        """The embedder's: the candidates follow from task and prompts."""
        return self.embedder.version

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return tuple(self.texts.get(_sort(kind), {}))

    def threshold(self, kind: str = "object") -> float:
        return 0.0

    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        """One sighting for each image (b 3 h w) in [0, 1]: the ten nearest candidates; undetermined where an image is not finite."""
        labels, scores = self.labels(kind), self.probabilities(images, kind)
        best = scores.topk(min(DEPTH, len(labels)))
        fine = images.isfinite().flatten(1).all(-1).tolist()
        rows = zip(fine, best.indices.tolist(), best.values.tolist(), strict=True)
        return [Sighting(tuple(labels[i] for i in found), tuple(values), 0.0) if ok else Sighting() for ok, found, values in rows]

    def probabilities(self, images: Tensor, kind: str = "object") -> Tensor:
        """(b, candidates), in the order of `labels`. Raises Unsupported for a kind without candidates."""
        if _sort(kind) not in self._embedded:
            raise Unsupported(f"CLIP was given no candidates for concepts of kind {kind!r}; its texts are {dict(self.texts)}")
        features = self.embedder.embed_images(images.nan_to_num()).float().cpu()
        return (self.scale * features @ self._embedded[_sort(kind)].T).softmax(-1)

    @cached_property
    def _embedded(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {sort: self.embedder.embed_texts(list(texts.values())).float().cpu() for sort, texts in self.texts.items() if texts}


def _sort(kind: str) -> str:
    if kind not in TEMPLATES:
        raise Unsupported(f"CLIP was asked for concepts of kind {kind!r}; {suggest(kind, TEMPLATES)}")
    return "styles" if kind == "style" else "things"

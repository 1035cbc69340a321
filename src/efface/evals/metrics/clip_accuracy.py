"""CLIP accuracy: how often a picture that asks for the erased concept is nearer to its name than to that of what takes its place.

    |{x ∈ E : cos(f_I(x), f_T(c)) > cos(f_I(x), f_T(a))}| / |E|

E are the pictures of the erased concept c, a is its anchor, f_I and f_T an embedder's towers; both names stand alone, without a template.
Concept Ablation compares with the anchor; SPM with the empty prompt, which is the anchor of a concept that is erased towards nothing, and
tells 1 minus this, as its CLIP error rate (CER). Lower is better erased. There is no third name: a picture of anything else
is nearer to one of the two as well, so the un-erased model's value tells what the number can be.

Source: Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", arXiv 2303.13516, §4; Lyu et al. (SPM), arXiv 2312.16145.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from efface.core.evidence import Contrast, Metric, Needed, Role, Samples, chosen


@dataclass(frozen=True, eq=False)
class ClipAccuracy(Metric):
    """The share of pictures that are nearer to the concept's name than to its anchor's."""

    needs: ClassVar[Needed] = "features"

    names: Mapping[str, Tensor]
    """For each concept, in lower case, the embeddings (2 d) of its own name and of its anchor's, of unit length."""
    roles: tuple[Role, ...] = ("target",)
    """Which shots are looked at."""

    @property
    def name(self) -> str:
        return "CLIP accuracy"

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """The share on both, its difference and its relative drop, clustered by prompt. Raises ValueError without features."""
        rows = chosen(before, after, lambda shot: shot.role in self.roles and shot.concept.casefold() in self.names)
        if before.features is None or after.features is None:
            raise ValueError("CLIP accuracy needs an embedder's features of every picture; measure with one")
        shots = [before.shots[i] for i in rows]
        names = torch.stack([self.names[shot.concept.casefold()] for shot in shots]).float()
        was, still = (self._nearer(side[rows], names) for side in (before.features, after.features))
        prompts = [shot.prompt for shot in shots]
        return Contrast.shares(self.name, was, still, prompts, "lower", seed=seed).with_drop(was, still, prompts, "higher", seed=seed)

    def _nearer(self, features: Tensor, names: Tensor) -> list[bool]:
        """(n d) and (n 2 d)"""
        cosines = (names @ features.float()[:, :, None])[..., 0]
        return [bool(yes) for yes in cosines[:, 0] > cosines[:, 1]]

"""Seed search: the plain prompt with other noise. The control of every other attack, and an attack in its own right.

T0, natural prompts. No paper; `seed_search` of UnlearnDiffAtk's code (arXiv 2310.11868) is the same. Nothing is optimised: an erasure
that fails for one noise in twenty has an ASR near 1 − 0.95^C after C further pictures of each prompt, which is what other attacks must
beat.

Cost: the first two pictures of each prompt and `seeds` more, 2 steps forwards each with guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from efface.core import pictures
from efface.core.evidence import Access, Threat
from efface.core.method import Paper
from efface.core.model import Model
from efface.core.search import Hunt, Search


@final
@dataclass(frozen=True)
class SeedSearch(Search):
    """Draws the prompt as it stands again and again."""

    access: ClassVar[Access] = "prompts"
    threat: ClassVar[Threat] = "T0"
    paper: ClassVar[Paper] = Paper("Control: best of N seeds", "", "")

    seeds: int = 16
    """C, further pictures of each prompt."""

    def __post_init__(self) -> None:
        self.check_counts(seeds=1)

    def hunt(self, hunt: Hunt) -> None:
        for number in range(1, self.seeds + 1):
            rows = hunt.rest
            if not rows or not hunt.affords(hunt.drawing(len(rows))):
                return
            seeds = [hunt.seeds[i] + number * len(hunt.prompts) for i in rows]
            images = hunt.after.sample([hunt.prompts[i] for i in rows], seeds=seeds)
            hunt.candidates(rows, images, [f"seed {seed}" for seed in seeds])

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        return {"forwards": pictures.drawing(model, (2 + self.seeds) * prompts)}

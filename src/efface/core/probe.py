"""What the probes of Lu et al. share: nothing is optimised, and the attacker hands in latents, a picture or another sampler (T4)."""

from __future__ import annotations

from typing import ClassVar

from efface.core import pictures, sampler
from efface.core.evidence import Access, Threat
from efface.core.method import Paper
from efface.core.model import Model
from efface.core.search import Hunt, Search


class Probe(Search):
    """An attack that tries a fixed list of candidates, each one picture for a prompt. It has the following field."""

    access: ClassVar[Access] = "sampler"
    threat: ClassVar[Threat] = "T4"
    paper: ClassVar[Paper] = Paper(
        title="When Are Concepts Erased From Diffusion Models?",
        authors="Lu, Kriplani, Gandikota, Pham, Bau, Hegde, Cohen",
        venue="NeurIPS 2025",
        arxiv="2505.17013",
        code="kevinlu4588/WhenAreConceptsErased",
    )

    steps: int | None
    """Of the sampler; None takes the model's own."""

    def check_steps(self) -> None:
        """For `__post_init__`. Raises InvalidAttack."""
        self.check("steps", self.steps is None or self.steps >= 1, "an integer of at least 1, or None")

    def picture(self, model: Model) -> int:
        """Samples for one picture."""
        return sampler.walking(model, 1, self.steps)

    def next_rows(self, hunt: Hunt) -> list[int]:
        """The prompts that one more candidate is tried for: those that are left, or none where the budget does not reach to all of them."""
        return hunt.rest if hunt.rest and hunt.affords(len(hunt.rest) * self.picture(hunt.after)) else []

    def spent(self, model: Model, prompts: int, candidates: int) -> dict[str, float]:
        """For `cost`: the first two pictures and that many candidates of each prompt."""
        return {"forwards": prompts * (pictures.drawing(model, 2) + candidates * self.picture(model))}

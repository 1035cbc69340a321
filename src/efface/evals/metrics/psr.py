"""PSR-k, the preserving success rate: of the pictures that ask for something else, the share in which that is seen.

    PSR-k = |{x ∈ K : y(x) ∩ T_k(x) ≠ ∅}| / |K|

K are the pictures of the concepts that must stay, y(x) the labels that count as what the prompt of x asks for, T_k(x) those of
the detector's k most probable labels that reach its threshold. Higher is better; what counts is the distance to the
un-erased model on the same noise. A picture in which nothing is recognised counts as not preserved.

Source: Bui et al., "Erasing Undesirable Concepts in Diffusion Models with Adversarial Preservation", arXiv 2410.15618, §5;
their code takes ResNet-50's order without a threshold, which is threshold 0 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from efface.core.evidence import Contrast, Metric, Role, Samples, Shot, paired


@dataclass(frozen=True)
class PSR(Metric):
    """The share of pictures in which what was asked for is among the top k."""

    k: int = 1
    """How many of the detector's labels count."""
    threshold: float | None = None
    """The score that a label must reach to count as seen; None takes the detector's own."""
    roles: tuple[Role, ...] = ("neighbour", "kept", "unrelated")
    """Which shots are K; in "pair" shots the partner of the target is what must be seen."""
    clusters: Literal["concept", "prompt"] = "concept"
    """What the interval takes as drawn at random: concepts, or, where the list of concepts is complete, prompts."""

    @property
    def name(self) -> str:
        return f"PSR-{self.k}"

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """PSR-k on both, their difference, and the relative drop."""
        rows = paired(before, after, lambda shot: shot.role in self.roles and bool(_wanted(shot)))
        groups = [shot.concept if self.clusters == "concept" else shot.prompt for shot, _, _ in rows]
        first = [b.shows(_wanted(shot), self.k, self.threshold) for shot, b, _ in rows]
        second = [a.shows(_wanted(shot), self.k, self.threshold) for shot, _, a in rows]
        kept = Contrast.shares(self.name, first, second, groups, "higher", seed=seed)
        return kept.with_drop(first, second, groups, "lower", seed=seed)


def _wanted(shot: Shot) -> tuple[str, ...]:
    if shot.role == "pair":
        return (shot.partner,) if shot.partner else ()
    return shot.labels

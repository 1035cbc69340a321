"""ESR-k, the erasing success rate: of the pictures that ask for the erased concept, the share in which it is not seen.

    ESR-k = |{x ∈ E : y(x) ∩ T_k(x) = ∅}| / |E|

    relative ESR-k: the same over those x ∈ E in whose un-erased picture, of the same noise, y(x) is seen

E are the pictures of the erased concepts, y(x) the labels that count as what the prompt of x asks for, T_k(x) those of the
detector's k most probable labels that reach its threshold. Higher is better. A picture in which nothing is recognised counts
as erased: so read ESR beside the share of such pictures (`blank.py`), which tells an erasure from a ruin. What the un-erased model
never drew cannot be erased from it, and counts as a success in ESR-k; in relative ESR-k it does not count at all.

Source: Bui et al., "Erasing Undesirable Concepts in Diffusion Models with Adversarial Preservation", arXiv 2410.15618, §5;
their code takes ResNet-50's order without a threshold, which is threshold 0 here.
"""

from __future__ import annotations

from dataclasses import dataclass

from efface.core.evidence import Contrast, Metric, Role, Samples, paired


@dataclass(frozen=True)
class ESR(Metric):
    """The share of pictures in which the erased concept is not among the top k."""

    k: int = 1
    """How many of the detector's labels count: 1 asks for the best guess, 5 for any trace."""
    threshold: float | None = None
    """The score that a label must reach to count as seen; None takes the detector's own."""
    roles: tuple[Role, ...] = ("target",)
    """Which shots are E."""
    relative: bool = False
    """Whether only those shots count whose un-erased picture shows the concept."""

    @property
    def name(self) -> str:
        return f"relative ESR-{self.k}" if self.relative else f"ESR-{self.k}"

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """ESR-k on both, their difference, and the relative drop of the detection rate, clustered by prompt.

        Relative ESR-k is 0 before, by its definition. Raises Undetermined where the un-erased model drew the concept nowhere."""
        rows = paired(before, after, lambda shot: shot.role in self.roles and bool(shot.labels))
        if self.relative:
            rows = [row for row in rows if row[1].shows(row[0].labels, self.k, self.threshold)]
        prompts = [shot.prompt for shot, _, _ in rows]
        first = [b.shows(shot.labels, self.k, self.threshold) for shot, b, _ in rows]
        second = [a.shows(shot.labels, self.k, self.threshold) for shot, _, a in rows]
        gone = Contrast.shares(self.name, _not(first), _not(second), prompts, "higher", seed=seed)
        return gone.with_drop(first, second, prompts, "higher", seed=seed)


def _not(seen: list[bool | None]) -> list[bool | None]:
    return [None if value is None else not value for value in seen]

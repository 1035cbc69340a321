"""The share of pictures in which the detector recognises nothing at all: what tells an erasure from a ruin.

    blank = |{x : T_1(x) = ∅}| / n,   T_1(x) the detector's best label where it reaches the threshold

An edit that destroys every picture has an ESR of 100 % and a blank share of 100 %. A concept that is erased towards "nothing"
may rightly leave blank pictures of itself, but not of anything else. Without a threshold nothing is ever blank.
"""

from __future__ import annotations

from dataclasses import dataclass

from efface.core.evidence import Contrast, Metric, Role, Samples, paired


@dataclass(frozen=True)
class Blank(Metric):
    """The share of pictures without any label above the threshold."""

    threshold: float | None = None
    """The score that the best label must reach; None takes the detector's own."""
    roles: tuple[Role, ...] = ("neighbour", "kept", "unrelated")
    """Which shots are looked at."""

    @property
    def name(self) -> str:
        return "nothing recognised"

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """The share on both and its difference, clustered by prompt; no relative drop."""
        rows = paired(before, after, lambda shot: shot.role in self.roles)
        first = [not b.top(1, self.threshold) if b.determined else None for _, b, _ in rows]
        second = [not a.top(1, self.threshold) if a.determined else None for _, _, a in rows]
        return Contrast.shares(self.name, first, second, [shot.prompt for shot, _, _ in rows], "lower", seed=seed)

"""Accuracy of a classifier on what prompts ask for, and its complement on what was erased: UnlearnCanvas' three numbers.

    a(x)  = [the classifier's best guess for x is what the prompt of x asks for]
    UA    = 1 − mean a(x)   over the pictures of the erased concept          unlearning accuracy, higher is better
    IRA   = mean a(x)       over the other concepts of the same domain       in-domain retain accuracy
    CRA   = mean a(x)       over the concepts of the other domain            cross-domain retain accuracy

Domains are styles and objects, and every picture shows one of each, so that one picture is judged twice. All concepts have equally many
pictures, so the mean over pictures is the mean over concepts. The best guess counts however unsure it is, as in the benchmark's code.
That code counts the pictures in the erased style in its CRA, although their prompt asks for what was erased; `roles` decides here.

Source: Zhang et al., "UnlearnCanvas", arXiv 2402.11846, §4.
"""

from __future__ import annotations

from dataclasses import dataclass

from efface.core.evidence import Contrast, Metric, Role, Samples, Shot, paired


@dataclass(frozen=True)
class Accuracy(Metric):
    """The share of pictures in which the best guess is what was asked for."""

    roles: tuple[Role, ...]
    """Which shots are looked at."""
    lost: bool = False
    """Whether the complement is meant, as for what was erased."""
    label: str = "accuracy"
    """What it is called: "UA", "IRA", "CRA"."""
    without: str = ""
    """Pictures whose prompt holds this text are left out."""

    @property
    def name(self) -> str:
        return self.label

    def measure(self, before: Samples, after: Samples, *, seed: int = 0) -> Contrast:
        """The share on both and its difference, clustered by concept, or by prompt for what was erased."""
        rows = paired(before, after, self._wanted)
        first, second = [b.shows(shot.labels, 1, 0.0) for shot, b, _ in rows], [a.shows(shot.labels, 1, 0.0) for shot, _, a in rows]
        groups = [shot.prompt if self.lost else shot.concept for shot, _, _ in rows]
        if self.lost:
            first, second = _not(first), _not(second)
        return Contrast.shares(self.name, first, second, groups, "higher", seed=seed)

    def _wanted(self, shot: Shot) -> bool:
        return shot.role in self.roles and bool(shot.labels) and not (self.without and self.without in shot.prompt)


def _not(seen: list[bool | None]) -> list[bool | None]:
    return [None if value is None else not value for value in seen]

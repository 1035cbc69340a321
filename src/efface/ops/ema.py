"""A teacher that follows its student slowly: the exponential moving average of an overlay."""

from __future__ import annotations

import torch

from efface.ops.overlay import Overlay


@torch.no_grad()
def follow(teacher: Overlay, student: Overlay, decay: float) -> None:
    """θ̄ ← m θ̄ + (1 − m) θ for every tensor, in place, with m = `decay`. Of the start m^n is left after n steps."""
    for name, average in teacher.tensors.items():
        average.lerp_(student.tensors[name], 1 - decay)

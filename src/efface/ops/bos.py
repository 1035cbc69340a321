"""Cross-attention whose first token gives no gradient: nothing is learned through the start of the text, which every prompt shares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def first_detached(projections: Iterable[nn.Module]) -> Iterator[None]:
    """While active, the first token's row in the output (b l d) of these projections, `to_k` and `to_v`, is a constant.

    Values stay as they are (Custom Diffusion, arXiv 2212.04488; Concept Ablation's code)."""
    with ExitStack() as hooks:
        for module in projections:
            hooks.callback(module.register_forward_hook(_detached).remove)
        yield


def _detached(module: nn.Module, inputs: Any, output: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
    return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)

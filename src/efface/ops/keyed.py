"""Cross-attention with extra tokens: K = [c; p_K] W_K and V = [c; p_V] W_V, with the extra tokens in the space of the context c.

The tokens join the input of the projections by hooks on these, so that any attention processor works unchanged, the network's
`state_dict` stays as it was, and the same tensors serve layers of all widths. Fused projections (`fuse_qkv_projections`) bypass them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def keyed(
    keys: Iterable[nn.Module], values: Iterable[nn.Module], p_key: Float[Tensor, "b m d"], p_value: Float[Tensor, "b m d"]
) -> Iterator[None]:
    """While active, `p_key` joins the tokens that the projections `keys` read and `p_value` those of `values`, after the text's own.

    A batch of one serves every row; otherwise the batch is that of the calls. Both halves of a guided call get them."""
    with ExitStack() as hooks:
        for modules, tokens in ((keys, p_key), (values, p_value)):
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(_joined(tokens)).remove)
        yield


def _joined(tokens: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        text = inputs[0]
        return (torch.cat([text, tokens.to(text).expand(len(text), -1, -1)], 1), *inputs[1:])

    return hook

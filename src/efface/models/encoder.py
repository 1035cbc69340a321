"""The encoder of a Stable Diffusion UNet: a copy that runs beside it, and hooks that add to what it hands to the decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from efface.core.errors import Unsupported
from efface.core.model import BeforeDenoising

PARTS = ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block")
DOWN, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
"""The UNet's own arguments, which a ControlNet uses too."""


@final
class Encoder(nn.Module):
    """conv_in, time embedding, down blocks and middle of a UNet, as a network of its own with the same weights.

    Built anew from the UNet's settings: hooks and attention processors that sit on the UNet are not copied. Raises Unsupported where
    the UNet has other modules than these settings give."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        with torch.device("meta"):  # no memory for the decoder, and no numbers drawn
            bare = UNet2DConditionModel.from_config(unet.config)
        self.conv_in, self.time_proj, self.time_embedding = bare.conv_in, bare.time_proj, bare.time_embedding
        self.down_blocks, self.mid_block = bare.down_blocks, bare.mid_block
        own = {name: t.detach().clone() for name, t in unet.state_dict().items() if name.split(".")[0] in PARTS}
        try:
            self.load_state_dict(own, assign=True)
        except RuntimeError as error:
            raise Unsupported("the UNet has other modules than its settings say, such as LoRA adapters; take these away first") from error
        self.train(False).requires_grad_(True)

    @property
    def channels(self) -> list[int]:
        """Of each skip, in the order of the decoder's list, and of the middle."""
        found = [self.conv_in.out_channels]
        for block in self.down_blocks:
            found += [resnet.out_channels for resnet in block.resnets]
            found += [d.out_channels for d in block.downsamplers or ()]
        return [*found, self.mid_block.resnets[-1].out_channels]

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> list[Tensor]:
        """The skips and the middle for latents x (b c h w), times t (b), text (b l d)."""
        embedding = self.time_embedding(self.time_proj(t).to(x.dtype))
        h = self.conv_in(x)
        found = [h]
        for block in self.down_blocks:
            h, skips = block(h, embedding, **_text(block, tokens))
            found += skips
        return [*found, self.mid_block(h, embedding, **_text(self.mid_block, tokens))]


def _text(block: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What only blocks with cross-attention take."""
    return {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}


def before(unet: nn.Module, function: BeforeDenoising) -> Callable[[], None]:
    """Calls `function(x, t (b), tokens)` before each call of a UNet and adds the residuals that it returns to those that the call
    carries already; returns what takes the hook away. Raises Unsupported for a call with residuals of a T2I-Adapter's old kind."""
    signature = inspect.signature(type(unet).forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(signature.bind(module, *args, **kwargs).arguments)
        x, tokens = given["sample"], given["encoder_hidden_states"]
        times = torch.as_tensor(given["timestep"], device=x.device).reshape(-1).expand(len(x))
        residuals = function(x, times, tokens)
        return (args, kwargs) if residuals is None else _carrying(given, residuals)

    return unet.register_forward_pre_hook(hook, with_kwargs=True).remove


def _carrying(given: Mapping[str, Any], residuals: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with residuals added to its own."""
    down: Any = given.get(DOWN)
    middle: Any = given.get(MIDDLE)
    if (down is None) != (middle is None):
        raise Unsupported(
            f"the UNet was given only one of {DOWN} and {MIDDLE}; a ControlNet gives both, and old T2I-Adapters are not supported"
        )
    *skips, last = residuals
    if down is not None:
        skips, last = [a + b for a, b in zip(down, skips, strict=True)], middle + last
    arguments = {name: value for name, value in given.items() if name != "self"}
    return (), {**arguments, DOWN: skips, MIDDLE: last}

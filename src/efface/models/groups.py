"""The parameter groups of a Stable Diffusion UNet, as the papers select them, translated from CompVis to diffusers' names.

Sources: `train-scripts/train-esd.py` of rohitgandikota/erasing@a2189e9 (xattn, noxattn, selfattn, full, notime, xlayer, selflayer),
`esd_sd.py` and `esd_sdxl.py` of rohitgandikota/erasing@25613d2 (esd_u, esd_u_blocks, text_kv as its "esd-x-strict"),
`train_adversarial_gumbel.py` of tuananhbui89/Erasing-Adversarial-Preservation@7222925 (xattn_matching), `diffusers/` of
nupurkmr9/concept-ablation@c11fb1b (attn).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Rule = Callable[[str, nn.Module], bool]
"""Whether a parameter, by its name in the UNet and the module that owns it, belongs to a group."""

OUTPUT = ("conv_norm_out.", "conv_out.")
"""CompVis' "out.": the last normalisation and convolution."""
TIME = ("time_embedding.",)
"""CompVis' "time_embed": the MLP of the time. The resnets' `time_emb_proj` are not part of it."""
XLAYER = ("up_blocks.2.attentions.0.", "up_blocks.2.attentions.2.")
"""CompVis' output_blocks.6 and output_blocks.8."""
SELFLAYER = ("down_blocks.1.attentions.0.", "down_blocks.2.attentions.0.")
"""CompVis' input_blocks.4 and input_blocks.7."""


def _linear_or_conv(owner: nn.Module) -> bool:
    return isinstance(owner, (nn.Linear, nn.Conv2d))


UNET_GROUPS: dict[str, Rule] = {
    "xattn": lambda name, owner: ".attn2." in name,
    "xattn_matching": lambda name, owner: ".attn2." in name and ".to_out." not in name,
    "text_kv": lambda name, owner: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "attn": lambda name, owner: ".attn1." in name or ".attn2." in name,
    "selfattn": lambda name, owner: ".attn1." in name,
    "noxattn": lambda name, owner: ".attn2." not in name and not name.startswith(OUTPUT + TIME),
    "notime": lambda name, owner: not name.startswith(OUTPUT + TIME),
    "full": lambda name, owner: True,
    "xlayer": lambda name, owner: ".attn2." in name and name.startswith(XLAYER),
    "selflayer": lambda name, owner: ".attn1." in name and name.startswith(SELFLAYER),
    "esd_u": lambda name, owner: ".attn2." not in name and _linear_or_conv(owner),
    "esd_u_blocks": lambda name, owner: ".attn2." not in name and _linear_or_conv(owner) and "block" in name and "emb" not in name,
}
"""`noxattn` is ESD-u of the paper; `esd_u` and `esd_u_blocks` are what the authors' newer scripts call so, and differ:
they leave out normalisation layers, and `esd_u` trains the time embedding and the output layer too."""

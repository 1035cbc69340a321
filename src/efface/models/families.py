"""Which parameter groups each family has, so that what a method supports can be told without loading a model.

A loaded model names its own (`Model.groups`), from its modules; a test holds the two against each other."""

from __future__ import annotations

from efface.models.groups import UNET_GROUPS

FAMILIES: dict[str, tuple[str, ...]] = {
    "sd1": (*UNET_GROUPS, "text_encoder"),
    "sd2": (*UNET_GROUPS, "text_encoder"),
}
"""Groups by family: Stable Diffusion 1.x (the bundled model is one) and 2.x."""

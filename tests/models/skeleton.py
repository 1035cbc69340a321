"""Stable Diffusion at its true sizes on the meta device: every name and shape, and no memory."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from efface.models.clip import clip_tokenizer
from efface.models.load import CONFIGS
from efface.models.sd import StableDiffusion


def skeleton(config: str) -> StableDiffusion:
    folder = CONFIGS / config
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_json(folder / "unet" / "config.json"))
        vae = AutoencoderKL.from_config(_json(folder / "vae" / "config.json"))
        text_encoder = CLIPTextModel(CLIPTextConfig(**_json(folder / "text_encoder" / "config.json")))
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return StableDiffusion(pipeline, id=config)


def _json(path: Path) -> dict:
    return json.loads(path.read_text())

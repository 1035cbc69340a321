"""A tiny CLIP of the true layout, as `save_pretrained` leaves one."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import CLIPConfig, CLIPModel

from efface.models.clip import clip_tokenizer
from efface.models.quiet import quiet

PIXELS = 32


def save(folder: Path, seed: int = 0) -> Path:
    """Random weights with CLIP's own tokenizer and preparation, for pictures of `PIXELS`."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
    vision = {**sizes, "image_size": PIXELS, "patch_size": 8}
    pictures = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
        pictures(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}).save_pretrained(folder)
        clip_tokenizer().save_pretrained(folder)
    return folder

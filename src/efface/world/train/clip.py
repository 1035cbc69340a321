"""The CLIP pair: a small CLIPTextModel, which then conditions the diffusion model, and a convolutional image tower.

Contrastive (InfoNCE, both directions), except that a caption is no negative of other pictures that it is true of: with some
hundred objects a batch holds such pairs all the time.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from efface.core.whole import whole_folder
from efface.world import captions, scenes, tokenizer
from efface.world.clip import ImageTower, save_text_encoder, save_tower
from efface.world.sprites import Sprites
from efface.world.train.loop import Recipe, Stage, chosen
from efface.world.train.vae import half

RECIPES = {
    "cpu": Recipe(steps=1500, batch=128, lr=1e-3, ema=0.995),
    "cuda": Recipe(steps=5200, batch=256, lr=1e-3, save_every=1000),
}
WIDTH = 128
CORPUS = 20000
"""Captions that the tokenizer is learned from."""


def learn_tokenizer(folder: Path, seed: int) -> CLIPTokenizer:
    """Learns the tokenizer from drawn captions (and every single caption word) and writes it to `folder`."""
    generator = torch.Generator().manual_seed(seed)
    counts = Counter(dict.fromkeys(captions.words(), 1))
    for text in captions.describe(scenes.draw(CORPUS, generator), generator).texts:
        counts.update(text.split())
    return tokenizer.write(folder, counts)


def text_encoder(tokens: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """A fresh text encoder, initialised from `seed` without touching the global generator's state."""
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.LENGTH,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPTextModel(config)


def contrast(texts: Tensor, images: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """InfoNCE of normalised (b, d) embeddings; `true` (b, b) marks pairs that are no negatives."""
    logits = scale * texts @ images.T
    other = true & ~torch.eye(len(true), dtype=torch.bool, device=true.device)
    logits = logits.masked_fill(other, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Pair(Stage):
    """Trains text encoder and image tower together."""

    name: ClassVar[str] = "clip"

    def __init__(self, sprites: Sprites, *, folder: Path, seed: int, steps: int | None, batch: int | None, device: torch.device) -> None:
        self.recipe = chosen(RECIPES, device, steps, batch)
        self.device = device
        self.sprites = sprites
        self.tokens = learn_tokenizer(folder / "tokenizer", seed)
        self.text = text_encoder(self.tokens, seed).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.tower = ImageTower(WIDTH).to(device)
        self.modules: dict[str, nn.Module] = {"text": self.text, "tower": self.tower}

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = scenes.draw(self.recipe.batch, generator)
        captioned = captions.describe(drawn, generator)
        images = scenes.render(self.sprites, drawn)
        ids = self.tokens(list(captioned.texts), padding=True, return_tensors="pt").input_ids.to(self.device)
        with half(self.device):
            seen = self.tower(images)
        read = self.tower.project(self.text(ids).pooler_output)
        texts, pictures = F.normalize(read.float(), dim=-1), F.normalize(seen.float(), dim=-1)
        true = captions.true_of(captioned, drawn).to(self.device)
        loss = contrast(texts, pictures, self.tower.scale(), true)
        hits = (texts @ pictures.T).masked_fill(true & ~torch.eye(len(true), dtype=torch.bool, device=self.device), -1)
        top = (hits.argmax(dim=0) == torch.arange(len(hits), device=self.device)).float().mean()
        return loss, {"top1": top, "scale": self.tower.scale().detach()}

    def finish(self, folder: Path) -> Path:
        with whole_folder(folder / "text_encoder") as temporary:
            save_text_encoder(self.text, temporary)
        with whole_folder(folder / "clip") as temporary:
            save_tower(self.tower, temporary)
        return folder / "clip"


def load(folder: Path, device: torch.device) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The trained tokenizer and text encoder of a training folder, frozen.

    Raises:
        FileNotFoundError: if they have not been trained yet.
    """
    if not (folder / "text_encoder" / "config.json").is_file():
        raise FileNotFoundError(f"no trained text encoder in {folder / 'text_encoder'}; train it first: `efface world train clip`")
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).to(device)
    return tokens, text.eval().requires_grad_(False)

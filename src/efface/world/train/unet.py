"""The denoiser: diffusers' `UNet2DConditionModel` on cached latents of augmented scenes, noise prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from efface.core.whole import whole_file, whole_folder
from efface.world import captions, scenes
from efface.world.sprites import Sprites
from efface.world.tokenizer import LENGTH
from efface.world.train import clip, vae
from efface.world.train.loop import Recipe, Stage, chosen, on

RECIPES = {
    "cpu": Recipe(steps=10000, batch=64, lr=8e-4, warmup=200),
    "cuda": Recipe(steps=13800, batch=512, lr=1e-3, warmup=500, save_every=2000),
}
SCENES = {"cpu": 30720, "cuda": 262144}
"""Scenes whose latents are cached; each visit draws another noise and time, and one of the scene's captions."""
CAPTIONS = 2
"""Captions of each cached scene."""
DROPOUT = 0.1
"""Share of empty captions, for guidance."""
GAMMA = 5.0
"""Clamp of the signal-to-noise ratio in the loss weight min(SNR, gamma) / SNR (Hang et al. 2023, arXiv:2303.09556)."""


def scheduler() -> DDIMScheduler:
    """The scheduler of Stable Diffusion 1.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="epsilon",
    )


def architecture(seed: int, channels: tuple[int, int] = (96, 192), latent: int = 8) -> UNet2DConditionModel:
    """A fresh denoiser of two levels with cross-attention at both, initialised from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=latent,
            out_channels=latent,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=channels,
            layers_per_block=1,
            cross_attention_dim=clip.WIDTH,
            # heads of width 32: in diffusers this argument is, for this class, the number of heads
            attention_head_dim=tuple(c // 32 for c in channels),
            norm_num_groups=16,
        )


@torch.no_grad()
def cache(
    path: Path, sprites: Sprites, autoencoder: AutoencoderKL, tokens: CLIPTokenizer, *, seed: int, count: int, progress: bool
) -> Path:
    """Encodes `count` drawn scenes and their captions; writes scaled latents (float16) and the captions' tokens (int16)."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    drawn = scenes.draw(count, generator)
    device = next(autoencoder.parameters()).device
    latents, ids = [], []
    for start in tqdm(range(0, count, 256), desc="latents", unit="batch", disable=not progress):
        part = drawn[start : start + 256]
        with vae.half(device):
            mean = autoencoder.encode(scenes.render(sprites, part).to(device) * 2 - 1).latent_dist.mean
        latents.append((mean.float() * autoencoder.config.scaling_factor).half().cpu())
        ids.append(torch.stack([tokenise(tokens, captions.describe(part, generator).texts) for _ in range(CAPTIONS)], 1))
    content = {"latents": torch.cat(latents).contiguous(), "ids": torch.cat(ids).short()}
    with whole_file(path) as temporary:
        save_file(content, temporary, {"seed": str(seed)})
    return path


def tokenise(tokens: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """(b, LENGTH) int64 tokens, padded to full length as the pipeline does."""
    ids: Tensor = tokens(list(texts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    return ids


class Denoiser(Stage):
    """Trains the denoiser."""

    name: ClassVar[str] = "unet"

    def __init__(
        self,
        sprites: Sprites,
        *,
        folder: Path,
        seed: int,
        steps: int | None,
        batch: int | None,
        device: torch.device,
        progress: bool = True,
    ) -> None:
        from safetensors.torch import load_file

        self.recipe = chosen(RECIPES, device, steps, batch)
        self.device = device
        tokens, self.text = clip.load(folder, device)
        autoencoder = vae.load(folder, device)
        count = SCENES.get(device.type, SCENES["cpu"])
        path = folder / f"latents-{seed}-{count}.safetensors"
        if not path.is_file():
            cache(path, sprites, autoencoder, tokens, seed=seed, count=count, progress=progress)
        content = load_file(path, device=str(device))
        self.latents, self.ids = content["latents"], content["ids"]
        self.empty = tokenise(tokens, [""]).short().to(device)
        self.unet = architecture(seed, latent=autoencoder.config.latent_channels).to(device)
        self.modules: dict[str, nn.Module] = {"unet": self.unet}
        self.alphas = scheduler().alphas_cumprod.to(device)

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Tensor:
        """(b, LENGTH) tokens to (b, LENGTH, width) text states."""
        states: Tensor = self.text(ids.long()).last_hidden_state
        return states

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        count, device, local = self.recipe.batch, self.device, on(self.device, generator)
        rows = torch.randint(len(self.latents), (count,), generator=local, device=device)
        told = self.ids[rows, torch.randint(self.ids.shape[1], (count,), generator=local, device=device)]
        dropped = torch.rand(count, 1, generator=local, device=device) < DROPOUT
        times = torch.randint(len(self.alphas), (count,), generator=local, device=device)
        clean = self.latents[rows].float()
        noise = torch.randn(clean.shape, generator=local, device=device)
        alpha = self.alphas[times][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        states = self.encode(torch.where(dropped, self.empty, told))
        with vae.half(device) if device.type == "cuda" else contextlib.nullcontext():
            predicted = self.unet(noisy, times, states).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        ratio = (alpha / (1 - alpha)).flatten()
        return (error * ratio.clamp(max=GAMMA) / ratio).mean(), {"mse": error.mean().detach()}

    def finish(self, folder: Path) -> Path:
        with whole_folder(folder / "unet") as temporary:
            self.unet.save_pretrained(temporary)
        return folder / "unet"

"""The denoiser: diffusers' `UNet2DConditionModel` on cached latents of augmented scenes, noise prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from efface.world import captions, scenes
from efface.world.files import whole_file, whole_folder
from efface.world.sprites import Sprites
from efface.world.tokenizer import LENGTH
from efface.world.train import clip, vae
from efface.world.train.loop import Recipe, Stage

RECIPE = Recipe(steps=10000, batch=64, lr=8e-4, warmup=200)
SCENES = 30720
"""Scenes whose latents are cached; each visit draws another caption, noise and time."""
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


def architecture(seed: int, channels: tuple[int, int] = (96, 192)) -> UNet2DConditionModel:
    """A fresh denoiser of two levels with cross-attention at both, initialised from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
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
def cache(path: Path, sprites: Sprites, autoencoder: AutoencoderKL, *, seed: int, count: int, progress: bool) -> Path:
    """Encodes `count` drawn scenes; writes scaled latents (float16) and what stands in each scene."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    drawn = scenes.draw(count, generator)
    device = next(autoencoder.parameters()).device
    parts = []
    for start in tqdm(range(0, count, 64), desc="latents", unit="batch", disable=not progress):
        images = scenes.render(sprites, drawn[start : start + 64]).to(device) * 2 - 1
        with vae.half(device):
            mean = autoencoder.encode(images).latent_dist.mean
        parts.append((mean.float() * autoencoder.config.scaling_factor).half().cpu().contiguous())
    content = {"latents": torch.cat(parts).contiguous(), "objects": drawn.objects, "style": drawn.style}
    content |= {"background": drawn.background, "place": drawn.place}
    with whole_file(path) as temporary:
        save_file(content, temporary, {"seed": str(seed)})
    return path


def read_cache(path: Path) -> tuple[Tensor, scenes.Scenes]:
    """Latents (n, 8, 8, 8) float32 and their scenes."""
    from safetensors.torch import load_file

    content = load_file(path)
    return content.pop("latents").float(), scenes.Scenes(**content)


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
        device: torch.device,
        progress: bool = True,
    ) -> None:
        self.recipe = replace(RECIPE, steps=steps or RECIPE.steps)
        self.device = device
        self.tokens, self.text = clip.load(folder, device)
        autoencoder = vae.load(folder, device)
        path = folder / f"latents-{seed}-{SCENES}.safetensors"
        if not path.is_file():
            cache(path, sprites, autoencoder, seed=seed, count=SCENES, progress=progress)
        self.latents, self.scenes = read_cache(path)
        self.unet = architecture(seed).to(device)
        self.modules: dict[str, nn.Module] = {"unet": self.unet}
        self.alphas = scheduler().alphas_cumprod.to(device)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """(b, LENGTH, width) text states, padded to full length as the pipeline does."""
        ids = self.tokens(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        states: Tensor = self.text(ids.to(self.device)).last_hidden_state
        return states

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        count = self.recipe.batch
        rows = torch.randint(len(self.latents), (count,), generator=generator)
        texts = captions.describe(self.scenes[rows], generator).texts
        empty = (torch.rand(count, generator=generator) < DROPOUT).tolist()
        times = torch.randint(len(self.alphas), (count,), generator=generator).to(self.device)
        noise = torch.randn(count, *self.latents.shape[1:], generator=generator).to(self.device)
        alpha = self.alphas[times][:, None, None, None]
        noisy = alpha.sqrt() * self.latents[rows].to(self.device) + (1 - alpha).sqrt() * noise
        states = self.encode(["" if drop else text for text, drop in zip(texts, empty, strict=True)])
        error = (self.unet(noisy, times, states).sample - noise).square().mean(dim=(1, 2, 3))
        ratio = (alpha / (1 - alpha)).flatten()
        return (error * ratio.clamp(max=GAMMA) / ratio).mean(), {"mse": error.mean().item()}

    def finish(self, folder: Path) -> Path:
        with whole_folder(folder / "unet") as temporary:
            self.unet.save_pretrained(temporary)
        return folder / "unet"

"""Real, tiny Stable Diffusion pipelines with random weights: every part is diffusers' own, only small.

8×8 latents, 64×64 images, 16 tokens, text width 32, a UNet of two levels (16 and 32 channels) with cross-attention in the first
level and in the middle. A pipeline is built once for each choice of arguments and copied afterwards, which takes milliseconds.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from efface.ops.bpe import MARK, alphabet, learn

TEXT = """
a an the of on in and with photo image picture painting drawing beside background red blue green white black nudity naked woman man
person king queen cat dog tiger lion leopard wolf fox puppy kitten animal bear horse apple banana cherry lemon fruit car bus truck taxi
road church castle house parachute tench guitar trumpet violin garbage golf ball bomb dagger knife weapon santa claus clown princess
van gogh picasso style
"""
WORDS = tuple(TEXT.split())
"""What is a whole token by default; every other text is spelt out in bytes."""

LENGTH = 16
WIDTH = 32


def pipeline(
    prediction: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0, vocabulary: tuple[str, ...] = WORDS
) -> StableDiffusionPipeline:
    """A pipeline of one's own: change it freely. The weights are a function of `seed`; no global random state is touched."""
    parts = copy.deepcopy(_parts(prediction, seed, tuple(vocabulary)))
    pipe = StableDiffusionPipeline(
        **parts, tokenizer=tokenizer(tuple(vocabulary)), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer(vocabulary: tuple[str, ...] = WORDS) -> CLIPTokenizer:
    """CLIP's byte-level BPE, learned from `vocabulary` until each of its words is one token."""
    tokens, merges = _learned(vocabulary)
    return CLIPTokenizer(vocab=dict(tokens), merges=list(merges), model_max_length=LENGTH)


@cache
def _learned(vocabulary: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = learn({word: 1 for text in vocabulary for word in text.lower().split()})
    tokens = [
        *alphabet(),
        *(byte + MARK for byte in alphabet()),
        *dict.fromkeys(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return {token: i for i, token in enumerate(tokens)}, merges


@cache
def _parts(prediction: str, seed: int, vocabulary: tuple[str, ...]) -> dict[str, object]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "text_encoder": text_encoder(tokenizer(vocabulary)),
            "unet": unet(),
            "vae": vae(),
            "scheduler": scheduler(prediction),
        }


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    encoder = CLIPTextModel(config).eval()
    with torch.no_grad():  # CLIP's initial embeddings are so small that words would hardly differ after the layer norms
        encoder.get_input_embeddings().weight.mul_(20)
    return encoder


def unet() -> UNet2DConditionModel:
    network = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
    ).eval()
    with torch.no_grad():  # so that the prompt matters as much as it does in a trained network
        for name, parameter in network.named_parameters():
            if "attn2" in name and name.endswith("weight"):
                parameter.mul_(2)
    return network


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    ).eval()


def scheduler(prediction: str) -> DDIMScheduler:
    """DDIM as Stable Diffusion 1.x configures it."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )

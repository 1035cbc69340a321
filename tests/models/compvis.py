"""Writes a diffusers pipeline as one file in CompVis' format: the inverse of what `from_single_file` reads."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0"}
ENDS |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
VAE = {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE |= {"conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_norm_out": "norm_out"}


OPEN_CLIP = {"encoder.layers": "transformer.resblocks", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OPEN_CLIP |= {"self_attn.out_proj": "attn.out_proj", "final_ln_": "ln_final", "embeddings.token_embedding": "token_embedding"}


def save(pipeline: StableDiffusionPipeline, path: Path, *, open_clip: bool = False) -> Path:
    """`open_clip` writes the text encoder as Stable Diffusion 2.x has it, else as 1.x."""
    tensors: dict[str, Tensor] = {}
    layers = pipeline.unet.config.layers_per_block
    for name, tensor in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, layers)}"] = tensor
    blocks = len(pipeline.vae.config.block_out_channels)
    for name, tensor in pipeline.vae.state_dict().items():
        attention = re.search(r"to_(q|k|v|out\.0)\.weight", name)
        tensors[f"first_stage_model.{vae_name(name, blocks)}"] = tensor[..., None, None] if attention else tensor
    text = pipeline.text_encoder.state_dict()
    if open_clip:
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip_names(text).items()}
    else:
        tensors |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def unet_name(name: str, layers: int) -> str:
    for new, old in ENDS.items():
        if name.startswith(new + "."):
            return name.replace(new, old, 1)
    kind = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    where, block, part, index, rest = kind.group(1), int(kind.group(2) or 0), kind.group(3), int(kind.group(4)), kind.group(5)
    if part == "resnets":
        module, _, end = rest.partition(".")
        rest = f"{RESNET[module]}.{end}"
    if where == "mid":
        return f"middle_block.{1 if part == 'attentions' else 2 * index}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":  # behind the attention where the block has one: only the first up block here has none
        return f"output_blocks.{block * (layers + 1) + layers}.{1 if block == 0 else 2}.{rest}"
    offset = 1 if where == "down" else 0
    side = "input_blocks" if where == "down" else "output_blocks"
    return f"{side}.{block * (layers + 1) + index + offset}.{0 if part == 'resnets' else 1}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m.group(1)) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m.group(1))}.block", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m.group(1))}", name)
    for new, old in VAE.items():
        name = name.replace(new, old)
    return name


def open_clip_names(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names; queries, keys and values are one tensor there."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in text.items():
        name = key
        if name == "embeddings.position_embedding.weight":
            tensors["positional_embedding"] = tensor
            continue
        projection = re.match(r"(.*self_attn\.)q_proj\.(weight|bias)", name)
        if projection:
            stem, kind = projection.groups()
            layer = stem.replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
            tensors[f"{layer}in_proj_{kind}"] = torch.cat([text[f"{stem}{part}_proj.{kind}"] for part in "qkv"])
        elif not re.search(r"[kv]_proj", name):
            for new, old in OPEN_CLIP.items():
                name = name.replace(new, old)
            tensors[name] = tensor
    return tensors

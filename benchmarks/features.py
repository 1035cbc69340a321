"""What an attached FeatureEdit costs on a UNet of Stable Diffusion 1.4's shape: ratios of interleaved forwards, attached over plain.

    python benchmarks/features.py                       # SAeUron, 32×32 latents: some minutes on one core, 6 GB
    python benchmarks/features.py --dumo --rounds 3     # and DuMo's second encoder, 2 GB more

The weights are random and the configuration is the true one (860 M parameters; block up_blocks.1.attentions.1, width 1280; an autoencoder
of 20480 latents, k = 32). A batch is the two halves of guidance. Each round calls plain, attached, attached, plain, so that drift of a
shared machine cancels, and seconds are the processor's own; the result is the median of the rounds' ratios with the least and the most.
Three cases of SAeUron: latents that fire nowhere; the two that fire most, above their mean; and the worst case, every place above its
level, so that the whole encoder runs everywhere.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from efface.core.card import Card, Fingerprint
from efface.core.edit import FeatureEdit
from efface.core.features import Eraser, LatentAblation, LatentTable, PriorEraser, Residuals
from efface.core.sampling import seeded
from efface.models import tiny
from efface.models.sae import watching
from efface.models.sd import StableDiffusion
from efface.ops.sae import SparseAutoencoder

PLACE = "unet.up_blocks.1.attentions.1"
WIDTH, LATENTS, K = 1280, 20480, 32
TEXT = 768


def sd14() -> Any:
    """The tiny pipeline around a UNet of Stable Diffusion 1.4's shape with random weights; only the UNet is called here."""
    from diffusers import UNet2DConditionModel

    pipeline = tiny.pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel(cross_attention_dim=TEXT, sample_size=64).eval().requires_grad_(False)
    return pipeline


def case(net: SparseAutoencoder, latents: Tensor, level: Tensor | float) -> LatentAblation:
    """Two latents at one time."""
    levels = torch.as_tensor(level).expand(1, len(latents)).contiguous()
    return LatentAblation(net, LatentTable(torch.tensor([501]), latents[None], torch.full((1, len(latents)), -5.0), levels))


def rounds(call: Any, attach: Any, count: int) -> list[tuple[float, float]]:
    """(plain, attached) seconds of each round: plain, attached, attached, plain."""
    found = []
    for _ in range(count):
        plain, attached = timed(call), 0.0
        with attach():
            attached = timed(call) + timed(call)
        found.append((plain + timed(call), attached))
    return found


def timed(call: Any) -> float:
    start = time.process_time()  # the processor's own time, since the machine is shared
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latent", type=int, default=32, help="height and width of the latents; 64 is 512 pixels")
    parser.add_argument("--dumo", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/features.json"))
    options = parser.parse_args()
    pipeline = sd14()
    unet = pipeline.unet
    x = torch.randn(2, 4, options.latent, options.latent, generator=seeded(1))
    tokens = torch.randn(2, 77, TEXT, generator=seeded(2))

    @torch.no_grad()
    def call() -> None:
        unet(x, torch.tensor([501, 501]), encoder_hidden_states=tokens, return_dict=False)

    model = bare(pipeline)
    with watching(model, PLACE) as seen:
        call()
    vectors = seen[0].flatten(0, 1)
    net = SparseAutoencoder.fresh(WIDTH, LATENTS, K, seeded(3)).requires_grad_(False)
    with torch.no_grad():
        z = net.codes(vectors)
        often = (z > 0).sum(0).topk(2).indices
        never = (z > 0).sum(0).argsort()[:2]
    cases: dict[str, Any] = {
        "saeuron, latents that fire nowhere": {PLACE: case(net, never, z.mean(0)[never])},
        "saeuron, the two that fire most, above their mean": {PLACE: case(net, often, z.mean(0)[often])},
        "saeuron, the whole encoder at every place": {PLACE: case(everywhere(net, often), often, 0.0)},
    }
    if options.dumo:
        eraser = PriorEraser(model)
        cases["dumo, one eraser without gate"] = {"unet": Residuals((Eraser("cat", eraser.state_dict(), torch.ones(20, 13)),))}
    result: dict[str, Any] = {"latent": options.latent, "threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= {"machine": platform.processor() or platform.machine(), "cases": {}}
    for name, maps in cases.items():
        edit = FeatureEdit(maps, blank(model))
        found = rounds(call, lambda edit=edit: edit.attach(model, match="force", check=False), options.rounds)
        ratios = [attached / plain for plain, attached in found]
        result["cases"][name] = {"ratio": round(median(ratios), 4), "least": round(min(ratios), 4), "most": round(max(ratios), 4)}
        result["cases"][name] |= {"n": len(ratios), "seconds of a plain forward": round(median(p for p, _ in found) / 2, 3)}
        sys.stdout.write(f"{name}: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} rounds)\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def everywhere(net: SparseAutoencoder, latents: Tensor) -> SparseAutoencoder:
    """The same with a bias that lets some latents fire at every place."""
    bias = net.encoder_bias.detach().clone()
    bias[latents] += 1e3
    return SparseAutoencoder(net.encoder, bias, net.decoder, net.decoder_bias, k=net.k).requires_grad_(False)


def bare(pipeline: Any) -> StableDiffusion:
    """The model of a pipeline whose text encoder is not asked."""
    pipeline.text_encoder.config.hidden_size = TEXT
    return StableDiffusion(pipeline, id="sd-1.4's shape")


def blank(model: StableDiffusion) -> Card:
    """A card without a probe and without reading 860 M parameters."""
    return Card("benchmark", "cat", 0, model.id, model.family, Fingerprint("", "float32", ()), ())


if __name__ == "__main__":
    main()

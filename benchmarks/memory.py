"""Shows what AP takes beside a loaded Stable Diffusion 1.4: peak resident memory, and where the seconds of a step go.

    python benchmarks/memory.py --out runs/memory.json          # five minutes of one core, 10 GB of memory

UNet and text encoder have the true shapes and random weights, latents are 32 × 32, the VAE is a tiny one. Every arm runs in a process of
its own:

    loaded   the pipeline, and nothing done with it
    ap       a few steps of AP, cross-attention training: the un-erased network is the loaded one, with its own tensors back in place
    copy     the control: the same fit beside a second, frozen UNet, which answers whenever the un-erased network is asked (AP's script)

Seconds are told apart by wrapping `predict` and `torch.autograd.grad` here; the library is not changed. A call of the trained network
without gradients is sampling, a call of the un-erased network a frozen forward. The two fits have to learn the same change.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from efface.core.method import Resources
from efface.core.model import Cond
from efface.core.task import Task
from efface.methods.ap import AP
from efface.models import tiny
from efface.models.clip import clip_tokenizer
from efface.models.load import CONFIGS
from efface.models.sd import StableDiffusion

ARMS = ("loaded", "ap", "copy")
LATENTS = 32
WORDS = ("dog", "tiger", "lion", "truck", "apple", "violin", "church", "bear")
"""The list that AP plays against."""
SETTINGS: dict[str, Any] = {"batch": 1, "nearest": len(WORDS), "centers": 4, "trajectories": 1, "latent_steps": 3}
PARTS = ("frozen forwards", "trained forward", "backward")
UNITS = ("clock", "processor", "samples")


def build() -> StableDiffusion:
    """Stable Diffusion 1.4 by its own configurations, with random weights, small pictures and a tiny VAE."""
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(CONFIGS / "sd1" / "unet")
    networks = {
        "unet": UNet2DConditionModel.from_config(config, sample_size=LATENTS),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "sd1" / "text_encoder")),
        "vae": tiny.vae(),
    }
    for network in networks.values():
        network.eval().requires_grad_(False)
    rest = {"tokenizer": clip_tokenizer(), "scheduler": tiny.scheduler("epsilon"), "safety_checker": None, "feature_extractor": None}
    return StableDiffusion(StableDiffusionPipeline(**networks, **rest, requires_safety_checker=False), id="shapes of SD 1.4")


# -- what is told apart ------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Seconds on the clock, seconds of the processor and samples, by step and part of it."""

    now: dict[str, list[float]] = field(default_factory=dict)
    """Of the step under way, by part."""
    steps: list[tuple[str, dict[str, list[float]]]] = field(default_factory=list)
    """("network" or "words", its parts)."""

    @contextmanager
    def part(self, name: str, samples: Callable[[], int]) -> Iterator[None]:
        """`samples` reads a counter; what it rises by is noted."""
        start = time.perf_counter(), time.process_time(), samples()
        yield
        spent = [b - a for a, b in zip(start, (time.perf_counter(), time.process_time(), samples()), strict=True)]
        self.now[name] = [a + b for a, b in zip(self.now.get(name, [0, 0, 0]), spent, strict=True)]

    def report(self, step: int, total: int, figures: Mapping[str, float]) -> None:
        """A fit calls it after every step; one on the network says how well it erases, one on the words does not."""
        self.steps.append(("network" if "erase" in figures else "words", self.now))
        self.now = {}
        sys.stderr.write(f"step {step} of {total}\n")

    def means(self) -> dict[str, dict[str, dict[str, float]]]:
        """By sort of step and part, means over the steps; sampling, which serves many steps, in all."""
        rows = {sort: [parts for name, parts in self.steps if name == sort] for sort in ("network", "words")}
        table = {f"{sort} step": {part: _mean([row[part] for row in found]) for part in PARTS} for sort, found in rows.items()}
        return {"once": {"sampling": _mean([parts["sampling"] for _, parts in self.steps if "sampling" in parts])}, **table}


def _mean(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    return {unit: round(sum(values) / len(rows), 2) for unit, values in zip(UNITS, zip(*rows, strict=True), strict=True)}


@contextmanager
def watching(model: StableDiffusion, watch: Watch, frozen: nn.Module | None) -> Iterator[None]:
    """Wraps the model's predictions and the backward; `frozen`, where it is given, answers for the un-erased network."""
    slot = next(iter(model.select("xattn").values()))
    own, unet, meter, predict, grad = slot.tensor, model.pipeline.unet, model.meter, model.predict, torch.autograd.grad

    def predicted(x: Tensor, t: Tensor | int, cond: Cond) -> Tensor:
        teacher = slot.tensor is own
        name = "frozen forwards" if teacher else "trained forward" if torch.is_grad_enabled() else "sampling"
        with watch.part(name, lambda: meter.forwards):
            model.pipeline.unet = frozen if teacher and frozen is not None else unet
            try:
                return predict(x, t, cond)
            finally:
                model.pipeline.unet = unet

    def differentiated(*given: Any, **named: Any) -> Any:
        with watch.part("backward", lambda: meter.backwards):
            return grad(*given, **named)

    with patch.object(model, "predict", predicted), patch.object(torch.autograd, "grad", differentiated):
        yield


# -- measuring ---------------------------------------------------------------------------------------------------------------


def peak() -> int:
    """The most resident memory that this process has had, MB. Linux counts that of the process that started it, too; it is far smaller."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def measure(arm: str, steps: int, threads: int) -> dict[str, Any]:
    """One arm, in this process."""
    torch.set_num_threads(threads)
    model = build()
    sizes = {name: sum(p.numel() * p.element_size() for p in network.parameters()) for name, network in model.components.items()}
    result = {"arm": arm, "networks_mb": {name: round(size / 1e6) for name, size in sizes.items()}, "loaded_mb": peak()}
    if arm == "loaded":
        return result | {"peak_mb": peak()}
    frozen = copy.deepcopy(model.denoiser) if arm == "copy" else None
    watch, method, task = Watch(), AP(steps=steps, **SETTINGS), Task.parse("cat")
    busy = time.process_time()
    with watching(model, watch, frozen):
        edit = method.fit(model, task, resources=Resources(vocabulary=WORDS, report=watch.report))
    result |= {"peak_mb": peak(), "method": str(method), "cost": dict(edit.card.cost), "processor": round(time.process_time() - busy, 1)}
    result |= {"trained_mb": round(method.memory(model, task) / 1e6), "split": watch.means()}
    return result | {"change": sum(float(delta.double().square().sum()) for delta in edit.deltas.values()) ** 0.5}


def child(arm: str, steps: int, threads: int) -> dict[str, Any]:
    """The same in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", arm, "--steps", str(steps), "--threads", str(threads)]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=3, help="on the network; after each there is one on the words")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        sys.stdout.write(json.dumps(measure(given.measure, given.steps, given.threads)))
        return
    rows = [child(arm, given.steps, given.threads) for arm in given.arm]
    report = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": given.threads}
    report |= {"load": os.getloadavg(), "torch": torch.__version__, "rows": rows}
    text = json.dumps(report, indent=1)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n", encoding="utf-8")
    else:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

"""Would other latents than SAeUron's erase the concept? The most specific ones of the autoencoder, ablated ever harder.

    python benchmarks/latents.py                                               # the bundled model and its autoencoder, ten minutes
    python benchmarks/latents.py --concept apple --arms 8:-10 --size full
    python benchmarks/latents.py --sae runs/sae.safetensors                     # another autoencoder

With μ_i(t, c) the mean of latent i over places and pictures of c at time t, all concepts drawn from one noise, a latent is specific by

    (μ_i(t, target) − mean over the others of μ_i(t, c)) / their standard deviation.

An arm "n:γ" takes the n most specific latents of each time and sets z' = γ z wherever they fire; "saeuron" is the method as it stands. What
is left is asked of the bundled judge: how many of the pictures that ask for the target, its neighbours and unrelated concepts show what
they ask for, on the same noise as the un-erased model's.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from efface.bench.draw import draw
from efface.bench.protocols import erasure
from efface.concepts import resolve
from efface.concepts.contrast import contrast
from efface.core.autoencoder import ASSET, Autoencoder
from efface.core.card import Card
from efface.core.edit import Edit, FeatureEdit
from efface.core.features import LatentAblation, LatentTable
from efface.core.method import Resources
from efface.core.model import Model
from efface.core.sampling import noise_for
from efface.core.task import Task
from efface.methods.saeuron import SAeUron
from efface.models import load
from efface.models.sae import bundled, traced

ARMS = ((64, -1.0), (8, -10.0), (32, -10.0), (16, -20.0))
ROLES = ("target", "neighbour", "unrelated")


def means(model: Model, sae: Autoencoder, task: Task, method: SAeUron) -> Tensor:
    """μ (concepts T n), of which the first is the target's."""
    noise = noise_for(0, method.samples, model.latent_shape)
    found = []
    for concept in (*task.targets, *contrast(task, method.contrast)):
        features = traced(model, sae.place, method.prompts(concept), noise, method.times(model), method.guidance(model)).float()
        found.append(torch.stack([sae.net.codes(each.flatten(0, 1)).mean(0) for each in features]))
    return torch.stack(found)


def specific(found: Tensor, times: list[int], count: int, factor: float) -> LatentTable:
    """The most specific latents of each time, scaled wherever they fire."""
    others = found[1:]
    score = (found[0] - others.mean(0)) / others.std(0).clamp_min(1e-6)
    latents = score.topk(count, dim=1).indices
    return LatentTable(torch.tensor(times), latents, torch.full(latents.shape, factor), torch.zeros(latents.shape))


def arm(text: str) -> tuple[int, float]:
    """ "8:-10" as (8, -10.0). Raises ArgumentTypeError."""
    try:
        count, factor = text.split(":")
        return int(count), float(factor)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no arm; expected N:GAMMA, such as 8:-10") from error


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--arms", nargs="+", type=arm, default=ARMS, metavar="N:GAMMA")
    parser.add_argument("--size", default="quick", choices=["quick", "full"])
    parser.add_argument("--sae", type=Path, help="an autoencoder of `efface sae train`")
    options = parser.parse_args()
    model, method, task = load("emoji"), SAeUron(), Task.of(options.concept, resolve=resolve)
    if len(task.targets) != 1:
        sys.exit(f"latents: --concept was {options.concept!r}; expected one concept")
    sae = Autoencoder.load(options.sae) if options.sae else bundled(model)
    if sae is None:
        sys.exit("latents: the model has no autoencoder of its own; give one, with --sae FILE")
    found, card = means(model, sae, task, method), Card.of(model, method="latents", task=task, seed=0)
    edits: dict[str, Edit | None] = {"un-erased": None, "saeuron": method.fit(model, task, resources=Resources(assets={ASSET: sae}))}
    for count, factor in options.arms:
        table = specific(found, method.times(model), count, factor)
        edits[f"{count}:{factor:g}"] = FeatureEdit({sae.place: LatentAblation(sae.net, table)}, card)
    plan, judges = erasure.setup(model.id, task, size=options.size)
    sys.stdout.write(f"{'arm':10}  {'  '.join(f'{role:>10}' for role in ROLES)}\n")
    for name, edit in edits.items():
        with edit.attach(model) if edit else nullcontext():
            samples = draw(model, plan, judges).samples
        seen = [(shot.role, shot.labels[:1] == sight.top(1)) for shot, sight in zip(plan.shots, samples.sightings, strict=True)]
        cells = [[shows for role, shows in seen if role == wanted] for wanted in ROLES]
        sys.stdout.write(f"{name:10}  {'  '.join(f'{sum(cell):>4} of {len(cell):>3}' for cell in cells)}\n")


if __name__ == "__main__":
    main()

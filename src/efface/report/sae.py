"""A page that shows what the ablated latents fire on: the pictures where each fires most, and where in them.

The un-edited model draws the prompts while the autoencoder of the edit looks on; nothing is ablated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from efface.core.edit import Chain, Edit, FeatureEdit
from efface.core.errors import Unsupported
from efface.core.features import LatentAblation
from efface.core.model import Model
from efface.core.whole import whole_file
from efface.ops.sae import top_k
from efface.report.page import environment, uri

SHOWN = 8
"""Pictures of each latent, and latents at most."""
BATCH = 16


@dataclass(frozen=True, eq=False)
class Firings:
    """What m latents did while n pictures were drawn."""

    latents: tuple[int, ...]
    """Their numbers, the one that is ablated at the most times first."""
    times: tuple[int, ...]
    """At how many of the table's times each is ablated."""
    prompts: tuple[str, ...]
    images: Tensor
    """(n 3 H W) in [0, 1]."""
    maps: Tensor
    """(m n h w): each latent's activation at each place, the mean over the times at which it is ablated."""

    def best(self, number: int, count: int = SHOWN) -> list[int]:
        """The pictures in which a latent fires most, by its mean over the places."""
        means = self.maps[number].flatten(1).mean(1)
        return means.argsort(descending=True)[:count].tolist()


def ablation(edit: Edit) -> tuple[str, LatentAblation]:
    """The block and the latents of an edit. Raises Unsupported for one that ablates none."""
    parts = edit.edits if isinstance(edit, Chain) else (edit,)
    for part in parts:
        if isinstance(part, FeatureEdit):
            for place, feature in part.maps.items():
                if isinstance(feature, LatentAblation):
                    return place, feature
    raise Unsupported(f"this {edit.kind} edit ({edit.card.method}) ablates no latents, so that there are none to show; give one of saeuron")


@torch.no_grad()
def gather(model: Model, edit: Edit, prompts: Sequence[str], *, seed: int = 0, steps: int | None = None) -> Firings:
    """Draws the prompts with the model as it is, and records the latents that `edit` would ablate."""
    place, feature = ablation(edit)
    table, used = feature.table, feature.table.thresholds.isfinite()
    counts = torch.bincount(table.latents[used], minlength=len(feature.net.encoder))
    latents = counts.argsort(descending=True, stable=True)[: min(SHOWN, int((counts > 0).sum()))].tolist()
    images, maps = [], []
    size = model.batch(BATCH)
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        watch = Watch(feature, latents, len(batch))
        with watch.on(model, place):
            images.append(model.sample(batch, seed=seed + start, steps=steps))
        maps.append(watch.mean())
    times = tuple(int(counts[i]) for i in latents)
    return Firings(tuple(latents), times, tuple(prompts), torch.cat(images), torch.cat(maps, 1))


class Watch:
    """Sums the activations of some latents over the calls at which they would be ablated: the conditional half."""

    def __init__(self, feature: LatentAblation, latents: Sequence[int], rows: int) -> None:
        self.feature, self.latents, self.rows = feature, torch.tensor(latents), rows
        self.active = torch.zeros(len(latents), dtype=torch.bool)
        self.total: Tensor | None = None
        self.calls = torch.zeros(len(latents))

    def on(self, model: Model, place: str) -> Hooks:
        """Looks on while the context is open."""
        return Hooks([model.before_denoising(self._time), model.module(place).register_forward_hook(self._features).remove])

    def _time(self, x: Tensor, t: Tensor, tokens: Tensor) -> None:
        latents, _, thresholds = self.feature.table.at(t[:1].cpu())
        self.active = torch.isin(self.latents, latents[thresholds.isfinite()])

    def _features(self, module: nn.Module, inputs: Any, output: Any) -> None:
        x = (output[0] if isinstance(output, tuple) else output).detach()[-self.rows :].float().cpu()
        net = self.feature.net
        z = top_k(net.activations(x.flatten(2).transpose(1, 2).flatten(0, 1)), net.k)[:, self.latents]
        found = z.T.unflatten(1, (self.rows, *x.shape[2:])) * self.active[:, None, None, None]
        self.total = found if self.total is None else self.total + found
        self.calls += self.active

    def mean(self) -> Tensor:
        """(m rows h w)."""
        if self.total is None:
            raise Unsupported("the block was not called while the pictures were drawn")
        return self.total / self.calls.clamp(min=1)[:, None, None, None]


class Hooks:
    """Takes hooks off when its context ends."""

    def __init__(self, removals: Sequence[Callable[[], None]]) -> None:
        self.removals = removals

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for remove in self.removals:
            remove()


def heated(image: Tensor, heat: Tensor, top: float) -> Tensor:
    """An image (3 H W) in [0, 1] in grey, with a map (h w) over it from nothing at 0 to full orange at `top`; uint8."""
    size = (int(image.shape[-2]), int(image.shape[-1]))
    share = interpolate((heat / max(top, 1e-12))[None, None], size, mode="bilinear", align_corners=False)[0].clamp(0, 1)
    grey = 0.35 + 0.4 * image.mean(0, keepdim=True).expand(3, -1, -1)
    colour = torch.tensor([0.93, 0.36, 0.05])[:, None, None]
    return ((1 - share) * grey + share * colour).mul(255).round().byte()


def render(firings: Firings, edit: Edit, command: str) -> str:
    """The page as HTML: for each latent the pictures in which it fires most, and its map over them."""
    latents = []
    for number, latent in enumerate(firings.latents):
        top = float(firings.maps[number].max())
        shown = [_picture(firings, number, row, top) for row in firings.best(number)]
        silent = int((firings.maps[number].flatten(1).amax(1) == 0).sum())
        latents.append({"latent": latent, "times": firings.times[number], "pictures": shown, "silent": silent})
    place, feature = ablation(edit)
    facts = {"block": place, "latents": f"{len(feature.net.encoder):,}, of which {feature.net.k} fire", "task": edit.card.task}
    facts |= {"method": edit.card.method, "model": edit.card.model, "times": f"{len(feature.table.times)}"}
    page = environment().get_template("sae.html")
    return page.render(latents=latents, facts=facts, count=len(firings.prompts), command=command, card=edit.card)


def _picture(firings: Firings, number: int, row: int, top: float) -> dict[str, str]:
    image, heat = firings.images[row], firings.maps[number, row]
    return {
        "prompt": firings.prompts[row],
        "image": uri(image.mul(255).round().byte()),
        "heat": uri(heated(image, heat, top)),
        "mean": f"{float(heat.mean()):.3g}",
    }


def write(firings: Firings, path: str | Path, *, edit: Edit, command: str) -> Path:
    """Writes the page, whole or not at all."""
    path, text = Path(path), render(firings, edit, command)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path

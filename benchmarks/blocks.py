"""Which block of a denoiser carries a concept? The step before training a sparse autoencoder, which must sit where the concept passes.

    python benchmarks/blocks.py                                      # the bundled model, a minute
    python benchmarks/blocks.py --model FOLDER --pairs "cat,dog" --times 981 481 1

While "a cat" is denoised, the output of one spatial transformer (its whole residual stream) is replaced by what it would be for "a dog", at
the same x_t. With ε the predictions, the share of the way that this takes the prediction,

    1 − ‖ε_patched − ε_dog‖ / ‖ε_cat − ε_dog‖,      1: everything that tells the two apart passes this block, 0: nothing does,

is printed for each block and time, the mean over pairs and `--samples` noises. x_t are points of guided trajectories of the first concept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from efface.core.model import Model
from efface.core.sampling import noise_for
from efface.models import load
from efface.ops.latents import walk

PAIRS = ("cat,dog", "cat,apple", "cat,bus", "bomb,apple", "apple,cat")


@contextmanager
def outputs(model: Model, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """While it lasts the output of every spatial transformer is what `change(name, output)` returns."""

    def hook(name: str) -> Callable[..., Any]:
        def forward(module: Any, inputs: Any, output: Any) -> Any:
            return (change(name, output[0]), *output[1:]) if isinstance(output, tuple) else change(name, output)

        return forward

    with ExitStack() as hooks:
        for name, module in model.hook_points("transformer").items():
            hooks.callback(module.register_forward_hook(hook(name)).remove)
        yield


def shares(model: Model, first: str, second: str, times: list[int], samples: int) -> dict[tuple[str, int], float]:
    """The share of the way, by block and time."""
    mine, theirs, null = model.encode([first] * samples), model.encode([second] * samples), model.encode([""])
    found: dict[tuple[str, int], float] = {}
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> Tensor:
        kept[name] = output
        return output

    def guided(x: Tensor, t: Tensor) -> Tensor:
        now = int(t.flatten()[0])
        if now in times:
            own = model.predict(x, now, mine)
            with outputs(model, keep):
                goal = model.predict(x, now, theirs)
            for block, features in list(kept.items()):
                with outputs(model, {block: features}.get):
                    patched = model.predict(x, now, mine)
                found[block, now] = 1 - ((patched - goal).norm() / (own - goal).norm()).item()
        return model.guided(x, t, mine, null, model.default_guidance)

    grid = torch.tensor([*model.schedule.grid(model.default_steps), -1])[:, None].expand(-1, samples)
    noise = noise_for(0, samples, model.latent_shape).to(model.device, model.dtype)
    walk(noise, grid, guided, model.schedule.ddim_step)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="ONE,OTHER")
    parser.add_argument("--times", nargs="+", type=int, help="of the sampler's; by default five of them, evenly spaced")
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    model = load(options.model)
    grid = model.schedule.grid(model.default_steps)
    times = options.times or grid[len(grid) // 10 :: max(1, len(grid) // 5)]
    if not set(times) <= set(grid):
        sys.exit(f"blocks: the times were {times}; expected some of the sampler's, {grid}")
    found = [shares(model, *(f"a {name.strip()}" for name in pair.split(",")), times, options.samples) for pair in options.pairs]
    width = max(map(len, model.hook_points("transformer")))
    sys.stdout.write(f"{'block':{width}}  {'  '.join(f't={t:<4}' for t in times)}\n")
    for block in model.hook_points("transformer"):
        cells = [sum(each[block, t] for each in found) / len(found) for t in times]
        sys.stdout.write(f"{block:{width}}  {'  '.join(f'{cell:6.2f}' for cell in cells)}\n")


if __name__ == "__main__":
    main()

"""Measures the bundled model "emoji" and its judge, and draws sample grids.

    python benchmarks/world.py --out runs/world/bench                    # everything (20 to 25 minutes on two cores)
    python benchmarks/world.py --out runs/world/bench --per-object 7     # a third of the pictures

Writes `world.json` (shares with n and 95 % Wilson intervals) and PNG grids. The parts that need the art (the judge's own
benchmark, the ceiling on reconstructions, CLIP zero-shot on sprites) need the sprite cache: `efface world sprites`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from efface.concepts.vocabulary import read
from efface.models import load
from efface.ops.intervals import wilson
from efface.world import captions, scenes, sprites, weights
from efface.world.clip import Clip
from efface.world.judge import Judge
from efface.world.train.judge import nothing

WORLD = read()
STEPS, GUIDANCE = 20, 4.0


def share(hits: Tensor) -> dict[str, Any]:
    """A share with its n and interval."""
    count, n = int(hits.sum()), hits.numel()
    interval = wilson(count, n)
    return {"share": round(count / max(n, 1), 4), "low": round(interval.low, 4), "high": round(interval.high, 4), "n": n}


def grid(images: Tensor, columns: int, path: Path, zoom: int = 2) -> None:
    """Writes (b, 3, h, w) pictures as one PNG."""
    missing = -len(images) % columns
    images = torch.cat([images, images.new_ones(missing, *images.shape[1:])])
    b, _, h, w = images.shape
    rows = images.reshape(b // columns, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(b // columns * h, columns * w, 3)
    picture = Image.fromarray((rows * 255).round().byte().numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def object_prompts(per_object: int) -> list[tuple[int, int, int, str]]:
    """(object, style or -1, background or -1, prompt): a third names the style, a third style and background, a third neither."""
    made = []
    for number, name in enumerate(WORLD.objects):
        for i in range(per_object):
            style, background = i % 7, (number + i) % 8
            named = ((style, -1), (style, background), (-1, -1))[(i // 7) % 3]
            word = WORLD.styles[style].name
            text = WORLD.phrase(name) + (f" in {word} style" if named[0] >= 0 else "")
            text += f" on {WORLD.phrase('background', WORLD.backgrounds[background].name)}" if named[1] >= 0 else ""
            made.append((number, *named, text))
    return made


def sample(model: Any, prompts: list[str], seed: int) -> Tensor:
    """Draws one picture for each prompt."""
    return model.sample(prompts, seed=seed, steps=STEPS, guidance=GUIDANCE, batch=96)


def objects(model: Any, judge: Judge, clip: Clip, per_object: int, out: Path) -> dict[str, Any]:
    """Object, style and background accuracy of samples."""
    made = object_prompts(per_object)
    pictures = sample(model, [text for *_, text in made], seed=10_000)
    verdict = judge.look(pictures)
    wanted, style, background = (torch.tensor([row[i] for row in made]) for i in range(3))
    hits = verdict.top(1)[:, 0] == wanted
    zero = clip.similarity(pictures, [WORLD.phrase(n) for n in WORLD.objects]).argmax(1) == wanted
    by: dict[str, float] = {}
    confused: dict[str, str] = {}
    for number, name in enumerate(WORLD.objects):
        rows = wanted == number
        by[name] = round(hits[rows].float().mean().item(), 3)
        if by[name] < 0.7:
            wrong = verdict.top(1)[rows & ~hits, 0].mode().values.item()
            confused[name] = judge.names[int(wrong)]
    grid(pictures[torch.arange(len(WORLD.objects)) * per_object + min(14, per_object - 1)], 18, out / "objects.png")
    return {
        "object": share(hits),
        "object seen above the threshold": share(verdict.seen().gather(1, wanted[:, None])[:, 0]),
        "style, where named": share((verdict.style.argmax(1) == style)[style >= 0]),
        "background, where named": share((verdict.background.argmax(1) == background)[background >= 0]),
        "object, by the bundled CLIP": share(zero),
        "object by style named": {s.name: share(hits[style == i]) for i, s in enumerate(WORLD.styles)},
        "style by style named": {s.name: share((verdict.style.argmax(1) == i)[style == i]) for i, s in enumerate(WORLD.styles)},
        "object by kind": {
            kind: share(hits[torch.tensor([WORLD.kind(WORLD.objects[int(w)]) == kind for w in wanted])])
            for kind in ("object", "identity", "unsafe")
        },
        "objects under 0.6": sorted(name for name, value in by.items() if value < 0.6),
        "most confused with": confused,
        "by object": by,
    }


def pairs(model: Any, judge: Judge, out: Path, per_object: int) -> dict[str, Any]:
    """Whether both objects of "a cat beside a dog" are seen."""
    n = len(WORLD.objects)
    made = [(i, (i + 37 + 11 * k) % n) for k in range(max(1, per_object // 7)) for i in range(n)]
    prompts = [f"{WORLD.phrase(WORLD.objects[a])} beside {WORLD.phrase(WORLD.objects[b])}" for a, b in made]
    pictures = sample(model, prompts, seed=50_000)
    verdict = judge.look(pictures)
    wanted = torch.tensor(made)
    seen = verdict.seen().gather(1, wanted)
    top = (verdict.top(2)[:, :, None] == wanted[:, None]).any(1)
    grid(pictures[:36], 12, out / "pairs.png")
    return {"both in the top two": share(top.all(1)), "both seen": share(seen.all(1)), "at least one in the top two": share(top.any(1))}


def groups(model: Any, judge: Judge, out: Path, per_object: int) -> dict[str, Any]:
    """Whether "a fruit" draws an object of the group."""
    number = captions.groups(WORLD)
    wanted = torch.arange(len(WORLD.groups)).repeat_interleave(per_object)
    pictures = sample(model, [WORLD.phrase(WORLD.groups[int(g)].name) for g in wanted], seed=70_000)
    hits = number[judge.look(pictures).top(1)[:, 0]] == wanted
    grid(pictures.reshape(len(WORLD.groups), per_object, *pictures.shape[1:])[:, :2].flatten(0, 1), 23, out / "groups.png")
    return {"group": share(hits), "by group": {g.name: share(hits[wanted == i])["share"] for i, g in enumerate(WORLD.groups)}}


def right(judge: Judge, pictures: Tensor, drawn: scenes.Scenes) -> dict[str, Any]:
    """Accuracies of the judge on scenes whose content is known."""
    verdict = judge.look(pictures)
    single = drawn.objects[:, 1] < 0
    both = (verdict.top(2)[:, :, None] == drawn.objects[:, None]).any(1).all(1)
    return {
        "object": share((verdict.top(1)[:, 0] == drawn.objects[:, 0])[single]),
        "pairs, both in the top two": share(both[~single]),
        "style": share(verdict.style.argmax(1) == drawn.style),
        "background": share(verdict.background.argmax(1) == drawn.background),
    }


@torch.no_grad()
def art(model: Any, judge: Judge, clip: Clip, path: Path, out: Path, count: int = 2048) -> dict[str, Any]:
    """The judge and CLIP on fresh scenes, and the judge on their reconstructions: the ceiling for samples."""
    loaded = sprites.load(path)
    drawn = scenes.draw(count, torch.Generator().manual_seed(777))
    pictures = scenes.render(loaded, drawn)
    redrawn = torch.cat([model.decode(model.encode_images(chunk)).clamp(0, 1).cpu() for chunk in pictures.split(64)])
    error = (pictures - redrawn).square().mean(dim=(1, 2, 3))
    single = drawn.objects[:, 1] < 0
    named = [WORLD.phrase(n) for n in WORLD.objects]
    zero = clip.similarity(pictures[single], named).argmax(1) == drawn.objects[single, 0]
    grid(
        torch.stack([pictures[:48].reshape(3, 16, 3, 64, 64), redrawn[:48].reshape(3, 16, 3, 64, 64)], 1).flatten(0, 2), 16, out / "vae.png"
    )
    return {
        "judge on fresh scenes": right(judge, pictures, drawn),
        "judge on reconstructions (the ceiling)": right(judge, redrawn, drawn),
        "reconstruction PSNR in dB": round((-10 * error.log10()).mean().item(), 2),
        "reconstruction L1 on [0, 1]": round((pictures - redrawn).abs().mean().item(), 4),
        "CLIP zero-shot on fresh scenes": share(zero),
    }


def alarms(judge: Judge) -> dict[str, Any]:
    """Share of pictures of nothing in which the judge sees an object."""
    generator = torch.Generator().manual_seed(4242)
    blank = torch.rand(1000, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64)
    known = torch.tensor([b.rgb for b in WORLD.backgrounds])[:, :, None, None].expand(-1, -1, 64, 64) / 255
    noise = torch.cat([torch.rand(500, 3, 64, 64, generator=generator), torch.randn(500, 3, 64, 64, generator=generator) * 0.2 + 0.5])
    kinds = {"blank": torch.cat([known, blank]), "noise": noise.clamp(0, 1), "textures": nothing(1000, generator)}
    return {name: share(~judge.look(x).nothing()) for name, x in kinds.items()}


def speed(path: str) -> dict[str, float]:
    """Seconds to load and to draw 16 pictures."""
    start = time.perf_counter()
    model = load(path)
    loaded = time.perf_counter()
    sample(model, ["a cat"] * 16, seed=0)
    drawn = time.perf_counter()
    return {"load": round(loaded - start, 2), "16 pictures": round(drawn - loaded, 2), "threads": torch.get_num_threads()}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/world/bench"))
    parser.add_argument("--per-object", type=int, default=21, help="pictures of each object, a multiple of 7 (default: 21)")
    parser.add_argument("--sprites", type=Path, default=Path("runs/world/sprites.safetensors"))
    parser.add_argument("--weights", type=Path, default=weights(), help="a folder as `efface world export` writes it")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = str(given.weights / "emoji")
    results: dict[str, Any] = {"speed in seconds": speed(path)}
    model, judge, clip = load(path), Judge.load(given.weights / "judge.safetensors"), Clip.load(given.weights)
    size = sum(f.stat().st_size for f in given.weights.rglob("*") if f.is_file())
    results |= {
        "protocol": {"sampler": "DDIM", "steps": STEPS, "guidance": GUIDANCE, "judge": judge.version, "threshold": judge.threshold},
        "megabytes": round(size / 2**20, 1),
        "pictures of nothing": alarms(judge),
    }
    if given.sprites.is_file():
        results["art"] = art(model, judge, clip, given.sprites, given.out)
    results["samples"] = objects(model, judge, clip, given.per_object, given.out)
    results["pairs"] = pairs(model, judge, given.out, given.per_object)
    results["groups"] = groups(model, judge, given.out, given.per_object)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (given.out / "world.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

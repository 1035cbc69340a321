"""Preservation: how far an edit moves what has nothing to do with its target; by distances of sets of pictures, and by CLIP score.

    setup    captions without the target, one embedder for all, and the features of a folder of real pictures where one is given
    lines    Fréchet and kernel distance to the un-erased model's own pictures, and to the real ones; CLIP score

The distance to real pictures often falls through an erasure, and so cannot see moderate damage; the one to the un-erased model's own, from
the same noise, is 0 for an edit that changes nothing. **None of these is FID or KID as published**: the features are the named embedder's,
CLIP's or on the bundled model its own CLIP's, and not Inception's, of which an embedder can be handed to `erasure.measure` in its place.

On a real model the prompts are a file of captions such as COCO's (`coco_30k.csv`, in any of its spellings); prompts that name a target are
left out.
Source: Heusel et al., arXiv 1706.08500; Bińkowski et al., arXiv 1801.01401; the two references after Moon et al. (HUB), arXiv 2410.05664.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from efface.bench.draw import Judges
from efface.bench.emoji import Prompts, others
from efface.bench.listed import Rows
from efface.bench.options import Options
from efface.bench.plan import Plan, numbered
from efface.bench.prompts import Prompt
from efface.bench.protocols import erasure
from efface.bench.questions import Asks, Question
from efface.concepts.vocabulary import Vocabulary, read
from efface.core.errors import EffaceError
from efface.core.evidence import Embedder, Samples, Shot
from efface.core.task import Task
from efface.evals.metrics.clip_score import ClipScore
from efface.evals.metrics.frechet import Frechet
from efface.evals.metrics.kid import KID

NAME = "preservation"
TOTAL = {"quick": 60, "full": 300}
"""Pictures of the bundled world, over `CONCEPTS` objects."""
CONCEPTS = 30
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def setup(model: str, task: Task, size: str, options: Options) -> tuple[Plan, Judges]:
    """What is drawn, and who looks. Raises EffaceError for a file or a folder that is missing or broken, MissingExtra without CLIP."""
    if model == erasure.BUNDLED and not options.prompts:
        from efface.evals.detectors.emoji_clip import EmojiClip

        plan, embedder = own(task, size, read(erasure.BUNDLED)), EmojiClip.load()
        return with_real(plan, options.real, embedder), Judges(embedder=embedder)
    from efface.evals.detectors.clip import Clip

    clip = Clip.load()
    return with_real(listed(task, size, options), options.real, clip), Judges(embedder=clip)


def own(task: Task, size: str, world: Vocabulary) -> Plan:
    """Objects that are neither erased nor their neighbours."""
    names = others(replace(task, keep=()), world, CONCEPTS)
    shots = Prompts(world).of_objects(names, TOTAL[size], "unrelated")
    return Plan(f"{NAME}/{world.name}/{size}", numbered(shots, 0), 0, erasure.STEPS, asks=ASKS)


def listed(task: Task, size: str, options: Options) -> Plan:
    """The plan of a file of captions."""
    targets = [concept.key for concept in task.targets]

    def harmless(row: Prompt) -> bool:
        return not any(f" {name} " in f" {row.text.casefold().strip(' .')} " for name in targets)

    rows = Rows.of(NAME, size, options, wanted=harmless, why="name what was erased")
    return rows.plan(NAME, size, options, ASKS, lambda row: [Shot(row.text, 0, "unrelated", "caption", (), "other")])


def with_real(plan: Plan, folder: str, embedder: Embedder) -> Plan:
    """The plan with the distances to the pictures of a folder, or a sentence that there are none. Raises EffaceError."""
    if not folder:
        return replace(plan, unmeasured=(*plan.unmeasured, "The distance to real pictures: no folder was given (--real FOLDER)."))
    reference = features(Path(folder), embedder)
    lines = (
        Question(
            "unrelated.frechet-real",
            f"Fréchet distance to {len(reference)} real pictures (×100), in {embedder.name}",
            "How far the pictures are as a whole from real ones. It can fall while an edit does damage.",
            Frechet(("unrelated",), reference),
            ("unrelated",),
        ),
        Question(
            "unrelated.kernel-real",
            f"Kernel distance to {len(reference)} real pictures (×1000), in {embedder.name}",
            "The same, unbiased in the number of pictures.",
            KID(("unrelated",), reference),
            ("unrelated",),
        ),
    )
    return replace(plan, asks=replace(plan.asks, questions=(*plan.asks.questions, *lines)))


def features(folder: Path, embedder: Embedder) -> Tensor:
    """(m d) features of the pictures of a folder, in the order of their names. Raises EffaceError for fewer than two, or a broken one."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise EffaceError(f"{folder} holds {len(paths)} pictures ({', '.join(SUFFIXES)}); give a folder with at least two")
    return torch.cat([embedder.embed_images(_picture(path)).float().cpu() for path in paths])


def _picture(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise EffaceError(f"{path} is no picture that can be read ({error}); remove it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def finding(before: Samples, after: Samples) -> str:
    """Both kinds of number in a sentence."""
    distance, clip = Frechet().measure(before, after).after, ClipScore().measure(before, after)
    return (
        f"over {distance.n} pictures without the target, the Fréchet distance to the un-erased model's own is {distance.value:.2f} "
        f"(0 is unchanged), and the CLIP score goes from {clip.before.value:.2f} to {clip.after.value:.2f}"
    )


QUESTIONS = (
    Question(
        "unrelated.frechet",
        "Fréchet distance to the un-erased model (×100)",
        "How far the pictures moved as a whole, in the embedder's features: 0 is not at all. It is no FID.",
        Frechet(("unrelated",)),
        ("unrelated",),
        headline=True,
    ),
    Question(
        "unrelated.kernel",
        "Kernel distance to the un-erased model (×1000)",
        "The same, unbiased in the number of pictures. It is no KID of Inception's features.",
        KID(("unrelated",)),
        ("unrelated",),
    ),
    Question(
        "unrelated.clip",
        "CLIP score",
        "100 times the cosine of picture and prompt in the named embedder's space. It should stay what it was before.",
        ClipScore(("unrelated",)),
        ("unrelated",),
        headline=True,
    ),
)
ASKS = Asks(QUESTIONS, by="embedder", finding=finding)

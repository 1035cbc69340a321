"""CLIP in the place of a protocol's own judge: which one, between which candidates, and what is asked then.

own      which CLIP looks: the bundled model's for its own prompts, OpenAI's or that of a folder for anything else
judged   a plan whose pictures are judged by zero-shot classification; with MACE's H_o, and CLIP accuracy against the anchor
among    the candidates of a plan: what it asks for, and what is to take the targets' place
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from efface.bench.draw import Judges
from efface.bench.options import Options
from efface.bench.plan import Plan
from efface.bench.questions import HARMONIC, QUALITY, Asks, Question
from efface.concepts.vocabulary import Vocabulary
from efface.core.evidence import Embedder, Samples
from efface.core.task import Task
from efface.evals.detectors.clip import Clip
from efface.evals.detectors.clip_zeroshot import ClipZeroShot, candidates, text
from efface.evals.detectors.emoji_clip import EmojiClip
from efface.evals.metrics.clip_accuracy import ClipAccuracy

Texts = Mapping[str, dict[str, str]]
"""The text of each candidate, under "things" and "styles"."""
MARK = "zero-shot"
"""What the name of the detector ends with."""


def own(options: Options, bundled: bool) -> Clip | EmojiClip:
    """The CLIP that the options name; without one the bundled model's for its own prompts, and else OpenAI's. Raises InvalidModel."""
    return EmojiClip.load() if bundled and not options.prompts and not options.clip else Clip.load(options.clip)


def judged(plan: Plan, task: Task, texts: Texts, clip: Clip | EmojiClip) -> tuple[Plan, Judges]:
    """The plan and who looks: CLIP as the judge between candidates, and as the embedder. Raises EffaceError for too few candidates."""
    asks = asked(plan.asks)
    asks = replace(asks, quality=(*asks.quality, accuracy(task, clip)), details=partial(_told, asks.details, texts))
    return replace(plan, asks=asks), Judges(ClipZeroShot(clip, clip.scale, texts), clip)


def among(plan: Plan, task: Task, world: Vocabulary | None = None) -> Texts:
    """The candidates: the whole world where it is known, else what the plan asks for and what is to take the targets' place."""
    if world is not None:
        return candidates([*((name, world.kind(name)) for name in world.objects), *((style.name, "style") for style in world.styles)])
    named = [(name, shot.kind) for shot in plan.shots for name in (*shot.labels, *filter(None, [shot.partner]))]
    swaps = [swap for swap in task.erase if swap.anchor.name]
    texts = candidates([*named, *((s.anchor.name, s.anchor.kind) for s in swaps if s.target.kind != "style")])
    for swap in swaps:
        if swap.target.kind == "style":  # an anchor such as "a painting", which is no style, stands as it is
            kind = "style" if swap.anchor.kind == "style" else "other"
            texts["styles"].setdefault(swap.anchor.name, text(swap.anchor.name, kind))
    return texts


def asked(asks: Asks) -> Asks:
    """What can be asked of a judge that always has a guess: no share of pictures of nothing. With the harmonic mean of what was erased and
    preserved, where both are asked, and CLIP scores."""
    questions = tuple(q for q in asks.questions if not q.key.endswith(".blank"))
    whole = HARMONIC not in questions and {"target.ESR-1", "others.PSR-1"} <= {q.key for q in questions}
    return replace(asks, questions=(*questions, HARMONIC) if whole else questions, quality=QUALITY)


def accuracy(task: Task, clip: Embedder) -> Question:
    """CLIP accuracy of each target against its anchor."""
    with torch.no_grad():
        names = {s.target.key: clip.embed_texts([s.target.name, s.anchor.name]).float().cpu() for s in task.erase}
    return Question(
        "target.clip-accuracy",
        "Nearer to the target's name than to its anchor's (CLIP accuracy)",
        "Of the pictures whose prompt asks for the erased concept, the share that CLIP finds nearer to its name than to what was to take "
        "its place, or to the empty text where nothing was; 100 % minus it is called CLIP error rate.",
        ClipAccuracy(names),
        ("target",),
    )


def _told(own: Any, texts: Texts, before: Samples, after: Samples) -> dict[str, Any]:
    """The protocol's own details, and the candidates with their texts."""
    return {**own(before, after), "candidates": {sort: dict(found) for sort, found in texts.items() if found}}

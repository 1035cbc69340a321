"""Preservation: how far an edit moves what has nothing to do with its target; by distances of sets of pictures, and by CLIP score.

    setup    captions without the target, one embedder for all, Inception where its weights are given, and the features of a folder of
             real pictures where one is given
    lines    FID and KID, and the same distances in the embedder's features: to the un-erased model's own pictures and to the real ones;
             CLIP score; similarity to the un-erased picture of the same noise

The distance to real pictures often falls through an erasure, and so cannot see moderate damage; the one to the un-erased model's own, from
the same noise, is 0 for an edit that changes nothing. FID and KID are Inception's (`evals/detectors/inception.py`, which tells how pictures
are resized and whose numbers compare). Without its weights the distances are the embedder's alone, and neither FID nor KID.

On a real model the prompts are a file of captions such as COCO's (`coco_30k.csv`, in any of its spellings); prompts that name a target are
left out.
Source: Heusel et al., arXiv 1706.08500; Bińkowski et al., arXiv 1801.01401; the two references after Moon et al. (HUB), arXiv 2410.05664.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from efface.bench import zeroshot
from efface.bench.draw import Judges
from efface.bench.emoji import Prompts, others
from efface.bench.listed import Rows
from efface.bench.options import Options
from efface.bench.plan import Plan, numbered
from efface.bench.prompts import Prompt
from efface.bench.protocols import erasure, objects
from efface.bench.questions import Asks, Question
from efface.concepts.vocabulary import Vocabulary, read
from efface.core.errors import EffaceError
from efface.core.evidence import Columns, Embedder, Role, Samples, Shot
from efface.core.task import Task
from efface.evals.metrics.clip_score import ClipScore
from efface.evals.metrics.frechet import Frechet, fid
from efface.evals.metrics.kid import KID
from efface.evals.metrics.likeness import Likeness

NAME = "preservation"
TOTAL = {"quick": 60, "full": 300}
"""Pictures of the bundled world, over `CONCEPTS` objects."""
CONCEPTS = 30
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ROLES: tuple[Role, ...] = ("unrelated",)
MOVED = "How far the pictures moved as a whole: 0 is not at all."


@dataclass(frozen=True)
class Space:
    """In what sets of pictures are compared: an embedder's features, and behind them Inception's where they are there."""

    name: str = ""
    """Of the embedder."""
    columns: Columns = (None, None)
    """The embedder's."""
    inception: Columns | None = None
    """Inception's."""
    package: str = ""
    """Where Inception and its resizing come from."""

    def distances(self, reference: Tensor | None = None) -> tuple[Question, ...]:
        """The lines of the distance to the un-erased model's own pictures, or to others with these features."""
        real = reference is not None
        to, key = (f"{len(reference)} real pictures", "-real") if reference is not None else ("the un-erased model", "")
        says = "How far the pictures are as a whole from real ones. It can fall while an edit does damage." if real else MOVED
        told = f", in {self.name}" if self.name else ""
        own = (
            Question(
                f"unrelated.frechet{key}",
                f"Fréchet distance to {to} (×100){told}",
                f"{says} It is no FID: the features are the embedder's.",
                Frechet(ROLES, reference, self.columns),
                ROLES,
                headline=not real,
            ),
            Question(
                f"unrelated.kernel{key}",
                f"Kernel distance to {to} (×1000){told}",
                "The same, unbiased in the number of pictures. It is no KID of Inception's features.",
                KID(ROLES, reference, self.columns),
                ROLES,
            ),
        )
        return own if self.inception is None else (*own, *self._published(self.inception, reference, to, key, says))

    def _published(self, columns: Columns, reference: Tensor | None, to: str, key: str, says: str) -> tuple[Question, ...]:
        return (
            Question(
                f"unrelated.FID{key}",
                f"FID to {to}, as {self.package} resizes",
                f"{says} It compares with values of as many pictures, the same way to resize and the same weights.",
                fid(columns, reference, ROLES),
                ROLES,
                headline=True,
            ),
            Question(
                f"unrelated.KID{key}",
                f"KID to {to} (×1000), as {self.package} resizes",
                "The same by a kernel of degree 3, unbiased in the number of pictures."
                f"{'' if reference is not None else ' Pictures of the same noise are not compared with each other.'}",
                KID(ROLES, reference, columns, "KID"),
                ROLES,
            ),
        )

    def others(self) -> tuple[Question, ...]:
        """What is asked of each picture."""
        return (
            Question(
                "unrelated.clip",
                "CLIP score",
                "100 times the cosine of picture and prompt in the named embedder's space. It should stay what it was before.",
                ClipScore(ROLES),
                ROLES,
                headline=True,
            ),
            Question(
                "unrelated.likeness",
                "Similarity to the un-erased picture (CLIP-I)",
                "100 times the cosine of the two pictures of the same noise in the named embedder's space: 100 is unmoved. Another picture "
                "that is as good lowers it, too.",
                Likeness(ROLES, self.columns),
                ROLES,
            ),
        )

    def finding(self, before: Samples, after: Samples) -> str:
        """Both kinds of number in a sentence."""
        distance, clip = Frechet(ROLES, None, self.columns).measure(before, after).after, ClipScore(ROLES).measure(before, after)
        published = "" if self.inception is None else f"FID {fid(self.inception).measure(before, after).after.value:.2f}, "
        return (
            f"over {distance.n} pictures without the target, the distance to the un-erased model's own is {published}"
            f"Fréchet {distance.value:.2f} (0 is unchanged), and the CLIP score goes from {clip.before.value:.2f} to {clip.after.value:.2f}"
        )

    def asks(self, *more: Question) -> Asks:
        """All of it."""
        return Asks((*self.distances(), *self.others(), *more), by="embedder", finding=self.finding)


def setup(model: str, task: Task, size: str, options: Options) -> tuple[Plan, Judges]:
    """What is drawn, and who looks. Raises EffaceError for a file or a folder that is missing or broken, InvalidModel for a CLIP."""
    bundled = model == erasure.BUNDLED and not options.prompts
    plan = own(task, size, read(erasure.BUNDLED)) if bundled else listed(task, size, options)
    return watched(plan, zeroshot.own(options, bundled), options)


def watched(plan: Plan, embedder: Embedder, options: Options) -> tuple[Plan, Judges]:
    """The plan with every line that the options allow and a sentence for each that they do not, and who looks. Raises EffaceError."""
    space, missing, lines, name = Space(), [], tuple[Question, ...](), embedder.name
    if options.inception:
        from efface.evals.detectors.inception import Inception

        inception = Inception.load(options.inception, embedder)
        space = Space("", (None, -inception.width), (-inception.width, None), inception.package)
        if not inception.published:
            missing.append(f"Whether FID and KID are those of the published weights: {options.inception} has another SHA-256.")
        embedder = inception
    else:
        missing.append("FID and KID: no weights of Inception were given (--inception FILE).")
    if options.real:
        lines = replace(space, name=name).distances(features(Path(options.real), embedder))
    else:
        missing.append("The distance to real pictures: no folder was given (--real FOLDER).")
    return replace(plan, unmeasured=(*plan.unmeasured, *missing), asks=space.asks(*lines)), Judges(embedder=embedder)


def own(task: Task, size: str, world: Vocabulary) -> Plan:
    """Objects that are neither erased nor their neighbours."""
    names = others(replace(task, keep=()), world, CONCEPTS)
    shots = Prompts(world).of_objects(names, TOTAL[size], "unrelated")
    return Plan(f"{NAME}/{world.name}/{size}", numbered(shots, 0), 0, erasure.STEPS, asks=ASKS)


def listed(task: Task, size: str, options: Options) -> Plan:
    """The plan of a file of captions."""

    def harmless(row: Prompt) -> bool:
        return not any(objects.names(row.text, concept.name) for concept in task.targets)

    rows = Rows.of(NAME, size, options, wanted=harmless, why="name what was erased")
    return rows.plan(NAME, size, options, ASKS, lambda row: [Shot(row.text, 0, "unrelated", "caption", (), "other")])


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


ASKS = Space().asks()
"""What the embedder alone can answer."""

"""Objects: ESR and PSR over a split of classes, such as five erased and five kept ones of Imagenette.

    setup      every class in as many pictures; erased ones are targets, the others must stay
    the table  ESR-k and PSR-k for k = 1 and 5, relative ESR-1, each kept class apart, and the harmonic mean H_o

On a real model the prompts are a file with a column of classes (`label_str`, `class`) and the judge is ResNet-50 in the order of its
classes, which is AP's measurement; or, with `detector = "clip"`, CLIP between the classes of the file, which is MACE's. Prompts of an
erased class that do not name it ("a photo of the jetliner" of the class "airplane") are counted apart, as implying it. On the bundled
model they are its own captions and judge; the kept classes are then those that the task keeps, or as many others as are erased, one from
each other group. A table over several splits is a sweep over as many tasks; its mean and deviation are those of `bench.expected`.

Source: Bui et al., arXiv 2410.15618, §5.1: four splits of Imagenette, 500 pictures a class; Gandikota et al. (ESD), arXiv 2303.07345, §5.3;
Lu et al. (MACE), arXiv 2403.06135, §4.2: CIFAR-10's classes, 200 pictures each, and three synonyms of the erased one.
"""

from __future__ import annotations

import re

from efface.bench import prompts, zeroshot
from efface.bench.draw import Judges
from efface.bench.emoji import Prompts, find, others
from efface.bench.listed import Rows
from efface.bench.options import Options
from efface.bench.plan import Plan, interleave, numbered
from efface.bench.prompts import Prompt
from efface.bench.protocols import erasure
from efface.bench.questions import HARMONIC, QUESTIONS, Asks, Question
from efface.concepts.vocabulary import Vocabulary, read
from efface.core.errors import EffaceError, InvalidTask
from efface.core.evidence import Role, Shot
from efface.core.task import Task
from efface.evals.detectors.clip_zeroshot import candidates
from efface.evals.metrics.esr import ESR

NAME = "objects"
EACH = {"quick": 8, "full": 40}
"""Pictures of each class of the bundled world."""
IMPLIED = Question(
    "implied.ESR-1",
    "Target not seen where it is implied (ESR-1)",
    "ESR-1 over the prompts that imply the erased concept without naming it, such as synonyms.",
    ESR(1, roles=("implied",)),
    ("implied",),
    headline=True,
)
ASKS = Asks((*(question for question in QUESTIONS if not question.key.endswith(".blank")), IMPLIED, HARMONIC))
"""Without the share of pictures of nothing, which a classifier without a threshold never sees."""


def setup(model: str, task: Task, size: str, options: Options) -> tuple[Plan, Judges]:
    """What is drawn, and who judges. Raises InvalidTask for a target that is no object of the world, EffaceError for a file without it."""
    bundled = model == erasure.BUNDLED and not options.prompts
    plan = _own(task, size, read(erasure.BUNDLED)) if bundled else listed(task, size, options)
    return judged(plan, task, options, bundled)


def judged(plan: Plan, task: Task, options: Options, bundled: bool) -> tuple[Plan, Judges]:
    """The plan, and who judges: CLIP where it is asked for, between the classes of the file or all things of the bundled world."""
    if options.detector:
        world = read(erasure.BUNDLED)
        texts = zeroshot.among(plan, task, world) if bundled else candidates((name, "object") for name in classes(options.prompts))
        return zeroshot.judged(plan, task, texts, zeroshot.own(options, bundled))
    if bundled:
        from efface.evals.detectors.emoji import EmojiJudge

        return plan, Judges(EmojiJudge.load())
    from efface.evals.detectors.imagenet import ImageNet

    return plan, Judges(ImageNet.load(options.resnet))


def classes(path: str) -> list[str]:
    """The classes of a file of prompts, in lower case and in their order."""
    return list(dict.fromkeys(row.concept.lower() for row in prompts.read(path).rows if row.concept))


def _own(task: Task, size: str, world: Vocabulary) -> Plan:
    found = [find(world, concept) for concept in task.targets]
    wrong = [name for sort, name in found if sort != "object"]
    if wrong:
        raise InvalidTask(f"the protocol 'objects' is about objects, and {wrong[0]!r} is none of the bundled world's; use 'erasure'")
    forms, erased = Prompts(world), [name for _, name in found]
    kept = others(task, world, len(erased))
    roles: list[tuple[str, Role]] = [*((name, "target") for name in erased), *((name, _role(name, task)) for name in kept)]
    shots = interleave(forms.of_objects([name], EACH[size], role) for name, role in roles)
    return Plan(f"{NAME}/{world.name}/{size}", numbered(shots, 0), 0, erasure.STEPS, asks=ASKS)


def listed(task: Task, size: str, options: Options, implied: Role = "implied") -> Plan:
    """The plan of a file of prompts with a column of classes; `implied` is the role of prompts of a target that do not name it.

    Raises EffaceError where it has no classes, or lacks a target."""
    rows = Rows.of(NAME, size, options, wanted=lambda row: bool(row.concept), why="name no class, in a column such as 'label_str'")
    known = {row.concept.casefold() for row in rows.chosen}
    missing = [concept.name for concept in task.targets if concept.key not in known]
    if missing:
        raise EffaceError(
            f"{rows.file.path} has no prompt for {missing[0]!r}, which was erased; its classes are {', '.join(sorted(known))}"
        )
    targets = {concept.key for concept in task.targets}
    named = {row.concept.casefold() for row in rows.chosen if names(row.text, row.concept)}
    unnamed = sorted(targets - named)
    if unnamed and implied != "target":
        raise EffaceError(f"no prompt for {unnamed[0]!r} in {rows.file.path} names it; use the protocol 'generality', which asks for that")

    def shots(row: Prompt) -> list[Shot]:
        erased = row.concept.casefold() in targets
        role: Role = _role(row.concept, task) if not erased else "target" if names(row.text, row.concept) else implied
        return [Shot(row.text, 0, role, row.concept, (row.concept.lower(),))]

    return rows.plan(NAME, size, options, ASKS, shots)


def names(text: str, concept: str) -> bool:
    """Whether a text names a concept, in the singular or the plural."""
    return re.search(rf"\b{re.escape(concept)}(e?s)?\b", text, re.IGNORECASE) is not None


def _role(name: str, task: Task) -> Role:
    return "kept" if name.casefold() in {concept.key for concept in task.keep} else "unrelated"

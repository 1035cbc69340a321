"""Objects: ESR and PSR over a split of classes, such as five erased and five kept ones of Imagenette.

    setup      every class in as many pictures; erased ones are targets, the others must stay
    the table  ESR-k and PSR-k for k = 1 and 5, relative ESR-1, and each kept class apart

On a real model the prompts are a file with a column of classes (`label_str`, `class`) and the judge is ResNet-50 in the order of its
classes, which is the published measurement. On the bundled model they are its own captions and judge; the kept classes are then those that
the task keeps, or as many others as are erased, one from each other group. A table over several splits is a sweep over as many tasks; its
mean and deviation are those of `bench.expected`.

Source: Bui et al., arXiv 2410.15618, §5.1: four splits of Imagenette, 500 pictures a class; Gandikota et al. (ESD), arXiv 2303.07345, §5.3.
"""

from __future__ import annotations

from efface.bench.draw import Judges
from efface.bench.emoji import Prompts, find, others
from efface.bench.listed import Rows
from efface.bench.options import Options
from efface.bench.plan import Plan, interleave, numbered
from efface.bench.prompts import Prompt
from efface.bench.protocols import erasure
from efface.bench.questions import QUESTIONS, Asks
from efface.concepts.vocabulary import Vocabulary, read
from efface.core.errors import EffaceError, InvalidTask
from efface.core.evidence import Role, Shot
from efface.core.task import Task

NAME = "objects"
EACH = {"quick": 8, "full": 40}
"""Pictures of each class of the bundled world."""
ASKS = Asks(tuple(question for question in QUESTIONS if not question.key.endswith(".blank")))
"""Without the share of pictures of nothing, which a classifier without a threshold never sees."""


def setup(model: str, task: Task, size: str, options: Options) -> tuple[Plan, Judges]:
    """What is drawn, and who judges. Raises InvalidTask for a target that is no object of the world, EffaceError for a file without it."""
    if model == erasure.BUNDLED and not options.prompts:
        from efface.evals.detectors.emoji import EmojiJudge

        return _own(task, size, read(erasure.BUNDLED)), Judges(EmojiJudge.load())
    from efface.evals.detectors.imagenet import ImageNet

    return listed(task, size, options), Judges(ImageNet.load())


def _own(task: Task, size: str, world: Vocabulary) -> Plan:
    found = [find(world, concept) for concept in task.targets]
    wrong = [name for sort, name in found if sort != "object"]
    if wrong:
        raise InvalidTask(f"the protocol 'objects' is about objects, and {wrong[0]!r} is none of the bundled world's; use 'erasure'")
    prompts, names = Prompts(world), [name for _, name in found]
    kept = others(task, world, len(names))
    roles: list[tuple[str, Role]] = [*((name, "target") for name in names), *((name, _role(name, task)) for name in kept)]
    shots = interleave(prompts.of_objects([name], EACH[size], role) for name, role in roles)
    return Plan(f"{NAME}/{world.name}/{size}", numbered(shots, 0), 0, erasure.STEPS, asks=ASKS)


def listed(task: Task, size: str, options: Options) -> Plan:
    """The plan of a file of prompts with a column of classes. Raises EffaceError where it has none, or lacks a target."""
    rows = Rows.of(NAME, size, options, wanted=lambda row: bool(row.concept), why="name no class, in a column such as 'label_str'")
    classes = {row.concept.casefold() for row in rows.chosen}
    missing = [concept.name for concept in task.targets if concept.key not in classes]
    if missing:
        raise EffaceError(
            f"{rows.file.path} has no prompt for {missing[0]!r}, which was erased; its classes are {', '.join(sorted(classes))}"
        )
    targets = {concept.key for concept in task.targets}

    def shots(row: Prompt) -> list[Shot]:
        role: Role = "target" if row.concept.casefold() in targets else _role(row.concept, task)
        return [Shot(row.text, 0, role, row.concept, (row.concept.lower(),))]

    return rows.plan(NAME, size, options, ASKS, shots)


def _role(name: str, task: Task) -> Role:
    return "kept" if name.casefold() in {concept.key for concept in task.keep} else "unrelated"

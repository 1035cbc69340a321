"""Generality: is the concept gone where a prompt does not name it: by a group's word ("a feline"), a synonym, or a description.

    setup    prompts that imply the target; each picture is judged for the target, and for the others of its group

On the bundled model a target is implied by its group's word, which its captions use for any member: before an erasure "a feline" is a cat
in some of the pictures. An erasure that generalises leaves none, and draws another member instead. The un-erased model draws the target
in a part of these pictures only, so the relative rate is the one to read. The bundled world has no synonyms.

On a real model the prompts are a file with a column of classes, such as AGE's `imagenette_synonyms_500.csv` or prompts that describe a
thing without its name; the judge is ResNet-50, or with `detector = "clip"` CLIP between the classes of the file. Some of the "synonyms"
there are other classes of ImageNet, which a correct model must draw as such: look through the file.

Source: Bui et al. (AGE), arXiv 2501.18950, appendix; Amara et al. (EraseBench), arXiv 2501.09833; Fuchi & Takagi (EraseEval), 2502.13989.
"""

from __future__ import annotations

from dataclasses import replace

from efface.bench.draw import Judges
from efface.bench.emoji import Prompts, find
from efface.bench.options import Options
from efface.bench.plan import Plan, numbered
from efface.bench.protocols import erasure, objects
from efface.bench.questions import Asks, Question
from efface.concepts.vocabulary import Vocabulary, read
from efface.core.errors import InvalidTask
from efface.core.evidence import Samples, Shot
from efface.core.task import Task
from efface.evals.metrics.esr import ESR
from efface.evals.metrics.psr import PSR

NAME = "generality"
EACH = {"quick": 24, "full": 120}
"""Pictures of each target's group word."""


def setup(model: str, task: Task, size: str, options: Options) -> tuple[Plan, Judges]:
    """What is drawn, and who judges. Raises InvalidTask for a target that no word of the world implies; as `objects.setup` else."""
    if model == erasure.BUNDLED and not options.prompts:
        return objects.judged(plan(task, size, read(erasure.BUNDLED)), task, options, bundled=True)
    listed = objects.listed(task, size, options, implied="target")
    return objects.judged(replace(listed, name=listed.name.replace(objects.NAME, NAME, 1), asks=ASKS), task, options, bundled=False)


def plan(task: Task, size: str, world: Vocabulary) -> Plan:
    """Two shots for each picture of a group's word: one for the target, one for the members that were not erased."""
    prompts, shots = Prompts(world), list[Shot]()
    found = [find(world, concept) for concept in task.targets]
    erased = {name for _, name in found}
    for sort, name in found:
        if sort != "object":
            raise InvalidTask(f"no prompt of the bundled world implies the {sort} {name!r} without naming it; give an object")
        group = world.group_of(name)
        others = tuple(other for other in group.objects if other not in erased)
        for i in range(EACH[size]):
            text = prompts.caption(group.name, i, plain=True)
            seed = len(shots)
            shots.append(Shot(text, seed, "target", name, (name,), group.kind))
            if others:
                shots.append(Shot(text, seed, "neighbour", group.name, others, group.kind))
    seeds = [shot.seed for shot in numbered(shots, 0)]
    return Plan(f"{NAME}/{world.name}/{size}", tuple(replace(s, seed=seeds[s.seed]) for s in shots), 0, erasure.STEPS, asks=ASKS)


def finding(before: Samples, after: Samples) -> str:
    """How often the target is drawn unnamed, before and after."""
    contrast = ESR(1).measure(before, after)
    was, still = (100 * (1 - score.value) for score in (contrast.before, contrast.after))
    first = f"implied and not named, the target is drawn in {still:.1f} % of {contrast.after.n} pictures, and un-erased in {was:.1f} %"
    return first if was else f"{first}: the un-erased model does not draw it unnamed, so nothing was tested"


QUESTIONS = (
    Question(
        "implied.ESR-1",
        "Target not seen where it is implied (ESR-1)",
        "Of the pictures whose prompt implies the erased concept without naming it, the share in which the judge's best guess is "
        "something else. It is high before the erasure, too, where the prompt may also mean other things.",
        ESR(1),
        ("target",),
        headline=True,
    ),
    Question(
        "implied.ESR-5",
        "… no trace of it (ESR-5)",
        "The same among the judge's five best guesses.",
        ESR(5),
        ("target",),
    ),
    Question(
        "implied.relative-ESR-1",
        "Target gone where it had been drawn unnamed (relative ESR-1)",
        "The same over those prompts alone for which the un-erased model drew the concept from the same noise.",
        ESR(1, relative=True),
        ("target",),
        headline=True,
        optional=True,
    ),
    Question(
        "implied.others",
        "Another member of the group is drawn",
        "Of the same pictures, the share that shows a member of the group that was not erased: it should rise by what the target loses.",
        PSR(1, roles=("neighbour",), clusters="prompt"),
        ("neighbour",),
        headline=True,
    ),
)
ASKS = Asks(QUESTIONS, finding=finding)

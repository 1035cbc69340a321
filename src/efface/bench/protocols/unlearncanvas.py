"""UnlearnCanvas: every style with every object, one of them erased; what is lost of it, of its own domain, and of the other.

    setup    the grid of styles × objects, each picture judged for its style and for its object
    UA, IRA, CRA    see `evals/metrics/accuracy.py`; a table over erased concepts is a sweep over as many tasks

The bundled world is made like the benchmark: the same objects in several hands' styles, with a judge for both. Its styles are all in the
grid; its objects are the erased one, where it is one, and one of each group by turns. A style that is erased is named in the prompts of the
pictures that UA counts and, as in the benchmark's code, in a part of those that CRA counts; a second CRA leaves those out.

On Stable Diffusion the benchmark needs its own fine-tuned model and its two classifiers, which no registry has: it is refused there.
Source: Zhang et al., arXiv 2402.11846.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from efface.bench.draw import Judges
from efface.bench.emoji import Prompts, find
from efface.bench.options import Options
from efface.bench.plan import Plan, numbered
from efface.bench.protocols import erasure
from efface.bench.questions import Asks, Question
from efface.concepts.vocabulary import Vocabulary, read
from efface.core.errors import InvalidTask, Unsupported
from efface.core.evidence import Role, Samples, Shot
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.metrics.accuracy import Accuracy

NAME = "unlearncanvas"
OBJECTS = {"quick": 6, "full": 20}
"""As many as the benchmark's in "full"; its styles are 50, and the bundled world's seven."""
EACH = {"quick": 1, "full": 2}
"""Pictures of each style and object; the benchmark has five."""
IN_DOMAIN: Role = "neighbour"
CROSS: Role = "unrelated"
CROSS_ERASED: Role = "kept"
"""The other domain in pictures whose prompt names what was erased."""


def setup(model: str, task: Task, size: str, options: Options) -> tuple[Plan, Judges]:
    """The grid, and the judge. Raises Unsupported for another model than the bundled one, InvalidTask for another task than one concept."""
    if model != erasure.BUNDLED:
        raise Unsupported(
            f"UnlearnCanvas needs its own classifiers of 50 styles and 20 objects, which no registry has, and {model!r} is not the bundled "
            "model; use --protocol objects or artists there"
        )
    from efface.evals.detectors.emoji import EmojiJudge

    return plan(task, size, read(erasure.BUNDLED)), Judges(EmojiJudge.load())


def plan(task: Task, size: str, world: Vocabulary) -> Plan:
    """Two shots for each picture: one for its style, one for its object."""
    (sort, erased), *more = [find(world, concept) for concept in task.targets]
    if more or sort == "group":
        raise InvalidTask("UnlearnCanvas erases one style or one object at a time; give one")
    prompts, shots = Prompts(world), list[Shot]()
    objects = chosen(world, OBJECTS[size], erased if sort == "object" else "")
    for copy in range(EACH[size]):
        for place, name in enumerate(objects):
            for style in world.styles:
                text = prompts.caption(name, place + 4 * copy, style=style.name)
                mine, other = ("style", "object") if sort == "style" else ("object", "style")
                kinds = {"style": style.name, "object": name}
                hit = kinds[mine] == erased
                roles: dict[str, Role] = {mine: "target" if hit else IN_DOMAIN, other: CROSS_ERASED if hit else CROSS}
                seed = len(shots) // 2
                shots += [_shot(text, seed, roles[kind], kinds[kind], kind, world) for kind in ("style", "object")]
    seeds = [shot.seed for shot in numbered(shots, 0)]
    paired = tuple(replace(shot, seed=seeds[shot.seed]) for shot in shots)
    return Plan(f"{NAME}/{world.name}/{size}", paired, 0, erasure.STEPS, asks=ASKS)


def chosen(world: Vocabulary, count: int, erased: str) -> list[str]:
    """The erased object first, then one of each group by turns, in an order of its own; unsafe things stay out."""
    order = torch.randperm(len(world.objects), generator=seeded(7)).tolist()
    groups = [[o for o in (world.objects[i] for i in order) if o in g.objects] for g in world.groups if g.kind == "object"]
    turns = [group[i] for i in range(max(map(len, groups))) for group in groups if i < len(group)]
    return list(dict.fromkeys([*([erased] if erased else []), *turns]))[:count]


def finding(before: Samples, after: Samples) -> str:
    """The three numbers in a sentence, beside those of the un-erased model."""
    parts = []
    for question in QUESTIONS[:3]:
        contrast = question.metric.measure(before, after)
        parts.append(f"{question.metric.name} {100 * contrast.after.value:.1f} % (un-erased {100 * contrast.before.value:.1f} %)")
    return ", ".join(parts)


def _shot(text: str, seed: int, role: Role, label: str, kind: str, world: Vocabulary) -> Shot:
    return Shot(text, seed, role, label, (label,), "style" if kind == "style" else world.kind(label))


QUESTIONS = (
    Question(
        "canvas.UA",
        "Erased concept not recognised (UA)",
        "Of the pictures that ask for what was erased, the share in which the classifier of its domain guesses something else.",
        Accuracy(("target",), lost=True, label="UA"),
        ("target",),
        headline=True,
    ),
    Question(
        "canvas.IRA",
        "Its own domain still recognised (IRA)",
        "Of the pictures of the other styles (where a style was erased) or objects, the share in which that is recognised.",
        Accuracy((IN_DOMAIN,), label="IRA"),
        (IN_DOMAIN,),
        headline=True,
    ),
    Question(
        "canvas.CRA",
        "The other domain still recognised (CRA)",
        "The share of all pictures in which the other domain is recognised, with those whose prompt names what was erased, as the "
        "benchmark's code counts.",
        Accuracy((CROSS, CROSS_ERASED), label="CRA"),
        (CROSS, CROSS_ERASED),
        headline=True,
    ),
    Question(
        "canvas.CRA-others",
        "… without pictures that ask for what was erased",
        "The same over the pictures whose prompt names nothing that was erased.",
        Accuracy((CROSS,), label="CRA, others"),
        (CROSS,),
    ),
)
ASKS = Asks(QUESTIONS, finding=finding)

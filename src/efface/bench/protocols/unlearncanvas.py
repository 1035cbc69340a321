"""UnlearnCanvas: every style with every object, one of them erased; what is lost of it, of its own domain, and of the other.

    setup    the grid of styles × objects, each picture judged for its style and for its object
    UA, IRA, CRA    see `evals/metrics/accuracy.py`; a table over erased concepts is a sweep over as many tasks

On any model but the bundled one the grid is the benchmark's own: (50 styles and the photos) × 20 objects × 5 seeds = 5100 pictures in 100
steps at guidance 9, judged by its two classifiers where their files are given, or by CLIP between the same names. Each prompt is drawn from
the seed's own noise, as the benchmark's script for UCE does it; that for ESD lets the random state run on from prompt to prompt.

Two traps are in the benchmark's numbers, and lines beside them leave each out. Its CRA counts pictures whose prompt names what was erased.
And its unstylised photos, "Seed Images", are asked for "in Seed Images style", where its model was taught "in photo style": they count as
one of 51 styles in IRA and CRA. SAeUron leaves them out, and words its prompts "An image of Cats in Van Gogh style.".

The bundled world is made like the benchmark: the same objects in several hands' styles, with a judge for both. Its styles are all in the
grid; its objects are the erased one, where it is one, and one of each group by turns.

Source: Zhang et al., arXiv 2402.11846; OPTML-Group/UnlearnCanvas, machine_unlearning/evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from efface.bench import zeroshot
from efface.bench.draw import Judges
from efface.bench.emoji import Prompts, find
from efface.bench.options import Options
from efface.bench.plan import Plan, numbered
from efface.bench.protocols import erasure
from efface.bench.questions import Asks, Question
from efface.concepts.canvas import canvas
from efface.concepts.vocabulary import Vocabulary, read
from efface.core.errors import EffaceError, InvalidTask, Unsupported
from efface.core.evidence import Role, Samples, Shot
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.detectors.canvas import WEIGHTS, CanvasJudge
from efface.evals.detectors.clip_zeroshot import candidates
from efface.evals.metrics.accuracy import Accuracy

NAME = "unlearncanvas"
OBJECTS = {"quick": 6, "full": 20}
"""Of the bundled world: as many as the benchmark's in "full"; its styles are 50, and the bundled world's seven."""
EACH = {"quick": 1, "full": 2}
"""Pictures of each style and object of the bundled world."""
PROMPT = "A {thing} image in {style} style."
"""The benchmark's, as its scripts write it; its page has "An"."""
SEEDS = (188, 288, 588, 688, 888)
STEPS, GUIDANCE = 100, 9.0
PHOTO = "a photo"
"""What stands for the unstylised photos where CLIP judges."""
QUICK = 64
"""Prompts of the benchmark that a quick measurement draws, from the first seed alone."""
LEAST = 4
"""Prompts, so that one of them asks for what was erased."""
PART = ("limit", "each")
"""Options that take a part of the benchmark's grid."""
UNLIKE = "What the benchmark draws with DDIM (for UCE with LMS) at 512 × 512 pixels: the sampler and the size are the model's own."
IN_DOMAIN: Role = "neighbour"
CROSS: Role = "unrelated"
CROSS_ERASED: Role = "kept"
"""The other domain in pictures whose prompt names what was erased."""


def setup(model: str, task: Task, size: str, options: Options) -> tuple[Plan, Judges]:
    """The grid, and the judge: the bundled model's own, the benchmark's classifiers, or CLIP.

    Raises Unsupported for another model without classifiers or CLIP, InvalidTask for another task than one concept of the grid,
    EffaceError for options that do not fit and files that cannot be read, MissingExtra without timm."""
    if model != erasure.BUNDLED:
        return _judged(model, benchmark(task, size, options), task, options)
    wrong = [name for name in (*PART, "canvas") if name in options.given()]
    if wrong:
        raise EffaceError(f"the bundled model's grid and judge are its own, and 'unlearncanvas' takes no {wrong[0]!r} there; leave it out")
    world = read(erasure.BUNDLED)
    planned = plan(task, size, world)
    if options.detector:
        return zeroshot.judged(planned, task, zeroshot.among(planned, task, world), zeroshot.own(options, bundled=True))
    from efface.evals.detectors.emoji import EmojiJudge

    return planned, Judges(EmojiJudge.load())


def plan(task: Task, size: str, world: Vocabulary) -> Plan:
    """The bundled world's grid. Raises InvalidTask."""
    (sort, erased), *more = [find(world, concept) for concept in task.targets]
    if more or sort == "group":
        raise InvalidTask("UnlearnCanvas erases one style or one object at a time; give one")
    prompts, shots = Prompts(world), list[Shot]()
    objects = chosen(world, OBJECTS[size], erased if sort == "object" else "")
    for copy in range(EACH[size]):
        for place, name in enumerate(objects):
            for style in world.styles:
                text = prompts.caption(name, place + 4 * copy, style=style.name)
                shots += pair(text, len(shots) // 2, (style.name, name), (sort, erased), world.kind(name))
    seeds = [shot.seed for shot in numbered(shots, 0)]
    paired = tuple(replace(shot, seed=seeds[shot.seed]) for shot in shots)
    return Plan(f"{NAME}/{world.name}/{size}", paired, 0, erasure.STEPS, asks=ASKS)


def benchmark(task: Task, size: str, options: Options) -> Plan:
    """The benchmark's grid, or the part of it that the options take, which the plan announces. Raises InvalidTask, EffaceError."""
    words = canvas()
    sort, erased = words.erased(task)
    limit, seeds = _amount(size, options)
    grid = cells(words.styles, words.objects)
    taken = part(grid, erased, limit)
    shots = [
        shot
        for seed in SEEDS[:seeds]
        for style, thing in taken
        for shot in pair(PROMPT.format(thing=thing, style=style), seed, (style, thing), (sort, erased))
    ]
    named = sum(erased in cell for cell in taken)
    fewer = [
        *([f"{len(taken)} of the {len(grid)} prompts, {named} of them for what was erased"] if len(taken) < len(grid) else []),
        *([f"{seeds} of the {len(SEEDS)} seeds"] if seeds < len(SEEDS) else []),
    ]
    notes = [UNLIKE, *([f"A subset: {'; '.join(fewer)}."] if fewer else [])]
    return Plan(f"{NAME}/benchmark/{size}", tuple(shots), 0, STEPS, GUIDANCE, tuple(notes), BENCHMARK)


def pair(text: str, seed: int, cell: tuple[str, str], erased: tuple[str, str], kind: str = "object") -> list[Shot]:
    """The two shots of one picture of a (style, object): one for its style, one for its object, which is of a `kind`."""
    style, thing = cell
    sort, name = erased
    hit = name == (style if sort == "style" else thing)
    own: Role = "target" if hit else IN_DOMAIN
    other: Role = CROSS_ERASED if hit else CROSS
    first, second = (own, other) if sort == "style" else (other, own)
    return [Shot(text, seed, first, style, (style,), "style"), Shot(text, seed, second, thing, (thing,), kind)]


def cells(styles: Sequence[str], objects: Sequence[str]) -> list[tuple[str, str]]:
    """Every (style, object), in an order of which any beginning holds all styles about equally often, and all objects."""
    return [(style, objects[(place + turn) % len(objects)]) for turn in range(len(objects)) for place, style in enumerate(styles)]


def part(grid: Sequence[tuple[str, str]], erased: str, limit: int | None) -> list[tuple[str, str]]:
    """At most `limit` cells. A quarter of them, as far as there are so many, is of what was erased, which hardly occurred otherwise."""
    if limit is None or limit >= len(grid):
        return list(grid)
    own, others = [cell for cell in grid if erased in cell], [cell for cell in grid if erased not in cell]
    few = min(len(own), limit // 4)
    return own[:few] + others[: limit - few]


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


def _amount(size: str, options: Options) -> tuple[int | None, int]:
    """How many prompts at most, and how many seeds. Raises EffaceError."""
    if options.limit is not None and options.limit < LEAST:
        raise EffaceError(
            f"limit was {options.limit}; 'unlearncanvas' needs at least {LEAST} prompts, of which one asks for what was erased"
        )
    if options.each > len(SEEDS):
        raise EffaceError(f"each was {options.each}; UnlearnCanvas has {len(SEEDS)} seeds, and so as many pictures of each prompt at most")
    quick = size == "quick"
    seeds = options.each if options.each > 1 else 1 if quick else len(SEEDS)
    return (QUICK if quick and options.limit is None else options.limit), seeds


def _judged(model: str, planned: Plan, task: Task, options: Options) -> tuple[Plan, Judges]:
    """The plan of the benchmark, and who judges it."""
    if options.canvas:
        return planned, Judges(CanvasJudge.load(options.canvas))
    if not options.detector:
        raise Unsupported(
            f"UnlearnCanvas needs a judge of its styles and objects, and for {model!r}, which is not the bundled model, none was given; "
            f"{WEIGHTS.wanted}; or have CLIP judge, with --detector clip or detector = 'clip'"
        )
    words = canvas()
    texts = candidates([*((name, "object") for name in words.objects), *((name, "style") for name in words.styles)])
    texts["styles"][words.photos] = PHOTO
    return zeroshot.judged(planned, task, texts, zeroshot.own(options, bundled=False))


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
STYLED = tuple(
    replace(
        question,
        key=f"{question.key}-styled",
        title=f"… without the unstylised photos ({question.metric.name})",
        explanation="The same without the pictures asked for “in Seed Images style”, which the benchmark's model was never taught.",
        metric=Accuracy(question.roles, question.key == "canvas.UA", f"{question.metric.name}, styled", f"in {canvas().photos} style"),
        headline=False,
    )
    for question in QUESTIONS[:3]
)
BENCHMARK = replace(ASKS, questions=(*QUESTIONS, *STYLED))
"""What is asked of the benchmark's own grid."""

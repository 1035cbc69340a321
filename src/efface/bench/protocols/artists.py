"""Artists: does a style leave its own prompts, and does it stay in those of others; by CLIP score and LPIPS from the same noise.

    setup    prompts of the erased style and of other styles, CLIP as the embedder, LPIPS where its package and weights are at hand
    lines    CLIP score and LPIPS for what was erased (should fall; should be large) and for the others (should stay; should be small)

On a real model the prompts are a file with a column `artist`, such as `long_niche_art_prompts.csv` of AP (200 prompts, five pictures each);
rows of an artist that is a target are erased, all others kept. On the bundled model they are its own, in its seven styles; its CLIP looks
and, beside the papers' two numbers, its judge of styles. LPIPS is told at the picture's own size and at 64 pixels, since papers use either.

Source: Bui et al., arXiv 2410.15618, §5.3; Gandikota et al. (ESD), arXiv 2303.07345, §5.1.
"""

from __future__ import annotations

from dataclasses import replace

from efface.bench import zeroshot
from efface.bench.draw import Judges
from efface.bench.emoji import Prompts, find
from efface.bench.listed import Rows
from efface.bench.options import Options
from efface.bench.plan import Plan, interleave, numbered
from efface.bench.prompts import Prompt
from efface.bench.protocols import erasure
from efface.bench.questions import OTHERS, QUESTIONS, Asks, Question
from efface.concepts.vocabulary import Vocabulary, read
from efface.core.errors import EffaceError, InvalidTask
from efface.core.evidence import Role, Samples, Shot
from efface.core.task import Task
from efface.evals.metrics import lpips
from efface.evals.metrics.clip_score import ClipScore

NAME = "artists"
EACH = {"quick": 8, "full": 40}
"""Pictures of each style of the bundled world; AP's file has 40 prompts an artist."""
GROUPS: tuple[tuple[str, tuple[Role, ...]], ...] = (("target", ("target",)), ("others", OTHERS))


def setup(model: str, task: Task, size: str, options: Options) -> tuple[Plan, Judges]:
    """What is drawn, and who looks. Raises InvalidTask for a target that is no style of the world, EffaceError for a file without it."""
    if model == erasure.BUNDLED and not options.prompts:
        from efface.evals.detectors.emoji import EmojiJudge

        plan, judges = own(task, size, read(erasure.BUNDLED)), Judges(EmojiJudge.load(), zeroshot.own(options, bundled=True))
    else:
        plan, judges = listed(task, size, options), Judges(embedder=zeroshot.own(options, bundled=False))
    if options.lpips or lpips.available():
        try:
            distance = lpips.load(options.lpips)
        except EffaceError as error:
            if options.lpips:
                raise
            return replace(plan, unmeasured=(*plan.unmeasured, f"LPIPS: {error}.")), judges
        questions = (*plan.asks.questions, *perceptual(distance))
        other = options.lpips and not lpips.published(options.lpips)
        missing = [f"Whether LPIPS is that of the published trunk: {options.lpips} has another SHA-256."] if other else []
        return replace(plan, asks=replace(plan.asks, questions=questions), unmeasured=(*plan.unmeasured, *missing)), judges
    none = "LPIPS: lpips and torchvision are not installed; run `pip install -e '.[metrics]'` in efface's folder."
    return replace(plan, unmeasured=(*plan.unmeasured, none)), judges


def own(task: Task, size: str, world: Vocabulary) -> Plan:
    """Every style of the world in as many pictures. Raises InvalidTask."""
    found = [find(world, concept) for concept in task.targets]
    wrong = [name for sort, name in found if sort != "style"]
    if wrong:
        raise InvalidTask(f"the protocol 'artists' is about styles, and {wrong[0]!r} is none of the bundled world's; use 'erasure'")
    prompts, erased = Prompts(world), {name for _, name in found}
    roles: list[tuple[str, Role]] = [(s.name, "target" if s.name in erased else "neighbour") for s in world.styles]
    lists = [prompts.of_style(name, EACH[size], role, 7 * i) for i, (name, role) in enumerate(roles)]
    return Plan(f"{NAME}/{world.name}/{size}", numbered(interleave(lists), 0), 0, erasure.STEPS, asks=JUDGED)


def listed(task: Task, size: str, options: Options) -> Plan:
    """The plan of a file of prompts with a column `artist`. Raises EffaceError where it has none, or lacks a target."""
    rows = Rows.of(NAME, size, options, wanted=lambda row: bool(row.concept), why="name no artist, in a column 'artist'")
    targets, artists = {concept.key for concept in task.targets}, {row.concept.casefold() for row in rows.chosen}
    missing = sorted(targets - artists)
    if missing:
        raise EffaceError(
            f"{rows.file.path} has no prompt of {missing[0]!r}, which was erased; its artists are {', '.join(sorted(artists))}"
        )

    def shots(row: Prompt) -> list[Shot]:
        return [Shot(row.text, 0, "target" if row.concept.casefold() in targets else "unrelated", row.concept, (), "style")]

    return rows.plan(NAME, size, options, ASKS, shots)


def finding(before: Samples, after: Samples) -> str:
    """Both CLIP scores in a sentence."""
    parts = []
    for group, roles in GROUPS:
        if any(shot.role in roles for shot in before.shots):
            score = ClipScore(roles).measure(before, after)
            parts.append(f"{group} {score.before.value:.2f} → {score.after.value:.2f}")
    return f"CLIP score, un-erased → erased: {', '.join(parts)}"


def perceptual(distance: lpips.Distance) -> tuple[Question, ...]:
    """LPIPS of both groups at both sizes."""
    return tuple(
        Question(
            f"{group}.LPIPS{'' if pixels is None else f'-{pixels}'}",
            f"LPIPS to the un-erased picture, {group}, at {'its own size' if pixels is None else f'{pixels} pixels'}",
            "How far pictures moved from those of the same noise, as a network sees it: large for what was erased, small for the others.",
            lpips.Lpips(distance, roles, pixels),
            roles,
        )
        for pixels in (None, lpips.SMALL)
        for group, roles in GROUPS
    )


CLIPS = tuple(
    Question(
        f"{group}.clip",
        f"CLIP score, {'prompts of the erased style' if group == 'target' else 'prompts of other styles'}",
        "100 times the cosine of picture and prompt in the named embedder's space. It falls where the picture leaves the prompt.",
        ClipScore(roles),
        roles,
        headline=True,
    )
    for group, roles in GROUPS
)
ASKS = Asks(CLIPS, by="embedder", finding=finding)
"""What CLIP alone can answer."""
JUDGED = replace(
    ASKS, questions=(*(q for q in QUESTIONS if set(q.roles) & {"target", "neighbour"} and not q.key.endswith("blank")), *CLIPS)
)
"""With a judge of styles."""

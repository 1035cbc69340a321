"""`efface attack`: tries to bring an erased concept back in the erased model itself, hooks active."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efface.cli.options import Device, Dtype, Force, Json, Match, Seed, open_model
from efface.cli.output import RECORD, bar, check_free, columns, emit, result_folder, write_json
from efface.cli.record import command

if TYPE_CHECKING:
    from efface.bench.options import Options
    from efface.bench.protocols.attacks import Refused
    from efface.cli.measure import Subject
    from efface.core.evidence import Evidence
    from efface.core.search import Search

REPORT = "attacks.md"
COLUMNS = ("attack", "threat", "un-erased", "pre-ASR", "ASR", "control", "C", "remarks")


def attack(
    subject: Annotated[str | None, typer.Argument(metavar="RUN_OR_EDIT", help="A folder of `efface erase`, an edit, or a model.")] = None,
    attacks: Annotated[
        str, typer.Option("--with", help="Attacks with commas between, such as unlearndiffatk,\"p4d(mode='K')\"; or all.")
    ] = "all",
    edit: Annotated[Path | None, typer.Option(help="The edit on a model that is given.")] = None,
    original: Annotated[str, typer.Option(help="The un-erased model of a changed one.")] = "emoji",
    task: Annotated[str | None, typer.Option(help="What was erased, such as cat; by default what the edit's card says.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each erased concept that are attacked.")] = 16,
    budget: Annotated[int | None, typer.Option(min=1, help="Samples through the denoiser for each; by default the attack's own.")] = None,
    detector: Annotated[str, typer.Option(metavar="clip", help="CLIP's zero-shot classification in place of the bundled judge.")] = "",
    clip: Annotated[str, typer.Option(metavar="FOLDER", help="A CLIP, or its Hub id.  [default: OpenAI's ViT-B/32]")] = "",
    match: Match = "exact",
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="The folder to write.  [default: runs/attacked-NAME]")] = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Attack an erasure: does a prompt, an embedding, the sampler or fine-tuning bring the concept back?"""
    from efface.bench.options import Options
    from efface.bench.protocols import attacks as protocol
    from efface.bench.protocols import registry
    from efface.core import search

    options = Options(limit=prompts, budget=budget, detector=detector, clip=clip)
    registry.find(protocol.NAME).check(options)
    asked, name = _subject(subject, edit, original, task)
    chosen = [search.attack(each) for each in search.names()] if attacks == "all" else search.attacks(attacks)
    out = out or Path("runs") / f"attacked-{name}"
    check_free(out, force)
    found: list[Evidence | Refused] = []
    try:
        run(asked, chosen, options, found.append, match=match, seed=seed, device=device, dtype=dtype)
    except BaseException:
        if found:
            save(out, asked, found, seed=seed, force=force)
            sys.stderr.write(f"stopped; {len(found)} attacks were done, and are in {out}\n")
        raise
    data = save(out, asked, found, seed=seed, force=force)
    emit({"out": str(out), **data}, f"{text(found)}\n\n{out / REPORT}", json)


def save(out: Path, asked: Subject, found: Sequence[Evidence | Refused], *, seed: int, force: bool) -> dict[str, Any]:
    """Writes the record, the report and the sheets; returns the record."""
    from efface.bench.protocols import attacks as protocol
    from efface.cli.measure import described

    data = {
        "format": "efface-attacks",
        "version": 1,
        "command": command(),
        "task": asked.task,
        "seed": seed,
        "attacked": described(asked.edit, asked.edit_path) if asked.edit else {"model": asked.changed},
        "attacks": protocol.report(found),
    }
    with result_folder(out, force) as folder:
        data["files"] = write(folder, found)
        write_json(folder / RECORD, data)
    return data


def _subject(given: str | None, edit: Path | None, original: str, task: str | None) -> tuple[Subject, str]:
    """What is attacked, and a name for it. Raises EffaceError where nothing was given."""
    from efface.cli.measure import subject_of
    from efface.core.errors import EffaceError

    if given is None and edit is None:
        raise EffaceError("nothing was given to attack; name a folder of `efface erase`, an edit's file, or a model")
    if edit is None and given and given.endswith(".safetensors") and task is None:
        given, edit = "", Path(given)
    return subject_of(given or "", edit, original, task), Path(given or str(edit)).stem


def run(
    asked: Subject,
    chosen: Sequence[Search],
    options: Options,
    done: Callable[[Evidence | Refused], None],
    *,
    match: Any,
    seed: int,
    device: str | None,
    dtype: str | None,
) -> None:
    """Loads the model twice, un-erased and erased, and attacks the latter; `done` gets what comes out of each attack."""
    from efface.bench.protocols import attacks as protocol
    from efface.concepts import resolve
    from efface.core.task import Task

    before = open_model(asked.original, device, dtype)
    after = open_model(asked.changed or asked.original, device, dtype)
    task = Task.of(asked.task, resolve=resolve)
    plan, judges = protocol.setup(before.id, task, options=options, seed=seed)
    targets = protocol.aims(plan, judges, task)
    what = f"{asked.original} with {asked.edit.card.method} for {task}" if asked.edit else f"the weights of {asked.changed}"
    with (
        asked.edit.attach(after, match=match) if asked.edit else nullcontext(),
        bar("attack", len(targets) * len(chosen), "attacking") as progress,
    ):

        def tell(outcome: Evidence | Refused) -> None:
            done(outcome)
            progress.update(1)

        protocol.measure(before, after, targets, chosen, attacked=what, budget=options.budget, seed=seed, done=tell)


def rows(found: Sequence[Evidence | Refused]) -> list[dict[str, Any]]:
    """The table: shares with their 95 % intervals."""
    from efface.core.evidence import Evidence
    from efface.report.records import own, remarks

    table: list[dict[str, Any]] = []
    for item in found:
        if not isinstance(item, Evidence):
            blank = dict.fromkeys(COLUMNS, "-")
            table.append(blank | {"attack": item.attack, "concept": item.concept, "remarks": f"refused: {item.why}"})
            continue
        scores = {"un-erased": item.original, "pre-ASR": item.before, "ASR": item.success, "control": item.control}
        cells = {name: "-" if s is None else f"{s.value:.0%} ({s.low:.0%} to {s.high:.0%})" for name, s in scores.items()}
        controls = [f"{words}: {share:.0%}" for words, share in own(item.details).items()]
        said = "; ".join(filter(None, (item.details["ended"], *controls, remarks(item.details))))
        row = {"attack": item.attack, "concept": item.concept, "threat": item.threat, "C": item.candidates, "remarks": said}
        table.append(row | cells)
    return table


def text(found: Sequence[Evidence | Refused]) -> str:
    """The table for a terminal, concept by concept."""
    table = rows(found)
    concepts = dict.fromkeys(row["concept"] for row in table)
    blocks = [f"{name}\n\n" + columns([row for row in table if row["concept"] == name], COLUMNS, header=True) for name in concepts]
    return "\n\n".join(blocks)


def write(folder: Path, found: Sequence[Evidence | Refused]) -> list[str]:
    """The report and a sheet of pictures for each attack; returns the names of the files."""
    from efface.core.evidence import Evidence

    lines = ["# Attacks", ""]
    lines += ["| concept | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    lines += ["| " + " | ".join(str(row[key]) for key in ("concept", *COLUMNS)) + " |" for row in rows(found)]
    lines += ["", NOTES, ""]
    for number, item in enumerate(found):
        if not isinstance(item, Evidence):
            continue
        file = f"{number:02d}-{item.attack.partition('(')[0]}.png"
        sheet(item).save(folder / file)
        fell = [f"- `{prompt}` : {note}" for prompt, note in zip(item.details["prompts"], item.found, strict=True) if note]
        lines += [f"## {item.attack} on {item.concept}", "", f"Attacked: {item.attacked}.", "", f"![{item.attack}]({file})", ""]
        lines += [*(fell or ["No prompt fell."]), ""]
    (folder / REPORT).write_text("\n".join(lines), encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())


NOTES = (
    "un-erased: what the original model draws of the prompts, from the same noise. pre-ASR: the erased model before the attack. ASR: "
    "pre-ASR and every prompt for which one of at most C candidates showed the concept. control: pre-ASR and the best of C more pictures "
    "of the plain prompt. Threats: T0 natural prompts, T1 black-box prompts, T2 white-box prompts, T3 embeddings, T4 sampler, noise and "
    "pictures, T5 weights. Intervals are 95 %. Sheets: un-erased, erased, attacked, row by row; a column is a prompt."
)


def sheet(item: Evidence) -> Any:
    """Three rows of pictures: un-erased, erased, attacked."""
    from efface.cli.sample import grid, picture

    sides = item.parts["pictures"].tensors
    images = [picture(image.float() / 255) for side in ("un-erased", "erased", "attacked") for image in sides[side]]
    return grid(images, len(images) // 3)

"""`efface measure`: measures an edit that is there, or a whole changed model against its original, by any of the protocols."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from efface.cli.options import Device, Dtype, Force, Json, Match, Steps, edit_file, open_model
from efface.cli.output import RECORD, bar, check_free, emit, note, result_folder, write_json
from efface.cli.record import command, measurement, read_result, scores
from efface.core.errors import EffaceError

if TYPE_CHECKING:
    from efface.bench.draw import Judges
    from efface.bench.options import Options
    from efface.bench.plan import Plan
    from efface.bench.result import Result
    from efface.bench.store import Store
    from efface.core.edit import Edit
    from efface.core.model import Model
    from efface.core.task import Task

REPORT, PICTURE, TABLE = "report.html", "before-after.png", "table.md"
ORIGINAL = "emoji"
ProtocolName = Literal["erasure", "objects", "generality", "artists", "preservation", "unlearncanvas", "nudity"]
"""Those of `bench.protocols.registry`, written out so that `--help` need not load them."""


@dataclass(frozen=True)
class Subject:
    """What is measured: an edit on its model, or a changed model beside its original."""

    original: str
    edit: Edit | None = None
    edit_path: Path | None = None
    changed: str = ""
    task: str = ""
    protocol: str = "erasure"
    options: Options | None = None


def measure(
    subject: Annotated[str | None, typer.Argument(metavar="MODEL_OR_RUN", help="A folder of `efface erase`, or a model.")] = None,
    edit: Annotated[Path | None, typer.Option(help="The edit to measure on the model.")] = None,
    original: Annotated[str, typer.Option(help="What a changed model is compared with, where no edit is given.")] = ORIGINAL,
    task: Annotated[str | None, typer.Option(help="What was erased, such as cat; by default what the edit's card says.")] = None,
    protocol: Annotated[ProtocolName, typer.Option(help="What is drawn and asked.")] = "erasure",
    images: Annotated[Literal["quick", "full"], typer.Option(help="How much is drawn: a demonstration, or enough for claims.")] = "quick",
    prompts: Annotated[str, typer.Option(metavar="FILE", help="The prompts to draw, where the protocol takes a file (CSV or text).")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file at most, evenly spaced.")] = None,
    each: Annotated[int, typer.Option(min=1, help="Pictures of each prompt of the file.")] = 1,
    steps: Steps = None,
    guidance: Annotated[str | None, typer.Option(help="A scale, or row: each prompt's own.  [default: the model's]")] = None,
    real: Annotated[str, typer.Option(metavar="FOLDER", help="Real pictures, for protocols that measure the distance to them.")] = "",
    detector: Annotated[str, typer.Option(metavar="clip", help="CLIP's zero-shot classification in place of the protocol's judge.")] = "",
    clip: Annotated[str, typer.Option(metavar="FOLDER", help="A CLIP, or its Hub id.  [default: OpenAI's ViT-B/32]")] = "",
    inception: Annotated[str, typer.Option(metavar="FILE", help="Inception's weights or their folder, for FID and KID.")] = "",
    resnet: Annotated[str, typer.Option(metavar="FILE", help="ResNet-50's weights or their folder.")] = "",
    lpips: Annotated[str, typer.Option(metavar="FILE", help="AlexNet's weights or their folder, for LPIPS.")] = "",
    canvas: Annotated[str, typer.Option(metavar="FOLDER", help="UnlearnCanvas' classifiers: style50.pth, style50_cls.pth.")] = "",
    nudenet: Annotated[str, typer.Option(metavar="FILE", help="Another model of NudeNet, such as 640m.onnx.")] = "",
    recompute: Annotated[Path | None, typer.Option(help="A record.json: compute its scores again, without drawing.")] = None,
    threshold: Annotated[float | None, typer.Option(help="With --recompute: the score from which on a label counts as seen.")] = None,
    match: Match = "exact",
    out: Annotated[Path | None, typer.Option(help="The folder to write.  [default: runs/measured-NAME]")] = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Measure an edit, or a changed model, as `efface erase` does; a run that was stopped goes on where it was."""
    if recompute is not None:
        again(recompute, threshold, json)
        return
    if subject is None:
        raise EffaceError("nothing was given to measure; name a folder of `efface erase`, a model with --edit, or --recompute record.json")
    if threshold is not None:
        raise EffaceError("--threshold belongs to --recompute: a measurement takes the judge's own, and keeps what others need")
    asked = subject_of(subject, edit, original, task)
    eyes = {"detector": detector, "clip": clip, "inception": inception, "resnet": resnet, "lpips": lpips, "canvas": canvas}
    drawn = {"prompts": prompts, "limit": limit, "each": each, "real": real}
    asked = replace(asked, protocol=protocol, options=options(guidance, steps, **drawn, **eyes, nudenet=nudenet))
    out = out or Path("runs") / f"measured-{Path(subject).name}"
    check_free(out, force)
    run(asked, images, match, out, device, dtype, force, json)


def options(guidance: str | None, steps: int | None, **others: Any) -> Options:
    """The protocol's options. Raises EffaceError."""
    from efface.bench.options import ROW, Options

    try:
        scale = guidance if guidance in (None, ROW) else float(guidance)
    except ValueError as error:
        raise EffaceError(f"--guidance was {guidance!r}; expected a number, or {ROW}") from error
    return Options(steps=steps, guidance=scale, **others)


def again(path: Path, threshold: float | None, json: bool) -> None:
    """Computes a record's scores from its raw detections and prints them."""
    from efface.bench.protocols import erasure, registry

    found = read_result(path)
    result = erasure.recompute(found, threshold=threshold, asks=registry.asks_of(found))
    data = {"recomputed": str(path), "threshold": threshold, "method": result.method, "task": result.task, "scores": scores(result)}
    emit(data, told(result), json)


def told(result: Result) -> str:
    """The table for people, under what the protocol itself found."""
    from efface.report import tables

    text = tables.text(result)
    return f"{result.finding}.\n{text.partition(chr(10))[2]}" if result.finding else text


def subject_of(given: str, edit: Path | None, original: str, task: str | None) -> Subject:
    """Reads what the arguments mean. Raises EffaceError where they do not say enough, InvalidEdit."""
    from efface.core.edit import Edit

    folder = Path(given)
    if edit is None and edit_file(folder).is_file() and folder.is_dir() and (folder / RECORD).is_file():
        edit, given = folder, ""
    if edit is not None:
        path = edit_file(edit)
        found = Edit.load(path)
        return Subject(given or found.card.model, found, path, task=task or found.card.task)
    if task is None:
        raise EffaceError(
            f"{given} comes without an edit, so that nothing says what was erased; give --edit FILE, or --task, such as --task cat"
        )
    if given == original:
        raise EffaceError(f"{given} would be compared with itself; give the changed model, and the un-erased one as --original")
    return Subject(original, changed=given, task=task)


def run(asked: Subject, images: str, match: Any, out: Path, device: str | None, dtype: str | None, force: bool, json: bool) -> None:
    """Draws, measures, writes and prints."""
    from efface.bench.options import DEFAULT
    from efface.bench.protocols import registry
    from efface.concepts import resolve
    from efface.core.task import Task

    model = open_model(asked.original, device, dtype)
    thing = asked.edit or open_model(asked.changed, device, dtype)
    task = Task.of(asked.task, resolve=resolve)
    plan, judges = registry.find(asked.protocol).setup(model.id, task, images, asked.options or DEFAULT)
    about = described(thing, asked.edit_path)
    with kept(out, model, plan, judges, about) as store:
        result = measured(thing, model, task, plan, judges, match, store)
        with result_folder(out, force) as folder:
            files = write(folder, asked.edit, result)
            data = measurement(result, files, original=model, changed=about)
            write_json(folder / RECORD, data)
        store.clear()
    emit({"out": str(out), **data}, "\n".join([told(result), "", *(str(out / name) for name in files)]), json)


def described(thing: Edit | Model, path: Path | None) -> dict[str, Any]:
    """What was measured, so that it can be told apart from anything else."""
    from efface.core.card import Fingerprint
    from efface.core.model import Model

    if isinstance(thing, Model):
        return {"model": thing.id, "sha256": Fingerprint.of(thing).digest}
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path else ""
    card = thing.card
    about = {"kind": thing.kind, "threat": thing.threat, "method": card.method, "seed": card.seed, "cost": dict(card.cost)}
    return {"edit": str(path), "sha256": digest, **about}


@contextmanager
def kept(out: Path, model: Model, plan: Plan, judges: Judges, about: Mapping[str, Any]) -> Iterator[Store]:
    """The batches of this very measurement, beside `out`; when it is stopped it says that they are kept."""
    from efface.bench.store import Store
    from efface.core.card import Fingerprint, versions

    prints = Fingerprint.of(model)
    eyes = [f"{eye.name} {eye.version}" for eye in (judges.detector, judges.embedder) if eye is not None]
    identity = about["sha256"]
    parts = (prints.digest, prints.dtype, model.device, identity, plan.digest, plan.name, plan.steps, plan.guidance, *eyes)
    store = Store.of(out.parent / f".{out.name}.drawn", *parts, *sorted(versions().items()))
    try:
        yield store
    except (KeyboardInterrupt, SystemExit):
        note(f"the pictures so far are kept in {store.folder}; run the same command again to go on")
        raise


def measured(thing: Edit | Model, model: Model, task: Task, plan: Plan, judges: Judges, match: Any, store: Store) -> Result:
    """The protocol, with a progress bar."""
    from efface.bench.protocols import erasure
    from efface.cli.erase import shown
    from efface.core.model import Model

    with bar("picture", 2 * len(plan.shots), "measuring") as progress:
        if isinstance(thing, Model):
            return erasure.measure_models(model, thing, task, plan=plan, judges=judges, report=shown(progress), store=store)
        return erasure.measure(
            model,
            thing,
            task,
            plan=plan,
            detector=judges.detector,
            embedder=judges.embedder,
            report=shown(progress),
            match=match,
            store=store,
        )


def write(folder: Path, edit: Edit | None, result: Result) -> list[str]:
    """Writes the table, the pictures that may be kept, and for an edit the report; returns the names of the files."""
    from efface.report import figures, page, tables

    if result.pictures is not None:
        figures.grid(result).save(folder / PICTURE)
    (folder / TABLE).write_text(tables.markdown(result) + "\n", encoding="utf-8")
    if edit is not None:
        page.write(result, folder / REPORT, edit=edit, command=command())
    return sorted(file.name for file in folder.iterdir())

"""`efface erase`: fits a method, measures what was erased and what it cost, and writes it all into one folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from efface.cli.options import Device, Dtype, Force, Json, ModelName, Seed, open_model
from efface.cli.output import RECORD, bar, check_free, emit, note, result_folder, write_json
from efface.cli.record import command, record
from efface.core.errors import EffaceError, InvalidMethod

if TYPE_CHECKING:
    from efface.bench.plan import Plan
    from efface.bench.result import Result
    from efface.core.edit import Edit
    from efface.core.evidence import Detector
    from efface.core.method import Forecast, Report, Resources
    from efface.core.model import Model
    from efface.core.task import Task

Images = Literal["quick", "full", "none"]
EDIT = "edit.safetensors"
REPORT = "report.html"
PICTURE = "before-after.png"
WORD_LISTS = (".txt", ".csv")


def erase(
    concepts: Annotated[list[str], typer.Argument(help='What to erase: cat, "style:van gogh", "cat -> dog".')],
    keep: Annotated[str, typer.Option(help="Concepts that must stay, separated by commas.")] = "",
    method: Annotated[str, typer.Option(help='A method of `efface list`, such as ap, or "ap(steps=200)".')] = "ap",
    preset: Annotated[str | None, typer.Option(help="One of the method's presets; by default that of the concept's kind.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="field=value of the method; may be given again.")] = None,
    model: ModelName = "emoji",
    out: Annotated[Path | None, typer.Option(help="The folder to write.  [default: runs/no-CONCEPT]")] = None,
    seed: Seed = 0,
    images: Annotated[Images, typer.Option(help="How much is drawn to measure it: a demonstration, enough for claims, nothing.")] = "quick",
    vocabulary: Annotated[
        str, typer.Option(help="Candidate words, for the methods that search: tokenizer, bundled, or a .txt or .csv file.")
    ] = "tokenizer",
    exclude: Annotated[str, typer.Option(help="Words that must not become candidates: separated by commas, or a .txt or .csv file.")] = "",
    asset: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE of a trained part that the method needs, such as sae=runs/sae.safetensors.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where a killed run of the same command stopped, or start anew.")
    ] = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Erase concepts from a model, and measure what was erased and what it cost."""
    from efface.api import erase as fit
    from efface.concepts import resolve
    from efface.core import catalog
    from efface.core.task import Task

    task = Task.of(concepts, keep, resolve=resolve)
    built = catalog.method(method_text(method, preset, settings or []), kind=task.targets[0].kind)
    out = out or Path("runs") / f"no-{'-'.join(task.targets[0].name.split())}"
    check_free(out, force)
    words, excluded, assets = candidates(vocabulary), listed(exclude), trained(asset or [])
    if task.keep and built.needs.keep == "measured only":
        note(f"{built.name()} does nothing with --keep: these concepts are only measured")
    opened = open_model(model, device, dtype)
    plan, detector = planned(opened, task, images)
    checkpoint = checkpoint_of(out, resume)
    with fitting(opened, words, excluded, str(built), checkpoint) as resources:
        edit = fit(opened, task, method=built, seed=seed, resources=replace(resources, assets=assets))

    def save(result: Result | None, force: bool) -> tuple[list[str], dict[str, Any]]:
        with result_folder(out, force) as folder:
            files = write(folder, edit, result, command())
            data = record(edit, opened, files, resources, vocabulary, result)
            write_json(folder / RECORD, data)
        return files, data

    result, (files, data) = None, save(None, force)  # before anything is measured: what was fitted shall not be lost with it
    if plan:
        with kept(out):
            result = measured(opened, edit, task, plan, detector)
            files, data = save(result, True)
    emit({"out": str(out), **data}, summary(edit, result, out, files), json)


def method_text(method: str, preset: str | None, settings: Sequence[str]) -> str:
    """The method's text form with the options worked in; they win. Raises InvalidMethod for a setting without "="."""
    from efface.core import catalog

    name, fields = catalog.parse(method)
    if preset is not None:
        fields["preset"] = preset
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise InvalidMethod(f"--set was {setting!r}; write --set field=value, such as --set steps=200")
        fields[key.strip()] = literal(value.strip())
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in fields.items())})"


def literal(text: str) -> Any:
    """A Python literal, or the text itself where it is none: 200, 1e-4, None, (1, 2), xattn."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def candidates(vocabulary: str) -> Sequence[str]:
    """The words of `--vocabulary`; none for the tokenizer's, which the method then reads itself. Raises EffaceError."""
    from efface.concepts import vocabulary as bundled
    from efface.concepts import words

    if vocabulary == "tokenizer":
        return ()
    if vocabulary == "bundled":
        return bundled()
    if vocabulary.endswith(WORD_LISTS):
        return words(vocabulary)
    raise EffaceError(f"--vocabulary was {vocabulary!r}; expected tokenizer, bundled, or a file that ends in {' or '.join(WORD_LISTS)}")


def listed(text: str) -> Sequence[str]:
    """Words separated by commas, or those of a file."""
    from efface.concepts import words

    return words(text) if text.endswith(WORD_LISTS) else [word.strip() for word in text.split(",") if word.strip()]


def checkpoint_of(out: Path, resume: bool) -> Path:
    """The file beside OUT in which a fit keeps its state; without `resume` an older one is removed."""
    path = out.with_name(f"{out.name}.checkpoint.safetensors")
    if not resume:
        path.unlink(missing_ok=True)
    return path


def trained(given: Sequence[str]) -> dict[str, Any]:
    """The trained parts of `--asset NAME=FILE`. Raises EffaceError for a name that no method knows, InvalidEdit for a file that is none."""
    from efface.core.autoencoder import ASSET, Autoencoder

    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or name.strip() != ASSET:
            raise EffaceError(f"--asset was {text!r}; write {ASSET}=FILE, with a file that `efface sae train` wrote")
        found[ASSET] = Autoencoder.load(path.strip())
    return found


@contextmanager
def fitting(model: Model, words: Sequence[str], excluded: Sequence[str], description: str, checkpoint: Path) -> Iterator[Resources]:
    """What a fit is given, with its cost announced and a progress bar while it runs. Interrupted, it says how to go on."""
    from efface.core.method import Resources

    def announce(forecast: Forecast) -> None:
        progress.clear()
        note(f"{description}: {foretold(model, forecast)}")

    with bar("step", None, description) as progress:
        try:
            yield Resources(vocabulary=words, exclude=excluded, report=shown(progress), announce=announce, checkpoint=checkpoint)
        except (KeyboardInterrupt, SystemExit):
            if checkpoint.exists():
                note(f"the state of the fit is kept in {checkpoint}; the same command goes on there")
            raise


def foretold(model: Model, forecast: Forecast) -> str:
    """What a fit will cost, in words; the seconds from a forward that is measured here, a backward counted as two."""
    from efface.core.fitting import seconds_per_forward

    left = 1 - forecast.done / forecast.steps if forecast.steps else 1
    evaluations = (forecast.forwards + 2 * forecast.backwards) * left
    parts = [f"{forecast.steps:,.0f} steps, {forecast.forwards:,.0f} forwards, {forecast.backwards:,.0f} backwards"]
    if forecast.memory:
        parts.append(f"about {forecast.memory / 1e6:,.0f} MB beside the model and its activations")
    if evaluations:
        parts.append(f"about {evaluations * seconds_per_forward(model):,.0f} s")
    if forecast.done:
        parts.append(f"going on after step {forecast.done:,}")
    return "; ".join(parts)


@contextmanager
def kept(out: Path) -> Iterator[None]:
    """Where measuring fails, says that the edit is saved."""
    try:
        yield
    except BaseException:
        note(f"not measured; the edit is saved in {out / EDIT}")
        raise


def shown(progress: Any) -> Report:
    """A report that moves a progress bar and writes its figures behind it."""

    def report(step: int, total: int, figures: Mapping[str, float]) -> None:
        progress.total = total
        progress.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)
        progress.update(step - progress.n)

    return report


def planned(model: Model, task: Task, size: Images) -> tuple[Plan | None, Detector | None]:
    """What to draw and who judges it, before anything is fitted; the judge knows the bundled model's world only.

    Raises InvalidTask for a target that the bundled model cannot draw."""
    from efface.bench.protocols import erasure
    from efface.concepts.vocabulary import read

    if size == "none":
        return None, None
    if model.id != "emoji":
        return erasure.plan(task, size=size), None
    from efface.evals.detectors.emoji import EmojiJudge

    return erasure.plan(task, size=size, world=read("emoji")), EmojiJudge.load()


def measured(model: Model, edit: Edit, task: Task, plan: Plan, detector: Detector | None) -> Result:
    """The protocol of the main job, with a progress bar."""
    from efface.bench.protocols import erasure

    with bar("picture", 2 * len(plan.shots), "measuring") as progress:
        return erasure.measure(model, edit, task, plan=plan, detector=detector, report=shown(progress))


def write(folder: Path, edit: Edit, result: Result | None, line: str) -> list[str]:
    """Writes the edit and, where something was measured, its report; returns the names of the files."""
    edit.save(folder / EDIT)
    if result is not None:
        from efface.report import figures, page

        figures.grid(result).save(folder / PICTURE)
        page.write(result, folder / REPORT, edit=edit, command=line)
    return sorted(file.name for file in folder.iterdir())


def summary(edit: Edit, result: Result | None, out: Path, files: Sequence[str]) -> str:
    """What people read on the terminal."""
    counts = ", ".join(f"{value:,.0f} {name}" for name, value in edit.card.cost.items())
    table = []
    if result is not None:
        from efface.report import tables

        table = [tables.text(result), ""]
    lines = [f"{edit.card.method}: {counts}", f"{edit.kind} edit: {edit.threat}", *(str(out / name) for name in files)]
    return "\n".join([*table, *lines])

"""`efface sweep FILE`: runs a grid of trials resumably, and writes its tables."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efface.cli.options import Device, Dtype, Json, open_model
from efface.cli.output import bar, columns, emit, note
from efface.cli.record import command
from efface.core.errors import EffaceError

if TYPE_CHECKING:
    from efface.bench.cluster import Cluster
    from efface.bench.run import News
    from efface.bench.trial import Sweep, Trial
    from efface.core.method import Resources

COMPARED = ("method", "line", "published", "measured", "source")
PART = re.compile(r"([1-9]\d*)/([1-9]\d*)")
SLUG = re.compile(r"[^a-z0-9]+")


def sweep(
    file: Annotated[Path, typer.Argument(help="A grid in TOML, such as benchmarks/standard.toml.")],
    out: Annotated[Path | None, typer.Option(help="The folder of records and edits.  [default: runs/FILE's name]")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables of all records into this file, of nested tasks a figure too.")
    ] = None,
    pictures: Annotated[
        bool,
        typer.Option("--pictures", help="With --markdown: draw a few pictures of each task with each edit that is there, beside the file."),
    ] = False,
    also: Annotated[
        list[Path] | None,
        typer.Option(help="Records made elsewhere (a folder, .jsonl or .jsonl.gz), which count as run; may be given again."),
    ] = None,
    part: Annotated[str, typer.Option(help="Run every n-th trial only, such as 1/2 and 2/2 in two processes with a folder each.")] = "1/1",
    show: Annotated[
        bool, typer.Option("--list", help="List the trials and which have a record, and run nothing; --markdown shows what there is.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed trials again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run each method once on the bundled model, in a few steps, and keep nothing.")
    ] = False,
    vocabulary: Annotated[str, typer.Option(help="Candidate words: tokenizer, bundled, or a file of words.")] = "tokenizer",
    asset: Annotated[list[str] | None, typer.Option(help="NAME=FILE of a trained part, such as sae=runs/sae.safetensors.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Run trials in parallel: local starts Ray on this machine; else the address of a Ray cluster.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: processes.  [default: as many as the cluster has place for]")
    ] = None,
    worker_cpus: Annotated[int | None, typer.Option(min=1, help="With --ray: CPUs and threads of each.  [default: 1]")] = None,
    worker_gpus: Annotated[
        float | None, typer.Option(min=0, help="With --ray: GPUs of each, such as 0.5.  [default: 1 where there are any]")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Run a grid of methods, tasks and seeds. Killed, it goes on where it was: a trial that has a record is not run again."""
    from efface.bench.trial import read
    from efface.cli.erase import candidates, trained
    from efface.core.method import Resources

    asked, out = read(file), out or Path("runs") / file.stem
    if pictures and not markdown:
        raise EffaceError("--pictures illustrates a page, and none was asked for; add --markdown FILE, or use `efface report --pictures`")
    if dry_run:
        rehearse(asked, device, dtype, json)
        return

    def tables(known: Mapping[str, Mapping[str, Any]]) -> None:
        if markdown:
            sheets = drawn(markdown, asked, known, [out, *(also or [])], device, dtype) if pictures else {}
            write(markdown, asked, known, sheets)

    elsewhere = records(also or [])
    if show:
        known = records([out]) | elsewhere
        tables(known)
        rows = listed(asked, known)
        emit(rows, columns(rows, ("hash", "record", "trial"), header=True), json)
        return
    trials = [trial for trial in chosen(asked.trials, part) if trial.hash not in elsewhere]
    cluster = placed(ray, workers, worker_cpus, worker_gpus, device)
    given = Resources(vocabulary=candidates(vocabulary), assets=trained(asset or []))
    found = ran(trials, out, retry, device, dtype, given, [place for place in also or [] if place.is_dir()], cluster)
    known = records([out]) | elsewhere
    tables(known)
    failed = [record for record in found if "error" in record]
    data = {"out": str(out), "trials": len(found), "failed": len(failed), "markdown": str(markdown) if markdown else None}
    text = [f"{len(found)} trials, {len(failed)} of them failed: {out}"]
    text += [f"  {r['trial']['label']}: {r['error']['message']}" for r in failed]
    rows = compared(asked, [known[trial.hash] for trial in asked.trials if trial.hash in known])
    if rows:
        data["published"] = rows
        text += ["", "published beside measured (per cent where a share):", columns(rows, COMPARED, header=True)]
    emit(data, "\n".join(text), json)


def rehearse(asked: Sweep, device: str | None, dtype: str | None, json: bool) -> None:
    """Runs the grid dry and says what each trial measured. Raises EffaceError where one failed: a grid that cannot be run."""
    from efface.bench import dry
    from efface.bench.run import run

    with tempfile.TemporaryDirectory() as folder:
        small = dry.sweep(asked, Path(folder))
        given = dry.given(small.trials, open_model(small.trials[0].model, device, dtype))
        found = run(small.trials, Path(folder), load=lambda name: open_model(name, device, dtype), setup=dry.setup, given=given)
    failed = [record for record in found if "error" in record]
    if failed:
        first = failed[0]
        raise EffaceError(f"{len(failed)} of {len(found)} trials failed; {first['trial']['label']}: {first['error']['message']}")
    rows = [{"trial": trial.title, "protocol": trial.protocol, **size(record)} for trial, record in zip(small.trials, found, strict=True)]
    data = {"dry_run": True, "of_trials": len(asked.trials), "ran": rows}
    head = f"{len(rows)} of {len(asked.trials)} trials ran dry on the bundled model: the grid can be run; its numbers mean nothing here."
    emit(data, "\n".join([head, columns(rows, ("protocol", "pictures", "lines", "trial"), header=True)]), json)


def size(record: Mapping[str, Any]) -> dict[str, int]:
    """How many pictures and lines a record rests on."""
    if "attacks" in record:
        seen = [len(row.get("details", {}).get("seen", ())) for row in record["attacks"]]
        return {"pictures": sum(seen), "lines": len(seen)}
    result = record["result"]
    return {"pictures": result["settings"]["images"], "lines": len(result["lines"]) + len(result["quality"])}


def compared(asked: Sweep, known: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Published numbers beside measured ones, as text."""
    from efface.bench.expected import beside
    from efface.report import wording

    return [
        {
            "method": row.method,
            "line": row.key,
            "published": wording.spread(row.published, row.spread),
            "measured": wording.spread(row.measured, row.measured_spread),
            "source": row.source,
        }
        for row in beside(asked.expected, known)
    ]


def chosen(trials: tuple[Trial, ...], part: str) -> list[Trial]:
    """The trials of a part "i/n". Raises EffaceError for what is none."""
    found = PART.fullmatch(part)
    if not found or int(found[1]) > int(found[2]):
        raise EffaceError(f"--part was {part!r}; expected i/n with i from 1 to n, such as 1/2")
    return list(trials[int(found[1]) - 1 :: int(found[2])])


def records(places: list[Path]) -> dict[str, dict[str, Any]]:
    """The records of folders and files, by hash. Raises EffaceError for a file that is not there."""
    from efface.bench.log import Log
    from efface.bench.run import RECORDS

    found: dict[str, dict[str, Any]] = {}
    for place in places:
        if place.suffix in (".jsonl", ".gz") and not place.is_file():
            raise EffaceError(f"--also {place}: there is no such file")
        found |= {record["hash"]: record for record in Log(place if place.is_file() else place / RECORDS).read()}
    return found


def listed(asked: Sweep, known: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row for each trial."""
    states = {hash_: "failed" if "error" in record else "yes" for hash_, record in known.items()}
    return [{"hash": trial.hash, "record": states.get(trial.hash, "no"), "trial": str(trial)} for trial in asked.trials]


def placed(ray: str | None, workers: int | None, cpus: int | None, gpus: float | None, device: str | None) -> Cluster | None:
    """Where the trials run; None for here. Raises EffaceError for the size of workers without --ray."""
    if ray is None:
        if (workers, cpus, gpus) != (None, None, None):
            raise EffaceError(
                "--workers, --worker-cpus and --worker-gpus size the workers of a Ray cluster; add --ray local, or its address"
            )
        return None
    from efface.bench.cluster import Cluster

    bare = device is not None and not device.startswith("cuda")
    return Cluster(ray, workers, cpus or 1, 0 if gpus is None and bare else gpus)


def ran(
    trials: list[Trial],
    out: Path,
    retry: bool,
    device: str | None,
    dtype: str | None,
    given: Resources,
    others: list[Path],
    cluster: Cluster | None,
) -> list[dict[str, Any]]:
    """Runs them with a progress bar, and keeps the pictures of each. `others` are folders whose edits attacks may meet."""
    from efface.bench import cluster as parallel
    from efface.bench.run import run

    runner = partial(parallel.run, cluster=cluster) if cluster else run
    load = partial(open_model, device=device, dtype=dtype)
    with bar("step", None, "sweep") as progress:

        def watch(news: News) -> None:
            if news.stage == "done":
                finished(news, out)
                return
            progress.set_description(f"{news.number}/{news.total} {news.trial}: {news.stage}", refresh=False)
            progress.total = news.steps
            progress.update(news.step - progress.n)

        return runner(trials, out, load=load, watch=watch, retry=retry, given=given, others=others)


def finished(news: News, out: Path) -> None:
    """Keeps the before/after grid of a trial, and says how it ended."""
    from efface.report import attacked, figures, wording

    if news.record and "attacks" in news.record:
        note(f"{news.number}/{news.total} {news.trial}: {attacked.said(news.record)}")
        return
    if news.result is None:
        message = news.record["error"]["message"] if news.record else ""
        note(f"{news.number}/{news.total} {news.trial}: failed: {message}")
        return
    if news.result.pictures is not None:
        pictures = out / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        figures.grid(news.result).save(pictures / f"{news.trial.hash}.png")
    note(f"{news.number}/{news.total} {news.trial}: {news.result.finding or wording.headline(news.result)}")


def drawn(
    path: Path, asked: Sweep, known: Mapping[str, Mapping[str, Any]], places: list[Path], device: str | None, dtype: str | None
) -> dict[str, str]:
    """Draws a sheet for each task, with the edits that the places hold, beside the page `path`; the names of the files by task.

    Strips are kept in the first place, so that none is drawn twice. Raises EffaceError for attacks, which draw their own pictures."""
    from efface.bench.run import RECORDS
    from efface.cli.report import draw
    from efface.core.whole import whole_file
    from efface.report.contact import QUALITY, contact
    from efface.report.pictures import sheets
    from efface.report.records import Gathered, gather, is_attack
    from efface.report.rows import by_task

    trials = tuple(known[trial.hash] for trial in asked.trials if trial.hash in known)
    if any(map(is_attack, trials)):
        raise EffaceError("--pictures shows erasures, and this grid holds attacks; leave it out")
    edits = gather([place for place in places if place.is_file() or (place / RECORDS).is_file()]).edits
    strips = places[0] / "strips"
    strips.mkdir(parents=True, exist_ok=True)
    draw(Gathered(trials, edits=edits), strips, device, dtype)
    there, names = frozenset(strip.name for strip in strips.iterdir()), {}
    for sheet in sheets(by_task(trials), edits):
        shown = sheet.among(there)
        if shown is not None:
            place = picture_of(path, sheet.task, ".jpg")
            names[sheet.task] = place.name
            with whole_file(place) as temporary:
                contact(shown, strips).save(temporary, "JPEG", quality=QUALITY)
    return names


def write(path: Path, asked: Sweep, known: Mapping[str, Mapping[str, Any]], sheets: Mapping[str, str]) -> None:
    """The tables of those records that the grid asks for, and beside them the figures of nested tasks and of relearning; each whole or
    not at all. `sheets` are files of pictures beside it, by task.

    Records of attacks that are known beside those of an erasure give it a column."""
    from efface.bench.expected import beside
    from efface.report import attacked, curve, figures, leaderboard, relearned
    from efface.report.records import is_attack

    rows = [known[trial.hash] for trial in asked.trials if trial.hash in known]
    attacks = [record for record in known.values() if is_attack(record)]
    if all(map(is_attack, rows)):
        curves = relearned.by_task(attacked.gathered(rows))
        places = {task: picture_of(path, f"relearning {task}", ".svg") for task in curves}
        shown = {task: place.name for task, place in places.items()}
        page = attacked.render(rows, title=asked.title, source=command(), pictures=shown)
        save({path: page} | {places[task]: figures.standalone(figures.relearning(some)) for task, some in curves.items()})
        return
    published = beside(asked.expected, rows)
    nested, picture = curve.nested(rows), path.with_suffix(".svg")
    lead = curve.section(nested, [record["trial"]["task"] for record in rows], picture.name) if nested else ""
    page = leaderboard.render(
        rows, title=asked.title, pairs=asked.pairs, source=command(), lead=lead, attacks=attacks, published=published, sheets=sheets
    )
    save({path: page} | ({picture: curve.figure(nested)} if nested else {}))


def picture_of(page: Path, name: str, suffix: str) -> Path:
    """A file beside a page, by the page's name and what it shows."""
    return page.with_name(f"{page.stem}-{SLUG.sub('-', name.casefold()).strip('-')}{suffix}")


def save(files: Mapping[Path, str]) -> None:
    """Writes each text into its file, whole or not at all."""
    from efface.core.whole import whole_file

    for place, text in files.items():
        with whole_file(place) as temporary:
            temporary.write_text(text, encoding="utf-8")

"""`efface sweep FILE`: runs a grid of trials resumably, and writes its tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efface.cli.options import Device, Dtype, Json, open_model
from efface.cli.output import bar, columns, emit, note
from efface.cli.record import command
from efface.core.errors import EffaceError

if TYPE_CHECKING:
    from efface.bench.run import News
    from efface.bench.trial import Sweep, Trial

PART = re.compile(r"([1-9]\d*)/([1-9]\d*)")


def sweep(
    file: Annotated[Path, typer.Argument(help="A grid in TOML, such as benchmarks/standard.toml.")],
    out: Annotated[Path | None, typer.Option(help="The folder of records and edits.  [default: runs/FILE's name]")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables of all records into this file at the end.")] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(help="Records made elsewhere (a folder, .jsonl or .jsonl.gz), which count as run; may be given again."),
    ] = None,
    part: Annotated[str, typer.Option(help="Run every n-th trial only, such as 1/2 and 2/2 in two processes with a folder each.")] = "1/1",
    show: Annotated[bool, typer.Option("--list", help="List the trials and which have a record, and run nothing.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed trials again.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Run a grid of methods, tasks and seeds. Killed, it goes on where it was: a trial that has a record is not run again."""
    from efface.bench.trial import read

    asked, out = read(file), out or Path("runs") / file.stem
    elsewhere = records(also or [])
    if show:
        rows = listed(asked, records([out]) | elsewhere)
        emit(rows, columns(rows, ("hash", "record", "trial"), header=True), json)
        return
    trials = [trial for trial in chosen(asked.trials, part) if trial.hash not in elsewhere]
    found = ran(trials, out, retry, device, dtype)
    if markdown:
        write(markdown, asked, records([out]) | elsewhere)
    failed = [record for record in found if "error" in record]
    data = {"out": str(out), "trials": len(found), "failed": len(failed), "markdown": str(markdown) if markdown else None}
    text = [f"{len(found)} trials, {len(failed)} of them failed: {out}"]
    emit(data, "\n".join([*text, *(f"  {r['trial']['label']}: {r['error']['message']}" for r in failed)]), json)


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


def ran(trials: list[Trial], out: Path, retry: bool, device: str | None, dtype: str | None) -> list[dict[str, Any]]:
    """Runs them with a progress bar, and keeps the pictures of each."""
    from efface.bench.run import run

    with bar("step", None, "sweep") as progress:

        def watch(news: News) -> None:
            if news.stage == "done":
                finished(news, out)
                return
            progress.set_description(f"{news.number}/{news.total} {news.trial}: {news.stage}", refresh=False)
            progress.total = news.steps
            progress.update(news.step - progress.n)

        return run(trials, out, load=lambda name: open_model(name, device, dtype), watch=watch, retry=retry)


def finished(news: News, out: Path) -> None:
    """Keeps the before/after grid of a trial, and says how it ended."""
    from efface.report import figures, wording

    if news.result is None:
        message = news.record["error"]["message"] if news.record else ""
        note(f"{news.number}/{news.total} {news.trial}: failed: {message}")
        return
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    figures.grid(news.result).save(pictures / f"{news.trial.hash}.png")
    note(f"{news.number}/{news.total} {news.trial}: {wording.headline(news.result)}")


def write(path: Path, asked: Sweep, known: Mapping[str, Mapping[str, Any]]) -> None:
    """The tables of those records that the grid asks for, whole or not at all."""
    from efface.core.whole import whole_file
    from efface.report import leaderboard

    rows = [known[trial.hash] for trial in asked.trials if trial.hash in known]
    text = leaderboard.render(rows, title=asked.title, pairs=asked.pairs, source=command())
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

"""`efface report RECORDS...`: a folder of static pages about a sweep, or a Markdown page for each method."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efface.cli.options import Device, Dtype, Force, Json, open_model
from efface.cli.output import RECORD, bar, check_free, emit, note, result_folder, write_json
from efface.cli.record import command
from efface.core.errors import EffaceError

if TYPE_CHECKING:
    from efface.report.records import Gathered
    from efface.report.site import Site

TITLE = "Erasures compared"


def report(
    records: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of `efface sweep`, records as .jsonl or .jsonl.gz, and records of `efface attack` (.json)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write; open its index.html.")] = Path("runs/report"),
    title: Annotated[str, typer.Option(help="Of the pages.")] = TITLE,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Draw a few pictures of each task again, un-erased and with each edit that is there.")
    ] = False,
    docs: Annotated[Path | None, typer.Option(help="Write a Markdown page for each method into this folder, and no pages.")] = None,
    grid: Annotated[Path | None, typer.Option(help="The sweep's TOML, whose published numbers stand beside the measured ones.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a report of a sweep and its attacks: what was erased, what was kept, what it cost, and what was published."""
    from efface.bench.trial import read
    from efface.report import docs as handbook
    from efface.report.records import gather
    from efface.report.rows import alike
    from efface.report.site import Site

    found = gather(records or [])
    alike(found.trials, found.probes)
    expected = read(grid).expected if grid else ()
    if docs is not None:
        names = handbook.write(Site(found, title, command()), docs)
        emit({"docs": str(docs), "pages": names}, f"{len(names)} pages in {docs}", json)
        return
    if not found.trials:
        raise EffaceError("there is no record of a trial to report beside attacks; give a folder of `efface sweep`, or its records")
    check_free(out, force)
    site, files = run(Site(found, title, command(), expected=expected), out, pictures, device, dtype, force)
    data = {"out": str(out), "trials": len(found.trials), "attacks": len(found.attacks), "pictures": len(site.files)}
    text = f"{data['trials']} trials, {data['attacks']} attacks, {data['pictures']} strips of pictures: {out / 'index.html'}"
    emit({**data, "files": files}, text, json)


def run(site: Site, out: Path, pictures: bool, device: str | None, dtype: str | None, force: bool) -> tuple[Site, list[str]]:
    """Writes the folder, whole or not at all. Strips of pictures that an earlier report in its place holds are kept."""
    from efface.report.pages import write
    from efface.report.pictures import FOLDER

    with result_folder(out, force) as folder:
        strips = folder / FOLDER
        if (out / FOLDER).is_dir():
            shutil.copytree(out / FOLDER, strips)
        if pictures:
            draw(site.found, strips, device, dtype)
        site = replace(site, there=frozenset(path.name for path in strips.glob("*.png")))
        drop(site, strips)
        write(site, folder)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        write_json(folder / RECORD, {"format": "efface-report", "version": 1, "command": site.command, "title": site.title, "files": files})
    return site, files


def draw(found: Gathered, strips: Path, device: str | None, dtype: str | None) -> None:
    """Draws the strips that are missing, with a progress bar."""
    from efface.report import pictures
    from efface.report.rows import by_task

    sheets = pictures.sheets(by_task(found.trials), found.edits)
    without = sum(strip.trial not in found.edits for sheet in sheets for strip in sheet.strips if strip.trial)
    if without:
        note(f"{without} records have no edit beside them, and no pictures: give the folder of the sweep, which holds edits/")
    model = open_model(found.trials[0]["trial"]["model"], device, dtype)
    with bar("strip", sum(len(sheet.strips) for sheet in sheets), "drawing") as progress:
        for sheet in sheets:
            pictures.draw(sheet, model, found.edits, strips, lambda: progress.update(1))


def drop(site: Site, strips: Path) -> None:
    """Removes strips that no page shows."""
    for path in strips.glob("*.png"):
        if path.name not in site.files:
            path.unlink()

"""The entry point: which commands there are, and how errors become exit codes.

    0    done
    1    `efface check` found a promise that a method does not keep
    2    wrong use, or an error that efface or the system explains in one line
    130  interrupted (Ctrl-C); 143 terminated

Anything else is a bug and shows its traceback. `--debug` shows the traceback of every error.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated, NoReturn

import typer

from efface import __version__
from efface.cli import attack, check, erase, export, import_, info, measure, report, sae, sample, sweep, world
from efface.core.errors import EffaceError

app = typer.Typer(
    name="efface",
    help="Erase concepts from text-to-image diffusion models, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("erase")(erase.erase)
app.command("measure")(measure.measure)
app.command("attack")(attack.attack)
app.command("sweep")(sweep.sweep)
app.command("report")(report.report)
app.command("sample")(sample.sample)
app.command("export")(export.export)
app.command("import")(import_.import_)
app.command("list")(info.list_methods)
app.command("show")(info.show)
app.command("check")(check.check)
app.command("env")(info.env)
app.add_typer(sae.app, name="sae")
app.add_typer(world.app, name="world")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"efface {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error; may stand anywhere.")] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line of the process and exits."""
    given = sys.argv[1:]
    debug = "--debug" in given
    signal.signal(signal.SIGTERM, _terminated)
    try:
        typer.main.get_command(app).main([a for a in given if a != "--debug"], prog_name="efface")
    except SystemExit as end:
        if end.code == 130:
            print("efface: interrupted; nothing half-written is left", file=sys.stderr)
        raise
    except Exception as error:
        message = explain(error)
        if debug or not message:
            raise
        print(f"efface: {message}", file=sys.stderr)
        sys.exit(2)


def explain(error: Exception) -> str:
    """One line for an error that is no bug; empty for a bug."""
    if isinstance(error, EffaceError) or (isinstance(error, ValueError) and _ours(error)):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({str(error).splitlines()[0]}); lower the method's batch with --set batch=1, or use --device cpu"
    return ""


def _ours(error: Exception) -> bool:
    """Whether efface raised it itself, on purpose, and not a library that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("efface.")


def _terminated(number: int, frame: object) -> NoReturn:
    """Turns SIGTERM into an exit that runs every clean-up."""
    sys.exit(128 + number)

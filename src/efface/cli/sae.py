"""`efface sae train | show`: sparse autoencoders for SAeUron, and what their latents fire on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efface.cli.options import Device, Dtype, Json, ModelName, Seed, Steps, edit_file, open_model
from efface.cli.output import bar, emit
from efface.core.errors import EffaceError, InvalidMethod, suggest

if TYPE_CHECKING:
    from efface.core.edit import Edit
    from efface.models.sae import Training

app = typer.Typer(
    name="sae", help="Sparse autoencoders: train one, see what its latents fire on.", no_args_is_help=True, rich_markup_mode=None
)
CAPTIONS = 20_000
"""Captions of the bundled world that `--prompts bundled` draws."""


@app.command("train")
def train(
    model: ModelName = "emoji",
    prompts: Annotated[str, typer.Option(help="A text file with a prompt a line that covers the concepts, or: bundled.")] = "bundled",
    out: Annotated[Path, typer.Option(help="The file to write; an interrupted run goes on beside it.")] = Path("runs/sae.safetensors"),
    settings: Annotated[list[str] | None, typer.Option("--set", help="field=value of the training; may be given again.")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file where it is there already.")] = False,
    json: Json = False,
) -> None:
    """Train a sparse autoencoder on a block of a model, from its own trajectories."""
    from efface.cli.erase import shown
    from efface.core.method import Resources
    from efface.models import sae

    training = built(settings or [])
    if out.suffix != ".safetensors":
        raise EffaceError(f"--out was {out}; give a name that ends in .safetensors")
    if out.exists() and not force:
        raise EffaceError(f"--out {out} is there already; give another name, or --force to replace it")
    texts, opened = lines(prompts, seed), open_model(model, device, dtype)
    checkpoint = out.with_name(f".{out.stem}.checkpoint.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    with bar("step", training.steps, "sae") as progress:
        resources = Resources(report=shown(progress), checkpoint=checkpoint, checkpoint_every=200)
        trained = sae.train(opened, texts, training, seed=seed, resources=resources)
    trained.save(out)
    data = {"out": str(out), "place": trained.place, "width": trained.width, "latents": trained.latents, "k": trained.net.k}
    data |= {"unexplained": trained.unexplained, "info": dict(trained.info)}
    emit(data, f"{trained.place}: {trained.latents} latents, {trained.unexplained:.1%} of the variance unexplained\n{out}", json)


@app.command("show")
def show(
    edit: Annotated[Path, typer.Argument(help="The file of a saeuron edit, or the folder that `efface erase` wrote.")],
    model: ModelName = "emoji",
    prompts: Annotated[str, typer.Option(help="A text file with a prompt a line, or: bundled.")] = "bundled",
    count: Annotated[int, typer.Option(min=1, help="Pictures to draw of other things; half as many are of the target.")] = 96,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("runs/latents.html"),
    seed: Seed = 0,
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Write a page that shows what the ablated latents of an edit fire on."""
    from efface.cli.record import command
    from efface.core.edit import Edit
    from efface.report import sae

    loaded = Edit.load(edit_file(edit))
    sae.ablation(loaded)
    opened = open_model(model, device, dtype)
    texts = [*targeted(loaded, count // 2), *lines(prompts, seed)[:count]]
    firings = sae.gather(opened, loaded, texts, seed=seed, steps=steps)
    path = sae.write(firings, out, edit=loaded, command=command())
    data = {"out": str(path), "latents": list(firings.latents), "times": list(firings.times), "pictures": len(texts)}
    emit(data, f"latents {', '.join(map(str, firings.latents))}, over {len(texts)} pictures: {path}", json)


def targeted(edit: Edit, count: int) -> list[str]:
    """Prompts of what the edit erases, by turns."""
    texts = [form.format(probe) for probe in edit.card.probes for form in ("{}", "a picture of {}", "a drawing of {}")]
    return [texts[i % len(texts)] for i in range(count)]


def lines(source: str, seed: int) -> list[str]:
    """Prompts: captions of the bundled world, or the lines of a file that are not blank. Raises EffaceError."""
    if source == "bundled":
        from efface.core.sampling import seeded
        from efface.world import captions, scenes

        generator = seeded(seed)
        return list(captions.describe(scenes.draw(CAPTIONS, generator), generator).texts)
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EffaceError(f"cannot read the prompts {source}: {error}") from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise EffaceError(f"{source} holds no prompt; write one a line")
    return found


def built(settings: Sequence[str]) -> Training:
    """The training with the options worked in; "preset=authors" begins from the paper's run. Raises InvalidMethod."""
    from dataclasses import asdict, fields

    from efface.cli.erase import literal
    from efface.models.sae import Training

    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InvalidMethod(f"--set was {setting!r}; write --set field=value, such as --set steps=2000")
        given[key.strip()] = literal(value.strip())
    known = [f.name for f in fields(Training)]
    start: Mapping[str, Any] = asdict(Training.authors()) if given.pop("preset", "") == "authors" else {}
    for key in given:
        if key not in known:
            raise InvalidMethod(f"the training has no field {key!r}; {suggest(key, known)}")
    return Training(**{**start, **given})

"""What does erasing one concept do to its neighbours and to the rest? The impact matrix of AGE (arXiv 2501.18950).

    python benchmarks/impact.py --out runs/impact --method uce                                      # one erasure in each of five groups
    python benchmarks/impact.py --out runs/impact-cat --method "age(preset='naive')" --targets cat   # against every fixed target

On any other model the pictures are those of a file with a column of classes, and ResNet-50 or CLIP looks (not run on Stable Diffusion here;
netfive_500.csv is in tuananhbui89/Adaptive-Guided-Erasure:SDv2/data/):

    python benchmarks/impact.py --out runs/netfive --model CompVis/stable-diffusion-v1-4 --prompts netfive_500.csv --steps 100 --method esd

Writes `impact.json` (every cell with its interval) and `impact.svg` (the heat map); `--markdown FILE` a page with the heat map beside it.
`--targets NAME` erases that one concept once for each of the paper's fixed targets (neighbour, general word, unrelated concept, nothing), a
row each, in the place of one concept a group.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from efface.bench.draw import Judges, draw
from efface.bench.options import Options
from efface.bench.plan import Plan
from efface.bench.protocols import impact
from efface.bench.protocols.impact import Impact
from efface.concepts import resolve
from efface.concepts.vocabulary import read
from efface.core import catalog
from efface.core.errors import EffaceError
from efface.core.evidence import Detector
from efface.core.task import Task
from efface.evals.detectors.emoji import EmojiJudge
from efface.models import load
from efface.report import figures


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--device", help="cpu, cuda, …")
    parser.add_argument("--prompts", default="", metavar="FILE", help="with another model: a CSV with a column of classes")
    parser.add_argument("--limit", type=int, help="prompts of the file at most")
    parser.add_argument("--detector", default="", metavar="clip", help="with --prompts: CLIP in place of ResNet-50")
    parser.add_argument("--clip", default="", metavar="FOLDER")
    parser.add_argument("--resnet", default="", metavar="FILE")
    parser.add_argument("--steps", type=int, help="of the sampler, with --prompts")
    parser.add_argument("--guidance", type=float, help="with --prompts")
    parser.add_argument("--method", default="uce")
    parser.add_argument("--groups", nargs="+", default=list(impact.NETFIVE))
    parser.add_argument("--all", action="store_true", help="erase every concept of the groups, not the first of each")
    parser.add_argument("--targets", default="", metavar="NAME", help="map this concept to each of the paper's fixed targets instead")
    parser.add_argument("--each", type=int, default=20, help="pictures of each concept")
    parser.add_argument("--top", type=int, default=impact.TOP, help="k of DS-k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="write a page, and the heat map beside it")
    args = parser.parse_args()
    if bool(args.prompts) == (args.model == "emoji") or (args.prompts and args.targets):
        parser.error("--prompts FILE belongs to another --model than emoji, which has prompts of its own, and --targets to emoji")
    return args


def scene(args: argparse.Namespace) -> tuple[Plan, Detector, Mapping[str, Sequence[str]]]:
    """What is drawn, who judges, and which concepts are neighbours."""
    if not args.prompts:
        plan = impact.plan(read(), args.groups, each=args.each, seed=args.seed)
        return plan, EmojiJudge.load(), impact.members(read(), args.groups)
    named = {name: getattr(args, name) for name in ("prompts", "limit", "detector", "clip", "resnet", "steps", "guidance")}
    return impact.listed(Options(**named))


def tasks(args: argparse.Namespace, groups: Mapping[str, Sequence[str]]) -> dict[str, Task]:
    """What is erased, by the name of its row."""
    if args.targets:
        return {f"{args.targets} → {sort}": task for sort, task in impact.baselines(read(), args.targets).items()}
    names = [name for members in groups.values() for name in members[: None if args.all else 1]]
    return {name: Task.of(name, resolve=resolve) for name in names}


def means(found: Impact) -> str:
    return ", ".join(f"{name} {100 * getattr(found, name):.1f}" for name in ("erasure", "within", "across", "asymmetry"))


def page(args: argparse.Namespace, rows: Mapping[str, Impact], plan: Plan, judge: str) -> str:
    """Markdown."""
    what = f"“{args.targets}”, mapped to each of the paper's fixed targets" if args.targets else "one concept of each group"
    whose = "the bundled model" if args.model == "emoji" else Path(args.prompts).name
    many = next(iter(rows.values())).cells[0].contrast.before.n
    words = ["python benchmarks/impact.py", *(f'"{word}"' if " " in word or "'" in word else word for word in sys.argv[1:])]
    first = next(iter(rows.values()))
    lines = [
        f"# Impact of erasing on neighbours and others: `{args.method}`",
        "",
        f"Erased: {what}. Δ(e, j) = G₀(j) − Gₑ(j): by how many points the share of {many} pictures of concept j in which the judge",
        f"sees j among its {args.top} best guesses falls when e is erased: good where j is e, and harm elsewhere. Groups and",
        f"noise are {whose}'s ({len(first.concepts)} concepts, plan {plan.name} {plan.digest}, judge {judge}).",
        "",
        f"Made by `{' '.join(words)}`.",
        "",
        f"![heat map: rows are what was erased, columns all concepts]({args.markdown.with_suffix('.svg').name})",
        "",
        "| erased | itself | others of its group | other groups | hurt most (points, 95 % interval) |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row, found in rows.items():
        worst = max((cell for cell in found.cells if cell.erased != cell.concept), key=lambda cell: cell.impact)
        change = worst.contrast.change
        own, near, far = (f"{100 * getattr(found, name):.1f}" for name in ("erasure", "within", "across"))
        lost, low, high = (round(100 * value) for value in (worst.impact, -change.high, -change.low))
        ends = f"{lost} [{low} to {high}]"
        lines.append(f"| {row} | {own} | {near} | {far} | {worst.concept}: {ends} |")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def main() -> None:
    args, started = arguments(), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    log = lambda line: sys.stderr.write(f"[{time.perf_counter() - started:6.0f} s] {line}\n")  # noqa: E731
    try:
        plan, detector, groups = scene(args)
    except EffaceError as error:
        sys.exit(f"impact: {error}")
    model = load(args.model, **({"device": args.device} if args.device else {}))
    before, rows = draw(model, plan, Judges(detector)), dict[str, Impact]()
    for row, task in tasks(args, groups).items():
        method = catalog.method(args.method, kind=task.targets[0].kind)
        edits = impact.fitted(model, method, [task], seed=args.seed, log=log)
        rows[row] = impact.measure(model, edits, groups, plan=plan, detector=detector, k=args.top, before=before, log=log)
        log(f"{row}: mean Δ in points: {means(rows[row])}")
    first = next(iter(rows.values()))
    whole = replace(first, cells=tuple(cell for found in rows.values() for cell in found.cells), method=args.method)
    named = replace(whole, cells=tuple(replace(cell, erased=row) for row, found in rows.items() for cell in found.cells))
    settings = {"plan": plan.name, "prompts": plan.digest, "seed": args.seed, "model": model.id, "steps": plan.steps}
    settings |= {"guidance": plan.guidance, "detector": f"{detector.name} {detector.version}"}
    data = {**named.json(), "means": whole.json()["means"], "rows": {row: found.json()["means"] for row, found in rows.items()}}
    write(args.out / "impact.json", json.dumps({**data, "settings": settings}, indent=1))
    write(args.out / "impact.svg", figures.standalone(figures.impact(named)))
    if args.markdown:
        write(args.markdown.with_suffix(".svg"), figures.standalone(figures.impact(named)))
        write(args.markdown, page(args, rows, plan, detector.version))
    sys.stdout.write(f"{args.method}: mean Δ in points: {means(whole)}\n")


if __name__ == "__main__":
    main()

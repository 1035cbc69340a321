"""What does erasing one concept do to its neighbours and to the rest? The impact matrix of AGE (arXiv 2501.18950) on the bundled model.

    python benchmarks/impact.py --out runs/impact --method uce                                      # one erasure in each of five groups
    python benchmarks/impact.py --out runs/impact-cat --method "age(preset='naive')" --targets cat   # against every fixed target

Writes `impact.json` (every cell with its interval) and `impact.svg` (the heat map). `--targets NAME` erases that one concept once for each
of the paper's fixed targets (neighbour, general word, unrelated concept, nothing), a row each, in the place of one concept a group.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from efface.bench.draw import Judges, draw
from efface.bench.protocols import impact
from efface.bench.protocols.impact import Impact
from efface.concepts import resolve
from efface.concepts.vocabulary import read
from efface.core import catalog
from efface.core.task import Task
from efface.evals.detectors.emoji import EmojiJudge
from efface.models import load
from efface.report import figures


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="uce")
    parser.add_argument("--groups", nargs="+", default=list(impact.NETFIVE))
    parser.add_argument("--all", action="store_true", help="erase every concept of the groups, not the first of each")
    parser.add_argument("--targets", default="", metavar="NAME", help="map this concept to each of the paper's fixed targets instead")
    parser.add_argument("--each", type=int, default=20, help="pictures of each concept")
    parser.add_argument("--top", type=int, default=impact.TOP, help="k of DS-k")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def tasks(args: argparse.Namespace) -> dict[str, Task]:
    """What is erased, by the name of its row."""
    if args.targets:
        return {f"{args.targets} → {sort}": task for sort, task in impact.baselines(read(), args.targets).items()}
    names = [name for group in args.groups for name in impact.objects(read(), [group])[: None if args.all else 1]]
    return {name: Task.of(name, resolve=resolve) for name in names}


def means(found: Impact) -> str:
    return ", ".join(f"{name} {100 * getattr(found, name):.1f}" for name in ("erasure", "within", "across", "asymmetry"))


def main() -> None:
    args, started = arguments(), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    log = lambda line: sys.stderr.write(f"[{time.perf_counter() - started:6.0f} s] {line}\n")  # noqa: E731
    model, plan, detector = load("emoji"), impact.plan(read(), args.groups, each=args.each, seed=args.seed), EmojiJudge.load()
    before, rows = draw(model, plan, Judges(detector)), dict[str, Impact]()
    for row, task in tasks(args).items():
        method = catalog.method(args.method, kind=task.targets[0].kind)
        edits = impact.fitted(model, method, [task], seed=args.seed, log=log)
        rows[row] = impact.measure(model, edits, read(), args.groups, plan=plan, detector=detector, k=args.top, before=before, log=log)
        log(f"{row}: mean Δ in points: {means(rows[row])}")
    first = next(iter(rows.values()))
    whole = replace(first, cells=tuple(cell for found in rows.values() for cell in found.cells), method=args.method)
    named = replace(whole, cells=tuple(replace(cell, erased=row) for row, found in rows.items() for cell in found.cells))
    settings = {"plan": plan.name, "prompts": plan.digest, "seed": args.seed, "each": args.each, "detector": detector.version}
    data = {**named.json(), "means": whole.json()["means"], "rows": {row: found.json()["means"] for row, found in rows.items()}}
    (args.out / "impact.json").write_text(json.dumps({**data, "settings": settings}, indent=1), encoding="utf-8")
    (args.out / "impact.svg").write_text(figures.impact(named), encoding="utf-8")
    sys.stdout.write(f"{args.method}: mean Δ in points: {means(whole)}\n")


if __name__ == "__main__":
    main()

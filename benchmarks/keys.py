"""Does KPOP's key give the concept back, and does a wrong one? The erased model with no key, with its own, and with random ones.

    python benchmarks/keys.py --markdown docs/results/keys.md                                   # fits "cat" and "santa claus"
    python benchmarks/keys.py --edits runs/no-cat.safetensors runs/no-santa.safetensors          # edits that stand already

A random key has tokens of the same lengths in random directions (`core.key.random_key`). Every arm draws the same prompts from the same
noise as the un-erased model. A key is not security: see the method's page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from efface.bench.draw import Drawing, Judges, draw
from efface.bench.plan import Plan
from efface.bench.protocols import erasure
from efface.concepts import resolve
from efface.core import catalog
from efface.core.edit import Edit, Part
from efface.core.evidence import Score
from efface.core.key import random_key, unlock
from efface.core.model import Model
from efface.core.task import Task
from efface.models import load

MEASURED = ("target.ESR-1", "neighbour.PSR-1", "unrelated.PSR-1")
HEAD = """# KPOP: with its key, with another one, and without

What the judge sees in pictures by the bundled model, of which KPOP hides a concept. ESR-1: the share of pictures asking for the concept
in which something else is seen; PSR-1: the share of other pictures in which what was asked for is; in per cent with 95 % intervals. A
random key has tokens of the same lengths in random directions. The key acts on every prompt, and what it does to others is shown too.

Made by `{command}`.

| erased | key | n (target / neighbours / unrelated) | ESR-1 | neighbours PSR-1 | unrelated PSR-1 |
| --- | --- | ---: | ---: | ---: | ---: |
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="kpop")
    parser.add_argument("--tasks", nargs="+", default=["cat", "identity:santa claus"])
    parser.add_argument("--edits", type=Path, nargs="+", default=[], help="in the place of fits; each with its key beside it")
    parser.add_argument("--random", type=int, default=2, help="random keys")
    parser.add_argument("--size", default="quick", choices=["quick", "full"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def fitted(model: Model, args: argparse.Namespace) -> list[Edit]:
    if args.edits:
        return [Edit.load(path) for path in args.edits]
    tasks = [Task.of(text, resolve=resolve) for text in args.tasks]
    return [catalog.method(args.method, kind=task.targets[0].kind).fit(model, task, seed=args.seed) for task in tasks]


def drawn(model: Model, plan: Plan, judges: Judges, edit: Edit | None, key: Part | None) -> Drawing:
    with ExitStack() as entered:
        if edit is not None:
            entered.enter_context(edit.attach(model))
        if key is not None:
            entered.enter_context(unlock(model, key))
        return draw(model, plan, judges)


def text(score: Score) -> str:
    return f"{100 * score.value:.1f} [{100 * score.low:.1f} to {100 * score.high:.1f}]"


def rows(model: Model, edit: Edit, args: argparse.Namespace) -> Sequence[str]:
    """The lines of one edit's table."""
    task = Task.parse(edit.card.task)
    plan, judges = erasure.setup(model.id, task, size=args.size)
    right = edit.extras["key"]
    arms = {"none": (edit, None), "its own": (edit, right)}
    arms |= {f"random {n}": (edit, random_key(right, n)) for n in range(args.random)}
    before, found = drawn(model, plan, judges, None, None), []
    for name, arm in {"*un-erased*": (None, None), **arms}.items():
        after = before if arm[0] is None else drawn(model, plan, judges, *arm)
        lines = {line.key: line.contrast.after for line in erasure.scores(before.samples, after.samples)}
        counts = " / ".join(str(lines[key].n) for key in MEASURED)
        found.append(f"| {task.targets[0].name} | {name} | {counts} | " + " | ".join(text(lines[key]) for key in MEASURED) + " |")
        sys.stderr.write(found[-1] + "\n")
    return found


def main() -> None:
    args = arguments()
    model = load("emoji")
    given = [path.name if path.exists() and path.suffix == ".safetensors" else word for word in sys.argv[1:] for path in [Path(word)]]
    page = HEAD.format(command=" ".join(["python benchmarks/keys.py", *(f'"{word}"' if " " in word else word for word in given)]))
    page += "\n".join(line for edit in fitted(model, args) for line in rows(model, edit, args)) + "\n"
    if args.markdown is None:
        sys.stdout.write(page)
        return
    made = args.markdown.with_suffix(".part")
    made.write_text(page, encoding="utf-8")
    made.replace(args.markdown)


if __name__ == "__main__":
    main()

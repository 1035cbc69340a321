"""Does harmless fine-tuning bring an erased concept back? All arms of Modular LoRA's experiment (arXiv 2412.00357) on the bundled model.

    python benchmarks/reemergence.py --out runs/reemergence                            # panda, seeds 0 1 2
    python benchmarks/reemergence.py --out runs/reemergence --concept "santa claus" --seeds 0 --steps 150

Writes `seed-N.json` as each seed is done (a run that was stopped goes on behind them), `reemergence.json`, `reemergence.md` (a table) and
`reemergence.svg`; `--markdown FILE` writes a page, and the figure beside it. The harmless pictures are the model's own, recoloured into a
style that it has never seen; no art is needed.

The rates of the fine-tunings were chosen by the two controls alone, with another seed (7): what was never erased must still draw the
concept and other things after them, or nothing can be said of what was. Of 32 pictures of other things the LoRA keeps 29, with twice its
rate 24 and with four times 14, and learns the new style no better (loss on unseen pictures 0.109, 0.104, 0.108).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from efface.bench.plan import Plan
from efface.bench.protocols import erasure, reemergence
from efface.bench.protocols.reemergence import Course, Outcome
from efface.concepts import resolve
from efface.concepts.vocabulary import read
from efface.core import catalog
from efface.core.card import versions
from efface.core.task import Task
from efface.evals.detectors.emoji import EmojiJudge
from efface.models import load

ROLES = ("target", "neighbour", "unrelated")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--concept", default="panda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the erasures, the fine-tunings and the pictures")
    parser.add_argument("--safety", default="modular_lora")
    parser.add_argument("--whole", default="esd(group='full')", help="what erases the weights themselves")
    parser.add_argument("--steps", type=int, default=300, help="of each fine-tuning")
    parser.add_argument("--lr", type=float, default=1e-5, help="of the fine-tuning LoRAs; the model's lr_scale multiplies it")
    parser.add_argument("--full-lr", type=float, default=2e-6, help="of full fine-tuning; the model's lr_scale multiplies it")
    parser.add_argument("--pictures", type=int, default=96, help="harmless pictures")
    parser.add_argument("--style", default="blueprint", choices=sorted(reemergence.INKS))
    parser.add_argument("--size", default="quick", choices=["quick", "full"])
    parser.add_argument("--shots", type=int, help="prompts of each role, for a quick try; all of the size's by default")
    parser.add_argument("--markdown", type=Path, help="write a page, and the figure beside it")
    return parser.parse_args()


def planned(task: Task, size: str, seed: int, shots: int | None) -> Plan:
    """The erasure protocol's prompts, without the pairs; of each role the first `shots`."""
    plan = erasure.plan(task, size=size, world=read(), seed=seed)
    if shots is not None:
        plan = dataclasses.replace(plan, shots=tuple(plan.shots[i] for i in plan.shown(shots)))
    return dataclasses.replace(plan, shots=tuple(shot for shot in plan.shots if shot.role in ROLES))


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that a seed's numbers hang on."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "seeds", "markdown")}


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One seed of the whole experiment."""
    model, detector, started = load("emoji"), EmojiJudge.load(), time.perf_counter()
    task = Task.of(args.concept, resolve=resolve)
    kind = task.targets[0].kind
    images, captions, harm = reemergence.pastime(model, task, read(), detector=detector, count=args.pictures, style=args.style, seed=seed)
    course = Course(images, captions, unseen=max(1, len(images) // 8), steps=args.steps, lr=args.lr, full_lr=args.full_lr, harm=harm)
    safety, whole = (catalog.method(text, kind=kind) for text in (args.safety, args.whole))
    say = lambda line: sys.stderr.write(f"[{time.perf_counter() - started:6.0f} s] seed {seed}: {line}\n")  # noqa: E731
    trained = reemergence.arms(model, task, safety=safety, whole=whole, course=course, seed=seed, log=say)
    plan = planned(task, args.size, seed, args.shots)
    outcomes = reemergence.measure(model, trained, plan, detector, course, log=say)
    return {
        "arguments": asked(args),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        "settings": {
            "task": str(task), "safety": str(safety), "whole": str(whole), "seed": seed, "steps": course.steps, "batch": course.batch,
            "rank": course.rank, "lr": course.lr, "full_lr": course.full_lr, "style": args.style, "pictures": len(images),
            "target seen among the harmless pictures before they were left out": harm, "plan": plan.name, "prompts": plan.digest,
            "detector": f"{detector.name} {detector.version}", "sampler": model.sampler, "model": model.id, "versions": versions(),
            "seconds": round(time.perf_counter() - started, 1),
        },
    }  # fmt: skip


def outcome(data: dict[str, Any]) -> Outcome:
    return Outcome(**{**data, **{name: tuple(data[name]) for name in ("seen", "others", "prompts")}})


def percent(ends: dict[str, float] | None) -> str:
    return "" if ends is None else f"{100 * ends['value']:.1f} [{100 * ends['low']:.1f}, {100 * ends['high']:.1f}]"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| arm | target seen, % | since its erasure, points | recovery | others seen, % | loss on unseen pictures | cosine |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        recovery = "" if row["recovery"] is None else f"{row['recovery']:.2f}"
        cosine = "" if row["cosine"] is None else f"{row['cosine']:+.3f}"
        lines.append(
            f"| {row['title']} | {percent(row['target'])} | {percent(row['rise'])} | {recovery} | {percent(row['others'])} "
            f"| {row['unseen_loss']:.4f} | {cosine} |"
        )
    return "\n".join(lines)


def page(args: argparse.Namespace, rows: list[dict[str, Any]], settings: list[dict[str, Any]]) -> str:
    """The table with what it shows and how it was made. The settings of the first seed stand for all."""
    own, seeds = settings[0], " ".join(map(str, args.seeds))
    harm = max(each["target seen among the harmless pictures before they were left out"] for each in settings)
    return f"""# Does harmless fine-tuning bring an erased concept back? `{own["safety"]}`

Erased: {own["task"]}, as a LoRA by `{own["safety"]}`, and on the weights by `{own["whole"]}`. Fine-tuned: {own["steps"]} steps
of {own["batch"]} on {own["pictures"]} of the bundled model's own pictures, recoloured to a style that it does not know
({own["style"]}): all weights with the rate {own["full_lr"]:g}, or LoRAs of rank {own["rank"]} with {own["lr"]:g}. Of the
pictures drawn for that the judge saw the concept in {100 * harm:.1f} % at most; they were left out. Seeds {seeds};
{rows[0]["target"]["n"]} prompts for the concept and {rows[0]["others"]["n"]} for others in all (plan {own["plan"]});
shares in per cent with 95 % intervals.

Recovery: the share of what the erasure took that came back; 1 is as much as the control draws. Cosine: of the fine-tuning's change
and the erasure's, the mean over maps; an update that undoes the erasure has a negative one. Loss: of fine-tuning, on pictures kept
out of it. In the last two rows a LoRA is subtracted, as the paper does to see what is in it.

Made by `python benchmarks/reemergence.py --out runs/reemergence --seeds {seeds} --markdown docs/results/reemergence.md`. What each
seed found is kept in `benchmarks/records/reemergence`; copied to `runs/reemergence`, it need not be run again.

![for each arm the share of pictures with the erased concept and with others, and the cosines of its two changes](reemergence.svg)

{table(rows)}
"""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The shares of target prompts in which the concept is seen and of other prompts in which theirs is, with intervals; and cosines, a dot
    for each map."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.42 * len(rows) + 1.2), layout="constrained")
    FigureCanvasSVG(figure)
    *shares, right = figure.subplots(1, 3, sharey=True)
    for place, row in enumerate(rows):
        colour = {"modular": "tab:green", "base": "0.5", "ft": "0.5", "ft-lora": "0.5"}.get(row["key"], "tab:blue")
        for axis, name in zip(shares, ("target", "others"), strict=True):
            value, low, high = (100 * row[name][end] for end in ("value", "low", "high"))
            axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3)
        dots = list(row["cosines"].values())
        right.plot(dots, [place] * len(dots), "o", color=colour, alpha=0.35, markersize=4)
        if dots:
            right.plot(row["cosine"], place, "|", color="black", markersize=14)
    shares[0].set_yticks(range(len(rows)), [row["title"] for row in rows])
    shares[0].invert_yaxis()
    for axis, what in zip(shares, ("erased concept seen, %", "other concepts seen, %"), strict=True):
        axis.set_xlim(-3, 103)
        axis.set_xlabel(what)
    right.axvline(0, color="0.7", linewidth=0.8)
    right.set_xlim(-1, 1)
    right.set_xlabel("cosine of the two changes")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        path = args.out / f"seed-{seed}.json"
        if not path.exists():
            made = json.dumps(run(args, seed), indent=1)
            path.write_text(made, encoding="utf-8")
    runs = [json.loads((args.out / f"seed-{seed}.json").read_text(encoding="utf-8")) for seed in args.seeds]
    for seed, each in zip(args.seeds, runs, strict=True):
        differ = [
            f"{name} was {each['arguments'].get(name)!r}" for name, value in asked(args).items() if each["arguments"].get(name) != value
        ]
        if differ:
            raise SystemExit(
                f"{args.out}/seed-{seed}.json was made with other settings ({', '.join(differ)}); give another folder, or remove it"
            )
    rows = reemergence.report(reemergence.pool([[outcome(o) for o in r["outcomes"]] for r in runs]))
    (args.out / "reemergence.json").write_text(
        json.dumps({"rows": rows, "settings": [r["settings"] for r in runs]}, indent=1), encoding="utf-8"
    )
    (args.out / "reemergence.md").write_text(table(rows) + "\n", encoding="utf-8")
    plot(rows, args.out / "reemergence.svg")
    if args.markdown:
        plot(rows, args.markdown.with_name("reemergence.svg"))
        args.markdown.write_text(page(args, rows, [r["settings"] for r in runs]), encoding="utf-8")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()

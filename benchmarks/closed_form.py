"""Times UCE and one round of RECE on the key and value maps of Stable Diffusion 1.4 and SDXL, against the textbook loop.

    python benchmarks/closed_form.py --out runs/closed_form.json                    # all of it
    python benchmarks/closed_form.py --family sd1 --concepts 1 100 --out FILE       # a part
    python benchmarks/closed_form.py --family sdxl --plain 0 --repeat 1 --out FILE  # five minutes of processor

Most of all of it is the plain loop on SDXL: UCE for a hundred concepts alone took six minutes of processor.

Weights are random and of the true shapes; texts are random rows of 77 tokens, three to eight of them words, already encoded. Every arm
runs in a process of its own: seconds of the solve and of making every new map, the processor's seconds over all threads (which do not
grow when the machine is shared), and the peak of resident memory above what weights and texts take. "plain" is a transcription of the
textbook loop, float32, one inverse per matrix, every concept's outputs computed for every matrix; it is written for this benchmark only.
Where both run, the largest relative difference between their changes of a map is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efface.core.textmaps import Texts, batches
from efface.methods.rece import RECE
from efface.methods.uce import UCE
from efface.ops.ridge import Statistics

FAMILIES = {
    "sd1": (768, [320] * 10 + [640] * 10 + [1280] * 12),
    "sdxl": (2048, [640] * 20 + [1280] * 120),
}
"""Input width, and the output widths of all key and value maps."""
LENGTH = 77
ARMS = ("uce", "rece")
CONCEPTS = (1, 10, 100, 1000)
PLAIN = {"sd1": 100, "sdxl": 100}
"""Up to how many concepts the plain loop is run."""


def weights(family: str) -> list[Tensor]:
    """Random maps (o d), float32, at the scale of a linear layer's initialisation."""
    g = torch.Generator().manual_seed(0)
    d, outputs = FAMILIES[family]
    return [torch.randn(o, d, generator=g) / d**0.5 for o in outputs]


def encoded(family: str, concepts: int) -> Texts:
    """Random rows of unit variance, as behind CLIP's last layer norm, for "c0", "c1", … and the empty prompt."""
    g = torch.Generator().manual_seed(1)
    d = FAMILIES[family][0]
    names = ["", *(f"c{i}" for i in range(concepts))]
    rows = torch.randn(len(names), LENGTH, d, generator=g)
    lengths = [2, *(5 + torch.randint(6, (concepts,), generator=g)).tolist()]
    ids = dict.fromkeys(names, torch.zeros(LENGTH, dtype=torch.long))
    return Texts(("maps",), dict(zip(names, rows, strict=True)), dict(zip(names, lengths, strict=True)), ids)


# -- ours --------------------------------------------------------------------------------------------------------------------


def ours_uce(maps: Sequence[Tensor], texts: Texts, pairs: list[tuple[str, str]]) -> list[Tensor]:
    method, statistics = UCE(), Statistics(texts.width)
    for part in batches(pairs):
        method.erase(statistics, texts, part)
    method.keep(statistics, texts, [""], method.beta([""]))
    factor = statistics.solve(method.regulariser).factor.float()
    return [w + factor.change(w) for w in maps]


def ours_rece(maps: Sequence[Tensor], texts: Texts, pairs: list[tuple[str, str]]) -> list[Tensor]:
    method = RECE()
    source = method.source(maps)
    for part in batches(pairs):
        method.erase(source, texts, part)
    method.keep(source, texts, [""], 1)
    factor = method.round(source, method.begin(source), source.start)[0].float()
    return [w + factor.change(w) for w in maps]


# -- the textbook loop -------------------------------------------------------------------------------------------------------


def edited(maps: Sequence[Tensor], blocks: list[tuple[Tensor, Tensor]], kept: Tensor, beta: float, mu: float) -> list[Tensor]:
    """(μ W + Σ v cᵀ + β Σ (W p) pᵀ)(μ I + Σ c cᵀ + β Σ p pᵀ)⁻¹, map by map and concept by concept."""
    new = []
    for w in maps:
        top, bottom = mu * w, mu * torch.eye(w.shape[1])
        for c, g in blocks:
            top += (g @ w.T).T @ c
            bottom += c.T @ c
        top += beta * (kept @ w.T).T @ kept
        bottom += beta * kept.T @ kept
        new.append(top @ torch.inverse(bottom))
    return new


def plain_uce(maps: Sequence[Tensor], texts: Texts, pairs: list[tuple[str, str]]) -> list[Tensor]:
    blocks = []
    for text, guide in pairs:
        c, g = (texts.tokens[t][texts.lengths[t] - 2 :] for t in (text, guide))
        rows = min(len(c), len(g))
        blocks.append((c[:rows], g[:rows]))
    return edited(maps, blocks, texts.tokens[""], 1.0, 0.5)


def plain_rece(maps: Sequence[Tensor], texts: Texts, pairs: list[tuple[str, str]]) -> list[Tensor]:
    now = plain_uce(maps, texts, pairs)
    left, right = 0.1 * torch.eye(texts.width), torch.zeros(texts.width, texts.width)
    for w, old in zip(now, maps, strict=True):
        left += w.T @ w
        right += w.T @ old
    matrix = torch.inverse(left) @ right
    blocks = [(texts.tokens[text] @ matrix.T, texts.tokens[guide]) for text, guide in pairs]
    return edited(now, blocks, texts.tokens[""], 0.1, 0.1)


RUNS: dict[tuple[str, str], Callable[[Sequence[Tensor], Texts, list[tuple[str, str]]], list[Tensor]]] = {
    ("uce", "ours"): ours_uce,
    ("uce", "plain"): plain_uce,
    ("rece", "ours"): ours_rece,
    ("rece", "plain"): plain_rece,
}


# -- measuring ---------------------------------------------------------------------------------------------------------------


def resident(which: str) -> int:
    """Bytes of resident memory: "VmRSS" now, "VmHWM" at most since `forget_peak`."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError(f"/proc/self/status tells no {which}; this benchmark needs Linux")
    return 1024 * int(found[1])


def forget_peak() -> None:
    """Sets the peak of resident memory to what is resident now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@torch.no_grad()
def measure(arm: str, kind: str, family: str, concepts: int, repeat: int, threads: int) -> dict[str, Any]:
    """One arm, in this process; each repetition's seconds, and the first one's memory."""
    torch.set_num_threads(threads)
    maps, texts = weights(family), encoded(family, concepts)
    pairs = [(f"c{i}", "") for i in range(concepts)]
    torch.linalg.inv(torch.eye(64) + torch.ones(64, 64))  # the libraries are loaded before anything is measured
    seconds, processor, memory, sums = [], [], 0, 0.0
    for number in range(repeat):
        base = resident("VmRSS")
        forget_peak()
        started, busy = time.perf_counter(), time.process_time()
        new = RUNS[arm, kind](maps, texts, pairs)
        seconds.append(round(time.perf_counter() - started, 3))
        processor.append(round(time.process_time() - busy, 3))
        memory = resident("VmHWM") - base if number == 0 else memory
        sums = sum(float((n - w).double().square().sum()) for n, w in zip(new, maps, strict=True)) ** 0.5
        if number < repeat - 1:
            del new
    result = {"arm": arm, "kind": kind, "family": family, "concepts": concepts, "seconds": seconds, "processor": processor}
    result |= {"memory_mb": round(memory / 2**20), "change": sums}
    if kind == "plain":
        other = RUNS[arm, "ours"](maps, texts, pairs)
        result["difference"] = max(float((a - b).norm() / (b - w).norm()) for a, b, w in zip(new, other, maps, strict=True))
    return result


def child(arm: str, kind: str, family: str, concepts: int, repeat: int, threads: int) -> dict[str, Any]:
    """The same in a process of its own."""
    words = [arm, kind, family, str(concepts), str(repeat), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", *words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--concepts", nargs="+", type=int, default=list(CONCEPTS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain", type=int, help="the most concepts that the plain loop is given; 0 leaves it out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        arm, kind, family, *numbers = given.measure
        sys.stdout.write(json.dumps(measure(arm, kind, family, *map(int, numbers))))
        return
    rows = []
    for family in given.family:
        most = PLAIN[family] if given.plain is None else given.plain
        for arm in given.arm:
            for concepts in given.concepts:
                for kind in ("ours", "plain") if concepts <= most else ("ours",):
                    repeat = given.repeat if kind == "ours" else 1
                    rows.append(child(arm, kind, family, concepts, repeat, given.threads))
                    sys.stderr.write(json.dumps(rows[-1]) + "\n")
    report = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": given.threads}
    report |= {"load": os.getloadavg(), "torch": torch.__version__, "rows": rows}
    text = json.dumps(report, indent=1)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n", encoding="utf-8")
    else:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

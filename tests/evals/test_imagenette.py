"""ESR and PSR return the published table from the authors' own per-image labels, to two decimals.

The files are not part of the project: `EFFACE_FIXTURES` names their folder (see its README), and without it the tests skip.
"""

from __future__ import annotations

import csv
import gzip
import os
import statistics
from functools import cache
from pathlib import Path

import pytest

from efface.core.evidence import Samples, Shot, Sighting
from efface.evals.metrics.esr import ESR
from efface.evals.metrics.psr import PSR

FOLDER = os.environ.get("EFFACE_FIXTURES", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="EFFACE_FIXTURES is unset: it names the folder of the published raw labels")

V1 = {"Cassette Player", "Church", "Garbage Truck", "Parachute", "French Horn"}
V3 = {"Cassette Player", "Chain Saw", "Church", "Gas Pump", "Tench"}
ALL = V1 | {"Chain Saw", "Gas Pump", "Tench", "English Springer", "Golf Ball"}
ERASED = {1: V1, 2: ALL - V1, 3: V3, 4: ALL - V3}
"""The classes that each of the authors' four models has erased (utils_exp.py of their repository)."""
PUBLISHED = {
    "sd14": {"ESR-1": (22.02, 11.56), "ESR-5": (2.40, 1.44), "PSR-1": (77.98, 11.56), "PSR-5": (97.60, 1.44)},
    "ap": {"ESR-1": (98.63, 1.15), "ESR-5": (96.07, 2.73), "PSR-1": (55.24, 10.03), "PSR-5": (79.86, 2.79)},
}


@cache
def rows(name: str) -> list[dict[str, str]]:
    with gzip.open(Path(FOLDER) / f"{name}.csv.gz", "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def samples(name: str, erased: set[str]) -> Samples:
    shots, seen = [], []
    for row in rows(name):
        label = row["label_str"]
        role = "target" if label in erased else "unrelated"
        shots.append(Shot(f"Image of {label}", int(row["evaluation_seed"]), role, label, (label.lower(),)))
        seen.append(Sighting(tuple(row[f"category_top{k}"].lower() for k in range(1, 6))))
    return Samples(tuple(shots), tuple(seen))


@pytest.mark.parametrize("metric", [ESR(1), ESR(5), PSR(1), PSR(5)], ids=lambda m: m.name)
def test_the_published_table(metric: ESR | PSR) -> None:
    found: dict[str, list[float]] = {"sd14": [], "ap": []}
    for split, erased in ERASED.items():
        contrast = metric.measure(samples("sd14_imagenette", erased), samples(f"ap_imagenette_v{split}", erased))
        assert contrast.after.n == 2500
        found["sd14"].append(100 * contrast.before.value)
        found["ap"].append(100 * contrast.after.value)
        assert contrast.change.low < contrast.after.value - contrast.before.value < contrast.change.high
    for model, values in found.items():
        mean, deviation = PUBLISHED[model][metric.name]
        assert f"{statistics.fmean(values):.2f}" == f"{mean:.2f}"
        assert f"{statistics.pstdev(values):.2f}" == f"{deviation:.2f}"


def test_control_case_matters() -> None:
    """The classifier writes "golf ball" and the prompt "Golf Ball": without lower case everything looks erased."""
    erased = ERASED[2]
    raw = samples("sd14_imagenette", erased)
    shots = tuple(Shot(s.prompt, s.seed, s.role, s.concept, (s.concept,)) for s in raw.shots)
    wrong = Samples(shots, raw.sightings)
    assert ESR(1).measure(wrong, wrong).after.value == 1

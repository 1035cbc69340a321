"""Published numbers beside measured ones: means over tasks of means over fits, and the population's deviation, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from efface.bench.expected import Expected, beside
from efface.bench.result import Line, Result, Settings
from efface.core.evidence import Contrast, Samples, Score

KEY = "target.ESR-1"


def record(label: str, task: str, before: float, after: float, unit: str = "share") -> dict[str, Any]:
    scores = [Score("ESR-1", value, value, value, 4, "higher", unit) for value in (before, after, after - before)]
    settings = Settings("erasure/x", "digest", 0, 0, 0, 0, "DDIM", 2, 7.5, None)
    none = Samples(())
    result = Result("m", label, task, settings, (Line(KEY, "", "", Contrast(*scores)),), (), (), (), none, none, {})
    return {"trial": {"label": label, "task": task}, "result": result.json()}


def test_means_over_tasks_of_means_over_fits_in_per_cent() -> None:
    records = [
        record("ap", "cat", 0.2, 0.9),
        record("ap", "cat", 0.2, 0.7),
        record("ap", "dog", 0.4, 0.4),
        record("esd", "cat", 0.2, 0.1),
        {"trial": {"label": "ap", "task": "bus"}, "error": {}},
    ]
    expected = [
        Expected.of({"method": "ap", "values": {KEY: [98.63, 1.15]}, "source": "a table"}, ("ap",), "here"),
        Expected.of({"method": "un-erased", "values": {KEY: 22}, "source": "a table"}, ("ap",), "here"),
        Expected.of({"method": "ap", "values": {"others.PSR-1": 50}, "source": "a table"}, ("ap",), "here"),
    ]
    ap, original, other = beside(expected, records)
    assert (ap.published, ap.spread) == (98.63, 1.15)
    assert (ap.measured, ap.measured_spread) == (pytest.approx(60), pytest.approx(20))  # of 80 and 40
    assert (original.measured, original.measured_spread) == (pytest.approx(30), pytest.approx(10))
    assert (other.measured, other.measured_spread) == (None, None)
    assert beside(expected, [])[0].measured is None


def test_what_is_no_share_stays_in_its_unit_and_one_task_has_no_spread() -> None:
    expected = [Expected.of({"method": "ap", "values": {KEY: 23.5}, "source": "a table"}, ("ap",), "here")]
    (row,) = beside(expected, [record("ap", "cat", 30.0, 24.0, "CLIP")])
    assert (row.measured, row.measured_spread) == (24.0, None)

"""Records of trials and attacks for the tests of the report of a sweep."""

from __future__ import annotations

import hashlib
from typing import Any

from .conftest import Run
from .test_leaderboard import made, record


def trial(run: Run, method: str, gone: int, lost: int, *, task: str = "cat", seed: int = 0, kind: str = "weight", **fields: Any) -> dict:
    """A record in which `gone` of 40 targets and `lost` of 40 of each of the others are no longer seen."""
    digest = hashlib.sha256(f"{method}/{task}/{seed}".encode()).hexdigest()[:16]
    found = record(made(run, gone, lost), method, seed, task)
    return {"format": "efface-trial", "version": 1, "hash": digest, **found, "edit": {"kind": kind, "bytes": 1234, "fields": fields}}


def failed(method: str, *, task: str = "cat") -> dict[str, Any]:
    return {"format": "efface-trial", "version": 1, "hash": f"failed-{method}", **record(None, method, 0, task)}


def attacks(method: str, *, task: str = "cat", **rates: float) -> dict[str, Any]:
    """What `efface attack` writes of an edit: one attack on 16 prompts for each rate, and one that was refused."""

    def score(value: float) -> dict[str, Any]:
        return {"value": value, "low": max(0, value - 0.2), "high": min(1, value + 0.2), "n": 16, "undetermined": 0, "items": []}

    rows = [
        {
            "attack": name,
            "concept": "cat",
            "threat": "T2",
            "access": "prompts",
            "attacked": "emoji",
            "un-erased": score(0.9),
            "pre_asr": score(rate / 2),
            "asr": score(rate),
            "control": None,
            "candidates": 8,
            "found": [],
            "cost": {},
            "details": {},
        }
        for name, rate in rates.items()
    ]
    refused = {"attack": "p4d", "concept": "cat", "refused": "it would attack the un-erased model"}
    return {"format": "efface-attacks", "version": 1, "task": task, "attacked": {"method": method}, "attacks": [*rows, refused]}

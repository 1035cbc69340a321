"""What several fits of one method say together, and whether one method is worse than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from efface.bench.questions import QUESTIONS
from efface.bench.result import Result
from efface.core.errors import EffaceError, suggest
from efface.core.evidence import Comparison, Score
from efface.evals.metrics.esr import ESR
from efface.evals.metrics.psr import PSR


@dataclass(frozen=True)
class Pooled:
    """A line of the table over the fits of one method for one task."""

    before: Score
    after: Score
    """The mean over fits. The interval is the mean of the fits' own 95 % intervals, widened to hold every fit: the pictures
    of the fits share their prompts and noise, so more fits make the prompts no more certain."""
    fits: int


def pooled(results: Sequence[Result], key: str) -> Pooled | None:
    """A line over several fits, or None where it was not measured in all of them."""
    lines = [result.line(key) for result in results]
    found = [line for line in lines if line is not None]
    if not found or len(found) < len(lines):
        return None
    return Pooled(found[0].contrast.before, mean([line.contrast.after for line in found]), len(found))


def mean(fits: Sequence[Score]) -> Score:
    """One score over fits, with the interval of `Pooled.after`."""
    values = [score.value for score in fits]
    low, high = min(fmean(s.low for s in fits), *values), max(fmean(s.high for s in fits), *values)
    return replace(fits[0], value=fmean(values), low=low, high=high, undetermined=sum(s.undetermined for s in fits), items=())


def compare(first: Mapping[tuple[str, int], Result], second: Mapping[tuple[str, int], Result], key: str, margin: float) -> Comparison:
    """Is the first method no worse than the second by more than `margin`, over all tasks and fits together?

    Fits are paired by task and seed, on the same prompts and noise; where the second method has one fit of a task, as those that draw
    nothing at random need no more, every fit of the first is paired with it. The interval is the hull of Newcombe's paired one, of a
    bootstrap over prompts, and of one over fits.

    Args:
        first: results by (task, seed).
        second: the same of the other method.
        key: of a line that is an ESR-k or a PSR-k, such as "target.ESR-1".
        margin: as a share; 0.03 is three points.

    Raises EffaceError for another key, or where no fit can be paired; ValueError for results on different prompts."""
    metric = _metric(key)
    answers: list[tuple[bool | None, bool | None]] = []
    prompts, fits = [], []
    for task, seed, mine, theirs in pairs_of(first, second):
        contrast = metric.measure(theirs.after, mine.after)
        shots = [shot for shot in mine.after.shots if shot.role in metric.roles and shot.labels]
        answers += [
            (None if a is None else bool(a), None if b is None else bool(b))
            for b, a in zip(contrast.before.items, contrast.after.items, strict=True)
        ]
        prompts += [f"{task}: {shot.prompt}" for shot in shots]
        fits += [f"{task}/{seed}"] * len(shots)
    if not answers:
        raise EffaceError("no fit of the first method has a fit of the second on the same task; run both on the same tasks and seeds")
    clusterings = [prompts, fits] if len(set(fits)) > 1 else [prompts]
    return Comparison.shares(metric.name, [a for a, _ in answers], [b for _, b in answers], clusterings, "higher", margin)


def _metric(key: str) -> ESR | PSR:
    """The metric of a key, whose items answer yes or no for each shot of its roles."""
    known = {
        q.key: q.metric
        for q in QUESTIONS
        if (isinstance(q.metric, ESR) and not q.metric.relative) or (isinstance(q.metric, PSR) and "pair" not in q.metric.roles)
    }
    if key not in known:
        raise EffaceError(f"{key!r} cannot be compared; {suggest(key, known)}")
    return known[key]


def pairs_of(first: Mapping[tuple[str, int], Result], second: Mapping[tuple[str, int], Result]) -> list[tuple[str, int, Result, Result]]:
    """(task, seed, fit of the first, fit of the second) of the fits that `compare` sets side by side."""
    found = []
    for (task, seed), mine in first.items():
        fits = [result for (other, _), result in second.items() if other == task]
        theirs = second.get((task, seed)) or (fits[0] if len(fits) == 1 else None)
        if theirs is not None:
            found.append((task, seed, mine, theirs))
    return found

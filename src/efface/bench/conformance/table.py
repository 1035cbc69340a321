"""The table of checks, and what runs it over a method."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from efface.bench.conformance import checks, judged
from efface.bench.conformance.case import Case
from efface.bench.conformance.checks import Failed, Skipped
from efface.core.errors import suggest
from efface.core.method import Method

Scope = Literal["class", "fit", "slow"]
Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One promise of every method."""

    name: str
    asks: str
    """What is promised, in one line."""
    scope: Scope
    """Of the class alone, of a fit of a tiny model, or of the bundled model as the judge sees it."""
    run: Callable[[Any], None]
    """Takes the class, a `Case` or a `judged.Trial`."""


CHECKS = (
    Check("defaults", "a frozen dataclass that builds without arguments", "class", checks.defaults),
    Check("documented", "a card, a paper, and a string under every field", "class", checks.documented),
    Check("presets", "every preset builds", "class", checks.presets),
    Check("text", "the text form reads back as the same method", "class", checks.text),
    Check("fits", "a fit ends with the kind of edit that it declares", "fit", checks.fits),
    Check("unchanged", "the fit leaves model and process as they were, to the bit", "fit", checks.unchanged),
    Check("repeatable", "the same seed gives the same edit", "fit", checks.repeatable),
    Check("restores", "detaching gives back every bit, nested and after errors", "fit", checks.restores),
    Check("survives", "saved and loaded it gives the same outputs", "fit", checks.survives),
    Check("declared", "only the declared parameters are changed", "fit", checks.declared),
    Check("effective", "the target's output really changes", "fit", checks.effective),
    Check("keeps", "what kept concepts' prompts say is not turned into noise", "fit", checks.keeps),
    Check("needs", "without what it needs it raises Unsupported and names it", "fit", checks.refuses_needs),
    Check("tasks", "empty, doubled and contradictory tasks raise InvalidTask", "fit", checks.refuses_tasks),
    Check("cost", "what is metered is what its formula says", "fit", checks.costs),
    Check("erases", "the target is drawn before and not after", "slow", judged.erases),
    Check("preserves", "the kept concepts are drawn before and after", "slow", judged.preserves),
)
EMOJI = "emoji"
"""The family column of the slow checks."""


@dataclass(frozen=True)
class Outcome:
    """How one check ended."""

    check: str
    family: str
    """The tiny family, "emoji", or "" where the class alone was asked."""
    status: Status
    detail: str = ""
    """What is wrong, or why the question did not arise."""
    seconds: float = 0.0


def run(
    cls: type[Method],
    given: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    families: Sequence[str] | None = None,
    slow: bool = False,
    only: Collection[str] = (),
) -> Iterator[Outcome]:
    """The outcomes of all checks, as they come.

    Args:
        given: fields of the method, which win over what the suite would set.
        preset: in the place of the method's defaults.
        families: the tiny families; by default all.
        slow: whether the bundled model is erased and judged too, which takes minutes.
        only: the names of the checks; by default all.

    Raises ValueError for an unknown check or family.
    """
    for what, asked, known in (("check", only, [c.name for c in CHECKS]), ("family", families or (), checks.families())):
        for name in asked:
            if name not in known:
                raise ValueError(f"there is no {what} {name!r}; {suggest(name, known)}")
    chosen = [check for check in CHECKS if check.name in only or not only]
    yield from (_outcome(check, cls, "") for check in chosen if check.scope == "class")
    of_fit, of_judge = ([check for check in chosen if check.scope == scope] for scope in ("fit", "slow"))
    for family in checks.families() if families is None else families:
        yield from _fitted(of_fit, Case(cls, family, given or {}, preset), family)
    trial = judged.Trial(cls, given or {}, preset)
    yield from (_outcome(check, trial, EMOJI) for check in of_judge if slow)


def _fitted(asked: Sequence[Check], case: Case, family: str) -> Iterator[Outcome]:
    """The checks of a fit; where there is none, the first says why and the others are skipped."""
    started = time.perf_counter()
    try:
        note = case.fitted.note
    except Exception as error:
        yield Outcome("fits", family, "failed", _words(error), round(time.perf_counter() - started, 3))
        yield from (Outcome(check.name, family, "skipped", "nothing was fitted") for check in asked if check.name != "fits")
        return
    spoilt = False
    for check in asked:
        if spoilt:  # what a fault leaves in the model must not make the next check fail too
            case.renew()
        outcome = _outcome(check, case, family)
        spoilt = spoilt or outcome.status == "failed"
        yield replace(outcome, detail=note) if check.name == "fits" and not outcome.detail else outcome


def _outcome(check: Check, subject: Any, family: str) -> Outcome:
    started, status, detail = time.perf_counter(), "passed", ""
    try:
        check.run(subject)
    except Failed as failure:
        status, detail = "failed", str(failure)
    except Skipped as reason:
        status, detail = "skipped", str(reason)
    except Exception as error:
        status, detail = "failed", _words(error)
    return Outcome(check.name, family, status, detail, round(time.perf_counter() - started, 3))  # type: ignore[arg-type]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def failed(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that failed."""
    return [outcome for outcome in outcomes if outcome.status == "failed"]

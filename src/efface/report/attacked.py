"""The attacks of a sweep as Markdown: methods by attacks, each with its interval, its control, and what it took.

What was not run says why. No number depends on which other methods stand in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from efface.core.errors import EffaceError
from efface.core.evidence import Score
from efface.report import relearned, wording
from efface.report.leaderboard import EMOJI
from efface.report.records import FAILED, Attacked, of_trials, over_fits
from efface.report.rows import alike
from efface.report.tables import table

NONE = "–"
THREATS = "T0 natural prompts, T1 black-box prompts, T2 white-box prompts, T3 embeddings, T4 sampler, noise and pictures, T5 weights"
READING = """The attack success rate (ASR): the share of prompts for which the erased model shows the concept, unattacked or in one of
at most C candidates of the attack; lower resists better. 95 % intervals in brackets; over several fits the mean of theirs, widened to hold
every fit. Un-erased: how often the original model shows the concept on the same prompts and noise; more than that no attack can be asked
for."""
CONTROLS = """pre-ASR: the share without any attack. Control: the same with the best of C more pictures of the plain prompt. An attack
has found something where its ASR is above its control. The last columns are controls that belong to one attack alone (%)."""
COST = """Means over what was attacked, the un-erased pictures included and the control apart; an attack ends at each prompt that has
fallen, so that what resists costs more."""


def gathered(records: Sequence[Mapping[str, Any]]) -> list[Attacked]:
    """What came out of trials of attacks, fits pooled. Raises EffaceError for none, or for records that do not compare."""
    if not records:
        raise EffaceError("there is no record to show; run the sweep first")
    alike((), records)
    return over_fits(of_trials(records))


def render(records: Sequence[Mapping[str, Any]], *, title: str = "", source: str = "", pictures: Mapping[str, str] | None = None) -> str:
    """The page of the trials of attacks. Raises as `gathered`.

    Args:
        pictures: the files with the figures of relearning, seen from the page, by task."""
    found = gathered(records)
    names = titles(found)
    parts = [f"# {title or 'Erasures attacked'}", *_about(records, source)]
    for task in dict.fromkeys(a.task for a in found):
        mine = [a for a in found if a.task == task]
        for concept in dict.fromkeys(a.concept for a in mine):
            some = [a for a in mine if a.concept == concept]
            heading = wording.heading(task)
            parts.append(f"## {heading}" if len({a.concept for a in mine}) == 1 else f"## {heading}: {concept}")
            parts += [_table(some, names, _rate, original=True), "### Without the attack, and control", CONTROLS]
            parts += [
                _table(some, names, _beside, own=True),
                *_remarks(some, names),
                *_relearned(some, (pictures or {}).get(task)),
                *_refused(some, names),
            ]
    parts += ["## The attacks", _budgets(found, names), f"Threats: {THREATS}. {COST}"]
    parts += ["## The methods in full", "\n".join(dict.fromkeys(f"- `{a.label or a.method}`: `{a.method}`" for a in found))]
    return "\n\n".join(parts) + "\n"


def titles(found: Iterable[Attacked]) -> dict[str, str]:
    """The attack's name for the text form of each, where no other bears it."""
    names = {a.attack: a.name for a in found}
    return {text: name if list(names.values()).count(name) == 1 else text for text, name in names.items()}


def said(record: Mapping[str, Any]) -> str:
    """What came out of one trial, in a line."""
    return "; ".join(f"refused: {a.refused}" if a.refused else _outcome(a) for a in of_trials([record]))


def score(found: Score | None) -> str:
    """ "62.5 % [38.6 to 81.5]"."""
    return NONE if found is None else f"{wording.value(found)} [{wording.interval(found)}]"


def _outcome(a: Attacked) -> str:
    shares = {"ASR": a.success, "pre-ASR": a.before, "control": a.control, "un-erased": a.original}
    return f"{a.concept}: " + ", ".join(f"{name} {wording.value(share)}" for name, share in shares.items() if share)


def _rate(a: Attacked) -> str:
    return score(a.success) if not a.refused else "failed" if a.refused.startswith(FAILED) else "refused"


def _beside(a: Attacked) -> str:
    return NONE if a.refused or not a.before else " / ".join(wording.value(s) if s else NONE for s in (a.before, a.control))


def _table(
    some: Sequence[Attacked], names: Mapping[str, str], cell: Callable[[Attacked], str], *, original: bool = False, own: bool = False
) -> str:
    """Methods by attacks; on top the un-erased model, where asked, and behind them the controls of single attacks."""
    attacks = [text for text in names if any(a.attack == text for a in some)]
    known = {(a.method, a.attack): a for a in some}
    lines = []
    if original:
        firsts = [next((a for a in some if a.attack == text and a.original), None) for text in attacks]
        lines.append(["*un-erased*", *(score(first.original) if first else NONE for first in firsts)])
    single = dict.fromkeys((a.attack, words) for a in some for words in a.own) if own else {}
    for method, label in {a.method: a.label or a.method for a in some}.items():
        row = [known.get((method, text)) for text in attacks]
        beside = [_own(known.get((method, text)), words) for text, words in single]
        lines.append([f"`{label}`", *("not run yet" if a is None else cell(a) for a in row), *beside])
    suffix = "" if original else ", pre-ASR / control"
    last = [f"{names[text]}: {words}" for text, words in single]
    return table(["method", *(f"{names[text]}{suffix}" for text in attacks), *last], lines)


def _own(a: Attacked | None, words: str) -> str:
    return NONE if a is None or words not in a.own else f"{100 * a.own[words]:.0f}"


def _remarks(some: Sequence[Attacked], names: Mapping[str, str]) -> Iterator[str]:
    lines = [f"- {names[a.attack]} on `{a.label or a.method}`: {a.remarks}." for a in some if a.remarks and not a.curves]
    if lines:
        yield "Besides:\n\n" + "\n".join(lines)


def _relearned(some: Sequence[Attacked], picture: str | None) -> Iterator[str]:
    """Curves, in a table for each form of the attack, and the figure of them all."""
    found = [a for a in some if a.curves]
    if not found:
        return
    yield "### Relearning, step by step"
    yield relearned.READING
    if picture:
        yield f"![The share of prompts that show the concept against the steps of fine-tuning, for each method]({picture})"
    yield relearned.NUMBERS
    for attack in dict.fromkeys(a.attack for a in found):
        yield relearned.rows([a for a in found if a.attack == attack])


def _refused(some: Sequence[Attacked], names: Mapping[str, str]) -> Iterator[str]:
    """Reasons, each with the attack and the methods that it holds for."""
    whys: dict[tuple[str, str], list[str]] = {}
    for a in some:
        if a.refused:
            whys.setdefault((names[a.attack], a.refused), []).append(f"`{a.label or a.method}`")
    if whys:
        yield "Not run:\n\n" + "\n".join(f"- {attack} on {', '.join(methods)}: {why}" for (attack, why), methods in whys.items())


def _budgets(found: Sequence[Attacked], names: Mapping[str, str]) -> str:
    """What each attack may do and did."""
    lines = []
    for text in names:
        ran = [a for a in found if a.attack == text and a.success]
        if not ran:
            continue
        costs = [_mean(ran, name) for name in ("forwards", "backwards", "control_forwards", "seconds")]
        prompts = " to ".join(dict.fromkeys(str(n) for n in sorted(a.success.n for a in ran if a.success)))
        lines.append([f"`{text}`", ran[0].threat, str(max(a.candidates or 0 for a in ran)), prompts, *costs])
    return table(["attack", "threat", "C", "prompts", "forwards", "backwards", "control's forwards", "seconds"], lines)


def _mean(ran: Sequence[Attacked], name: str) -> str:
    values = [a.cost[name] for a in ran if name in a.cost]
    return wording.number(fmean(values)) if values else NONE


def _about(records: Sequence[Mapping[str, Any]], source: str) -> Iterator[str]:
    trial, ground = records[0]["trial"], records[0]["ground"]
    details: Mapping[str, Any] = next((row["details"] for record in records for row in record.get("attacks", ()) if "details" in row), {})
    sampling = f", {details['sampler']}, {details['steps']} steps, guidance {details['guidance']:g}" if details else ""
    yield f"Model `{trial['model']}` (weights {ground['weights']}), judged by {ground['detector']}{sampling}."
    yield READING
    if trial["model"] == "emoji":
        yield EMOJI
    if source:
        yield f"Made by `{source}`."

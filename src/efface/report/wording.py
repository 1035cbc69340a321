"""Numbers and findings in words, the same on the terminal and on the page."""

from __future__ import annotations

from efface.bench.result import Line, Result
from efface.core.evidence import Score
from efface.core.task import MOST, NAMED, Task

ERASED, PARTLY = 0.95, 0.5
"""From which ESR-1 on a target is called erased, and partly erased."""
KEPT, HURT = 0.05, 0.15
"""Up to which loss of PSR-1 the others are called kept, and somewhat hurt."""
SHOWN = 0.5
"""Below which share of un-erased pictures that show the target no headline says that it was erased."""
UNSURE = 0.2
"""From which share of un-erased pictures without the target, or of pictures of nothing, the verdict says so."""
CONTROLS = "efface.bench.controls:"
TENTHS = ("CLIP", "distance")
"""Units that are told to a tenth."""


def short(label: str) -> str:
    """A method as a grid writes it, its controls by their bare names."""
    return label.removeprefix(CONTROLS)


def value(score: Score) -> str:
    """ "98.3 %", "−1.4" (points, with a sign), "24.1" (CLIP score), "0.213"."""
    if score.unit == "share":
        return f"{100 * score.value:.1f} %"
    if score.unit in TENTHS:
        return _minus(f"{score.value:.1f}")
    return signed(score.value) if score.unit == "points" else _minus(f"{score.value:.3f}")


def interval(score: Score) -> str:
    """ "91.1 to 99.7", in the unit of `value`."""
    if score.unit == "share":
        return f"{100 * score.low:.1f} to {100 * score.high:.1f}"
    if score.unit == "points":
        return f"{signed(score.low)} to {signed(score.high)}"
    digits = 1 if score.unit in TENTHS else 3
    return _minus(f"{score.low:.{digits}f} to {score.high:.{digits}f}")


def _minus(text: str) -> str:
    """With the real minus sign, as `signed`."""
    return text.replace("-", "−")


def signed(points: float) -> str:
    """A difference of shares in points, with a real minus sign: "+3.1", "−1.4", "0.0"."""
    text = f"{100 * points:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def count(score: Score) -> str:
    """ "60", or "58 (2 undetermined)"."""
    return f"{score.n} ({score.undetermined} undetermined)" if score.undetermined else str(score.n)


def targets(result: Result) -> str:
    """ "“cat” and “dog”", "“cat”, “dog”, “cow” and 47 more"."""
    names = _few([f"“{concept.name}”" for concept in Task.parse(result.task).targets])
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def verdict(result: Result) -> str:
    """One paragraph: what happened to the target and to everything else, each with its interval; and what spoils the finding."""
    if result.finding:
        return f"{result.finding[:1].upper()}{result.finding[1:]}."
    target, others = result.line("target.ESR-1"), result.line("others.PSR-1")
    if target is None:
        return f"Nothing was judged: no detector looked at the pictures. {_moved(result)}".strip()
    sentences = [_gone(result, target)]
    if others is not None:
        sentences.append(_kept(others))
    return " ".join([*sentences, *_spoilers(result, target)])


def headline(result: Result) -> str:
    """The verdict in a few words: "“cat” is erased, and other concepts are kept"."""
    if result.finding:
        return result.finding
    target, others = result.line("target.ESR-1"), result.line("others.PSR-1")
    if target is None:
        return f"{targets(result)}: not judged"
    before = target.contrast.before
    if before.value > 1 - SHOWN:
        return f"{targets(result)}: the un-erased model shows it in {100 * (1 - before.value):.0f} % of the pictures only, too few to tell"
    first = f"{targets(result)} {_verb(result)} {_degree(target)}"
    return first if others is None else f"{first}, and other concepts are {_harm(others)}"


def _verb(result: Result) -> str:
    return "is" if len(Task.parse(result.task).targets) == 1 else "are"


def _degree(line: Line) -> str:
    share = line.contrast.after.value
    if line.contrast.before.value > 1 - SHOWN:
        return "too rarely drawn by the un-erased model to tell"
    if share >= ERASED:
        return "erased"
    return "partly erased" if share >= PARTLY and line.contrast.change.low > 0 else "not erased"


def _harm(line: Line) -> str:
    loss = -line.contrast.change.value
    return "kept" if loss <= KEPT else "somewhat hurt" if loss <= HURT else "badly hurt"


def _gone(result: Result, line: Line) -> str:
    before, after = line.contrast.before, line.contrast.after
    return (
        f"{targets(result)} {_verb(result)} {_degree(line)}: no longer seen in {value(after)} of {after.n} pictures that ask for it "
        f"(95 % interval {interval(after)}; before the edit {value(before)})."
    )


def _kept(line: Line) -> str:
    before, after, change = line.contrast.before, line.contrast.after, line.contrast.change
    return (
        f"Other concepts are {_harm(line)}: {value(after)} of {after.n} pictures still show what was asked for "
        f"({interval(after)}; before {value(before)}; a change of {value(change)} points, {interval(change)})."
    )


def _spoilers(result: Result, target: Line) -> list[str]:
    """What makes the two numbers say less than they seem to."""
    found = []
    if target.contrast.before.value >= UNSURE:
        found.append(f"But the un-erased model itself fails to show it in {value(target.contrast.before)} of the same pictures.")
    blank = result.line("others.blank")
    if blank is not None and blank.contrast.after.value >= UNSURE:
        found.append(f"In {value(blank.contrast.after)} of the other pictures nothing at all is recognised: the model is damaged.")
    return found


def _moved(result: Result) -> str:
    shares = [f"{100 * change.relative:.0f} % for {change.distance.name}" for change in result.changes]
    if not shares:
        return ""
    return f"Measured by pixels (100 % is as different as two unrelated pictures), the pictures moved by {', '.join(shares)}."


def heading(task: str) -> str:
    """ "object: cat", "style: modern", "object: cat, dog, cow, 47 more"."""
    targets = Task.parse(task).targets
    return f"{targets[0].kind}: {', '.join(_few([concept.name for concept in targets]))}"


def _few(names: list[str]) -> list[str]:
    """The names; of many the first few, and how many more there are."""
    return [*names[:NAMED], f"{len(names) - NAMED} more"] if len(names) > MOST else names


def spread(value: float | None, around: float | None) -> str:
    """A published number or one beside it: "98.63", "98.63 ± 1.15", "0.0236", "not measured"; below 1 with up to four digits."""
    if value is None:
        return "not measured"
    texts = [_digits(number, abs(value) < 1) for number in (value, around) if number is not None]
    return " ± ".join(texts)


def _digits(value: float, small: bool) -> str:
    whole, _, behind = f"{value:.{4 if small else 2}f}".partition(".")
    return f"{whole}.{behind[:2]}{behind[2:].rstrip('0')}"


def number(value: float | None) -> str:
    """ "8,480", "273", "0.02"."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def size(value: float | None) -> str:
    """Bytes in decimal units: "2.52 MB"."""
    if value is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"

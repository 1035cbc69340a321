"""What is asked: concepts, swaps of a target for an anchor, and the task made of them.

All are frozen values with one text form, so that a task can be written on a command line, stored in a card and read back:

    cat                             erase the object "cat" towards nothing
    style:van gogh -> a painting    erase a style towards "a painting"
    cat; dog | keep tiger, lion     two targets, two concepts to keep
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from efface.core.errors import InvalidTask, suggest

Kind = Literal["object", "style", "identity", "unsafe", "other"]
KINDS: tuple[str, ...] = get_args(Kind)
NAMED, MOST = 3, 6
"""How many targets `Task.brief` names where there are more than `MOST`."""
_RESERVED = ("->", ";", "|", ",", "\n")


@dataclass(frozen=True)
class Concept:
    """Something that a text-to-image model can draw.

    Raises InvalidTask: the name is blank, holds one of the text form's separators, or the kind is unknown.
    """

    name: str
    """The name, in plain words: "cat", "van gogh"."""
    kind: Kind = "object"
    """object | style | identity | unsafe | other."""
    prompts: tuple[str, ...] = ()
    """Texts that stand for the concept in a method; empty means the name itself."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidTask(f"concept {self.name!r} has the unknown kind {self.kind!r}; {suggest(str(self.kind), KINDS)}")
        if self == Concept.nothing():
            return
        if not self.name.strip():
            raise InvalidTask("a concept needs a name, and it was blank; name what to erase or keep, such as 'cat'")
        bad = [mark for mark in _RESERVED if mark in self.name]
        if bad:
            raise InvalidTask(f"the concept name {self.name!r} holds {bad[0]!r}, which separates concepts in a task's text; remove it")
        if self.name != self.name.strip():
            object.__setattr__(self, "name", self.name.strip())

    @classmethod
    def nothing(cls) -> Concept:
        """The empty anchor: the model's unconditional prompt `""`."""
        concept = object.__new__(cls)
        for field, value in (("name", ""), ("kind", "other"), ("prompts", ("",))):
            object.__setattr__(concept, field, value)
        return concept

    @classmethod
    def parse(cls, text: str) -> Concept:
        """Reads "cat" or "style:van gogh". Raises InvalidTask."""
        prefix, colon, rest = text.partition(":")
        if not colon:
            return cls(text.strip())
        if prefix.strip() not in KINDS:
            raise InvalidTask(f"unknown concept kind {prefix.strip()!r} in {text!r}; {suggest(prefix.strip(), KINDS)}")
        return cls(rest.strip(), prefix.strip())  # type: ignore[arg-type]

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that stand for the concept in a method: `prompts`, or the name."""
        return self.prompts or (self.name,)

    @property
    def key(self) -> str:
        """What two concepts are compared by: the name without case."""
        return self.name.casefold()

    def __str__(self) -> str:
        return self.name if self.kind == "object" else f"{self.kind}:{self.name}" if self.name else ""


@dataclass(frozen=True)
class Swap:
    """A target to erase and the anchor that takes its place. Raises InvalidTask: both are the same, or the target is nothing."""

    target: Concept
    anchor: Concept = Concept.nothing()

    def __post_init__(self) -> None:
        if not self.target.name:
            raise InvalidTask("the target of an erasure was empty; name what to erase, such as 'cat'")
        if self.target.key == self.anchor.key:
            raise InvalidTask(f"{self.target.name!r} was to be replaced by itself; choose another anchor, or leave it out")

    def __str__(self) -> str:
        return f"{self.target} -> {self.anchor}" if self.anchor.name else str(self.target)


@dataclass(frozen=True)
class Task:
    """What to erase and what must stay.

    Raises InvalidTask: nothing to erase, a concept listed twice, a concept both erased and kept.
    """

    erase: tuple[Swap, ...]
    keep: tuple[Concept, ...] = ()

    def __post_init__(self) -> None:
        if not self.erase:
            raise InvalidTask("a task without a target; name at least one concept to erase, such as 'cat'")
        targets = [swap.target.key for swap in self.erase]
        kept = [concept.key for concept in self.keep]
        for role, keys in (("erase", targets), ("keep", kept)):
            twice = sorted({key for key in keys if keys.count(key) > 1})
            if twice:
                raise InvalidTask(f"{twice[0]!r} stands more than once in `{role}`; list each concept once")
        both = sorted(set(targets) & set(kept))
        if both:
            raise InvalidTask(f"{both[0]!r} is to be erased and also in `keep`; remove it from one of the two")

    @classmethod
    def of(
        cls,
        erase: str | Concept | Swap | Task | Iterable[str | Concept | Swap],
        keep: str | Iterable[str | Concept] = (),
        *,
        resolve: Callable[[str], Concept] = Concept.parse,
    ) -> Task:
        """Builds a task from texts, concepts or swaps, or from a task, to whose own `keep` the given one is added.

        `resolve` turns a text into a concept (see `efface.concepts`). Raises InvalidTask."""
        if isinstance(erase, Task):
            more = _kept(keep, resolve)
            return cls(erase.erase, (*erase.keep, *more)) if more else erase
        swaps: list[Swap] = []
        for item in [erase] if isinstance(erase, (str, Concept, Swap)) else erase:
            if isinstance(item, str):
                body, _, tail = item.partition("|")
                swaps += [_swap(part, resolve) for part in body.split(";")]
                keep = _joined(keep, tail)
            else:
                swaps.append(item if isinstance(item, Swap) else Swap(item))
        return cls(tuple(swaps), _kept(keep, resolve))

    @classmethod
    def parse(cls, text: str) -> Task:
        """Reads the text form that `str(task)` writes. Raises InvalidTask."""
        return cls.of(text)

    @property
    def targets(self) -> tuple[Concept, ...]:
        return tuple(swap.target for swap in self.erase)

    @property
    def texts(self) -> dict[str, str]:
        """Each text to erase, and the text of its anchor ("" for nothing)."""
        return {text: swap.anchor.texts[0] for swap in self.erase for text in swap.target.texts}

    @property
    def brief(self) -> str:
        """The text form, of more than `MOST` targets the first `NAMED` and how many more there are: for tables, not to be read back."""
        if len(self.erase) <= MOST:
            return str(self)
        return f"{'; '.join(str(swap) for swap in self.erase[:NAMED])} and {len(self.erase) - NAMED} more"

    def __str__(self) -> str:
        text = "; ".join(str(swap) for swap in self.erase)
        return f"{text} | keep {', '.join(str(c) for c in self.keep)}" if self.keep else text


def _swap(text: str, resolve: Callable[[str], Concept]) -> Swap:
    target, _, anchor = text.partition("->")
    if not target.strip():
        raise InvalidTask(f"no target to erase in {text!r}; write 'cat' or 'cat -> dog'")
    return Swap(resolve(target.strip()), resolve(anchor.strip()) if anchor.strip() else Concept.nothing())


def _kept(keep: str | Iterable[str | Concept], resolve: Callable[[str], Concept]) -> tuple[Concept, ...]:
    listed = keep.split(",") if isinstance(keep, str) else keep
    return tuple(resolve(k) if isinstance(k, str) else k for k in listed if k != "")


def _joined(keep: str | Iterable[str | Concept], tail: str) -> str | Iterable[str | Concept]:
    if not tail.strip():
        return keep
    if not tail.strip().startswith("keep "):
        raise InvalidTask(f"expected 'keep a, b' after '|', and got {tail.strip()!r}")
    words = [word.strip() for word in tail.strip().removeprefix("keep ").split(",")]
    return [*(keep.split(",") if isinstance(keep, str) and keep else keep), *words]

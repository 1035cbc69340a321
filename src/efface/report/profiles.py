"""What a method says of itself: its card, taken apart into idea, workings, cost and limits, and what its class declares."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from efface.core import catalog
from efface.core.edit import Edit
from efface.core.errors import InvalidMethod
from efface.core.method import Method, Needs, Paper

COSTS = re.compile(r"^(Nothing is )?[Tt]rained|[.] Trained: |\bstep costs\b|\bfit draws\b")
"""What a paragraph of a card holds that tells what is trained and what a fit costs."""
ITEM = re.compile(r"(- |\d\. )")
LIMITS = "Known failures: "
RECONSTRUCTION = re.compile(r"RECONSTRUCTION|^A reconstruction|Not a reproduction", re.MULTILINE)
"""What a card says where neither code nor full text of the paper could be had."""
KEEP = {
    "preserved": "kept concepts enter the objective",
    "candidates": "kept concepts join the words that the method searches",
    "measured only": "kept concepts are measured and nothing more",
}
"""What `keep` does, by the word in `Needs`."""
USES = {
    "weight": "The result is a change of weights, which can be baked in and exported.",
    "low-rank": "The result is an adapter: small, stackable, and exported as a LoRA where nothing gates it.",
    "feature": "The result is a hook on the network's features: the weights stay as they are, and whoever runs the model can leave it out.",
    "sampling": "The result is a rule of the sampler: nothing is fitted, and whoever draws can leave it out.",
}
"""What each kind of edit is good for."""


@dataclass(frozen=True)
class Profile:
    """A method of the catalogue, or of a third party."""

    name: str
    title: str
    """What the field calls it: "AP"."""
    idea: str
    """One sentence."""
    workings: tuple[str, ...]
    """Paragraphs of the card: formula, symbols, and where we depart from paper or code. Indented ones are formulas."""
    cost: tuple[str, ...]
    """Paragraphs about what is trained and what a fit costs."""
    limits: str
    reconstruction: bool
    """Whether parts of it are ours because neither the paper's text nor its code could be had."""
    needs: Needs
    paper: Paper
    kinds: tuple[str, ...]
    """The kinds of edit that a fit may return; none where the method does not say."""
    threat: str
    trains: str
    """The parameter groups (`Method.trained`)."""
    fields: Mapping[str, str]
    """Meaning by field."""
    defaults: Mapping[str, Any]

    @property
    def uses(self) -> tuple[str, ...]:
        """When to use it, as far as its declarations tell: sentences."""
        wants = [
            f"It needs {', '.join(self.needs.assets)} to be handed in." if self.needs.assets else "",
            "It needs example pictures of the target." if self.needs.images else "",
            "" if self.needs.many else "One fit erases one concept.",
        ]
        keep = KEEP[self.needs.keep]
        return (*(USES[kind] for kind in self.kinds if kind in USES), f"What `keep` does: {keep}.", *filter(None, wants))


def profile(name: str) -> Profile | None:
    """The profile of a method's name or dotted path, with its defaults; None for a third party's that is not installed here."""
    try:
        return described(catalog.method(name))
    except InvalidMethod:
        return None


def described(method: Method) -> Profile:
    """The profile of a method with the fields that it has."""
    cls = type(method)
    title, idea, paragraphs = _taken_apart(cls)
    costs = tuple(text for text in paragraphs if COSTS.search(text))
    limits = next((text for text in paragraphs if text.startswith(LIMITS)), "")
    kinds = edits(cls)
    return Profile(
        name=cls.name(),
        title=title,
        idea=idea,
        workings=tuple(text for text in paragraphs if text not in costs and text != limits),
        cost=costs,
        limits=_sentence(limits.removeprefix(LIMITS)),
        reconstruction=bool(RECONSTRUCTION.search(card(cls))),
        needs=cls.needs,
        paper=cls.paper,
        kinds=tuple(kind.kind for kind in kinds),
        threat="; or ".join(kind.threat for kind in kinds) or "depends on the edit that it returns; see its card",
        trains=", ".join(method.trained()) or "nothing",
        fields={name: " ".join(text.split()) for name, text in cls.field_docs().items()},
        defaults={field.name: field.default for field in dataclasses.fields(cls)},  # type: ignore[arg-type]
    )


def flowing(text: str) -> str:
    """A paragraph without its line breaks, but for those of a list: an item goes on in indented lines, and ends at one that is not."""
    blocks: list[str] = []
    for line in text.splitlines():
        if ITEM.match(line):
            blocks.append(f"\n{line.strip()}" if blocks else line.strip())
        elif blocks and (line.startswith(" ") or not ITEM.match(blocks[-1].lstrip("\n"))):
            blocks[-1] += f" {line.strip()}"
        else:
            blocks.append(f"\n\n{line.strip()}" if blocks else line.strip())
    return "".join(blocks)


def is_code(paragraph: str) -> bool:
    """Whether a paragraph of a card is a formula: indented throughout."""
    return all(line.startswith("  ") for line in paragraph.splitlines() if line.strip())


def _taken_apart(cls: type[Method]) -> tuple[str, str, list[str]]:
    """(title, idea, the other paragraphs) of a card; the class's own first line where the module has none."""
    first, *rest = [part.strip("\n") for part in re.split(r"\n\s*\n", card(cls))]
    if _shares_its_card(cls):
        return cls.__name__, _sentence(inspect.cleandoc(cls.__doc__ or cls.__name__).partition("\n\n")[0]), rest
    head, _, idea = flowing(first).partition(": ")
    return _sentence(head.partition(",")[0].removeprefix("The ").strip()), _sentence(idea or head), rest


def _shares_its_card(cls: type[Method]) -> bool:
    """Whether its module holds several methods, as that of the controls does."""
    module = inspect.getmodule(cls)
    found = [each for each in vars(module).values() if inspect.isclass(each) and issubclass(each, Method) and not inspect.isabstract(each)]
    return sum(each.__module__ == cls.__module__ for each in found) > 1


def card(cls: type[Method]) -> str:
    """What a method says of itself, whole: the docstring of its module, or of the class."""
    return inspect.cleandoc(inspect.getmodule(cls).__doc__ or cls.__doc__ or cls.name())


def _sentence(text: str) -> str:
    text = flowing(text)
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def edits(cls: type[Method]) -> list[type[Edit]]:
    """The kinds of edit that `fit` is declared to return; none where it may be any."""
    declared = get_type_hints(cls.fit)["return"]
    return [kind for kind in get_args(declared) or (declared,) if inspect.isclass(kind) and issubclass(kind, Edit) and kind is not Edit]

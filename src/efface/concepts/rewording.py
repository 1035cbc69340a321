"""Prompts that name one concept in the place of another: what Concept Ablation asks for on the pictures of an anchor."""

from __future__ import annotations

import re
from collections.abc import Sequence

from efface.concepts.vocabulary import read
from efface.core.errors import InvalidTask
from efface.core.task import Concept, Swap, Task

FORMS = ("{}", "a picture of {}", "an image of {}", "a drawing of {}", "{} on a white background", "{} on a blue background")
"""Anchor prompts where the anchor concept has none of its own."""
PHRASES = {
    "compvis": (
        *("{p}, in the style of {t}", "{t} inspired painting, {p}", "in {t}'s style, {p}"),
        *("{p}, in the style of {t} {t}", "{t} {t} inspired painting, {p}", "in {t} {t}'s style, {p}"),
    ),
    "diffusers": ("{p}, in the style of {t}", "in {t}'s style, {p}", "in {t}'s style, {p}"),
    "ours": ("{p} in {t} style", "{a}", "{p}, in the style of {t}"),
}
"""How a style is named: {p} is the anchor prompt, {t} the style, {a} "a retro cat"; what stands twice is drawn twice as often."""
ADDED = ("{t}, {p}", "in {t} style, {p}", "{p}, {t}")
Pairs = list[tuple[str, tuple[str, ...]]]
"""Anchor prompts, and for each the target prompts that may take its place."""


def pairs_of(swap: Swap, wording: str, phrases: str, things: Sequence[str]) -> Pairs:
    """The prompts of a swap, every text of the target included.

    things: what the pictures of a style show. Raises InvalidTask where the anchor, its word in one of its prompts, or prompts
    are missing."""
    anchor, target = swap.anchor, swap.target
    own = anchor.prompts if anchor.name else ()
    if wording == "given":
        if not own or not target.prompts:
            raise InvalidTask(f"concept_ablation with wording='given' needs prompts of {target.name!r} and of its anchor; give both")
        return [(prompt, target.prompts) for prompt in own]
    if wording == "style":
        return [(p, tuple(s for text in target.texts for s in styled(p, text, phrases))) for p in own or _scenes(anchor, things)]
    if wording == "add":
        if not anchor.name:
            raise InvalidTask(f"concept_ablation with wording='add' needs an anchor, such as a person; write '{target} -> person'")
        return [(p, tuple(form.format(t=text, p=p) for text in target.texts for form in ADDED)) for p in own or _forms(anchor)]
    if own:
        return [(p, tuple(replaced(p, anchor.name, target, text) for text in target.texts)) for p in own]
    plain = _forms(anchor) if anchor.name else [""] * len(FORMS)
    return [(p, tuple(form.format(named(text, target.kind)) for text in target.texts)) for p, form in zip(plain, FORMS, strict=True)]


def styled(prompt: str, style: str, phrases: str) -> tuple[str, ...]:
    """A prompt with the style named in each way; "a cat" also becomes "a retro cat", where it begins with an article."""
    article, _, rest = prompt.partition(" ")
    forms = PHRASES[phrases] if article in ("a", "an") else [form for form in PHRASES[phrases] if "{a}" not in form]
    return tuple(form.format(p=prompt, t=style, a=named(f"{style} {rest}", "object")) for form in forms)


def replaced(prompt: str, word: str, concept: Concept, text: str) -> str:
    """The prompt with a whole word, whatever its case, replaced by a text of the concept: "a dog" by "an owl", "the dog" by "the owl".

    Raises InvalidTask where the word is not there."""
    by = {True: named(text, concept.kind), False: text}
    found, count = re.subn(rf"\b(an? )?{re.escape(word)}\b", lambda m: by[m[1] is not None], prompt, flags=re.IGNORECASE)
    if not count:
        raise InvalidTask(f"concept_ablation replaces the anchor's word, and {word!r} is not in its prompt {prompt!r}; name it there")
    return found


def has_word(text: str, word: str) -> bool:
    """Whether a whole word stands in a text, whatever its case."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def named(text: str, kind: str = "object") -> str:
    """ "a cat", "an owl"; the words of the bundled world as its captions have them; names and styles as they are."""
    world = read()
    known = text in world.objects or text in {group.name for group in world.groups}
    if known:
        return world.phrase(text)
    if kind not in ("object", "unsafe") or text[:1].isupper() or text.split()[0].lower() in ("a", "an", "the"):
        return text
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def subjects(task: Task, words: Sequence[str] = ()) -> list[str]:
    """What pictures of a style show: the words, where some are given, else the objects of the bundled world; no target is among them."""
    gone = {text.casefold() for concept in task.targets for text in (concept.name, *concept.texts)}
    return [word for word in words or read().objects if word.casefold() not in gone]


def _forms(concept: Concept) -> list[str]:
    return [form.format(named(concept.texts[0], concept.kind)) for form in FORMS]


def _scenes(anchor: Concept, things: Sequence[str]) -> list[str]:
    """Things, or with an anchor pictures of them: "a painting of a cat"."""
    return [f"{named(anchor.name)} of {named(thing)}" if anchor.name else named(thing) for thing in things]

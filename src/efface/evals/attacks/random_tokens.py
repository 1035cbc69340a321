"""Random tokens: words drawn at random before the prompt. What a search for tokens must beat, beside the plain prompt's other seeds.

T1, black-box prompts. No paper; `random` of UnlearnDiffAtk's code (arXiv 2310.11868) is the same. Whatever stands before a prompt moves its
encoding, and some of what moves it brings a concept back by chance; an attack by gradients has found something where it finds more than
this with as many candidates.

Cost: the first two pictures of each prompt and `candidates` more, 2 steps forwards each with guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from efface.core import pictures, tokens
from efface.core.evidence import Access, Threat
from efface.core.method import Paper
from efface.core.model import Model
from efface.core.search import Hunt, Search
from efface.ops.hardprompt import Layout, prefixed


@final
@dataclass(frozen=True)
class RandomTokens(Search):
    """Draws the prompt behind random words, from its own noise."""

    access: ClassVar[Access] = "prompts"
    threat: ClassVar[Threat] = "T1"
    paper: ClassVar[Paper] = Paper("Control: random tokens before the prompt", "", "")

    k: int = 3
    """Tokens before the prompt, as in `unlearndiffatk`."""
    candidates: int = 10
    """C, how many draws for each prompt; that of `unlearndiffatk`."""
    alphabet: tokens.Alphabet = "words"
    """What may be drawn: "words" or "tokens"."""

    def __post_init__(self) -> None:
        self.check_counts(k=1, candidates=1)
        self.check("alphabet", self.alphabet in ("words", "tokens"), "words or tokens")

    def hunt(self, hunt: Hunt) -> None:
        model, letters = hunt.after, tokens.alphabet(hunt.after, self.alphabet)
        layout = Layout.of([prefixed(body, self.k) for body in tokens.bodies(model, hunt.prompts)], tokens.frame(model))
        for _ in range(self.candidates):
            rows = hunt.rest
            if not rows or not hunt.affords(hunt.drawing(len(rows))):
                return
            prompts, free = layout.take(rows)
            picks = letters[torch.randint(len(letters), (len(free),), generator=hunt.generator)]
            hunt.try_prompts(rows, model.spell(prompts.with_ids(picks)))

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        return {"forwards": pictures.drawing(model, (2 + self.candidates) * prompts)}

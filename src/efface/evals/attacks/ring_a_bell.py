"""Ring-A-Bell: prompts whose encoding lies where the concept's direction points, found by a genetic search; no diffusion model is used.

Tsai et al., "Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?", ICLR 2024, arXiv 2310.10012; read in
`chiayi-hsu/Ring-A-Bell` (Get_Concept_Vector.ipynb, InversePrompt.ipynb). T1, black-box prompts: the un-erased text encoder is enough.

    v = mean_i [τ(with_i) − τ(without_i)],   e* = τ(prompt) + η v,   min over K tokens of Σ (e* − τ([K tokens]))²

All l positions count. A generation keeps the better half, crosses it, and mutates it (`ops.evolve`); the best individual after the last
one is spelt out and drawn by the erased model. All prompts are searched at once, each with a population of its own.

Cost: no sample of a denoiser but for the pictures; generations · population text encodings a prompt (authors: 3000 · 200; here 60 · 40).

Departures: the pairs are our own sentences with and without the concept's name (`pairs` takes others; the authors use 30 pairs, for
nudity filtered by what the model draws); the best individual is kept (`elite`, 0 with the authors, whose best may be lost to a mutation);
whole words by default. A longest K that fits the encoder is taken where K is longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from efface.core import pictures, tokens
from efface.core.evidence import Access, Threat
from efface.core.method import Paper
from efface.core.model import Model
from efface.core.search import Hunt, Search
from efface.core.tokens import Alphabet
from efface.ops import evolve
from efface.ops.hardprompt import Frame, Layout

CHUNK = 512
"""Texts encoded at once."""


@final
@dataclass(frozen=True)
class RingABell(Search):
    """A genetic search for tokens near the prompt's encoding plus the concept's direction."""

    access: ClassVar[Access] = "prompts"
    threat: ClassVar[Threat] = "T1"
    paper: ClassVar[Paper] = Paper(
        title="Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?",
        authors="Tsai, Hsu, Xie, Lin, Chen, Li, Chen, Yu, Huang",
        venue="ICLR 2024",
        arxiv="2310.10012",
        code="chiayi-hsu/Ring-A-Bell",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "authors": {"population": 200, "generations": 3000, "elite": 0, "alphabet": "tokens", "candidates": 1}
    }

    strength: float = 3.0
    """η; the notebook's, and 3 to 5.5 in the paper."""
    tokens: int = 16
    """K, the tokens of a prompt; the paper's are 16, 38 and 77."""
    population: int = 40
    """Individuals a prompt, about; the authors' is 200."""
    generations: int = 60
    """The authors' is 3000."""
    candidates: int = 4
    """Pictures tried a prompt: of the best individual at so many equidistant generations, the last included. The authors' is 1."""
    cross: float = 0.5
    """Probability that a parent is crossed."""
    mutate: float = 0.25
    """Probability that an individual is mutated."""
    elite: int = 1
    """1: the best is never mutated; 0: nothing is spared, as in the authors' code."""
    alphabet: Alphabet = "words"
    """What may be drawn: "words" or "tokens" (the authors')."""
    pairs: tuple[tuple[str, str], ...] = ()
    """(with, without) the concept; by default sentences with and without its name."""

    def __post_init__(self) -> None:
        self.check_counts(tokens=1, population=4, generations=1, candidates=1)
        self.check_rates("strength")
        self.check("elite", self.elite in (0, 1), "0 or 1")
        for name in ("cross", "mutate"):
            self.check(name, 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        self.check("alphabet", self.alphabet in ("words", "tokens"), "words or tokens")
        self.check("candidates", self.candidates <= self.generations, "at most one for each generation")

    def hunt(self, hunt: Hunt) -> None:
        model, around = hunt.before, tokens.frame(hunt.before)
        letters, length = tokens.alphabet(model, self.alphabet), min(self.tokens, around.length - 2)
        pairs = self.pairs or default_pairs(hunt.concept.name)
        with torch.no_grad():
            goals = model.encode(list(hunt.prompts)).tokens.float() + self.strength * direction(model, pairs)
        start = lambda: evolve.population(self.population, length, letters, hunt.generator)  # noqa: E731
        crowds = {row: start() for row in hunt.rest}
        encoded, curve = 0, []
        for generation in range(1, self.generations + 1):
            rows = hunt.rest
            if not rows:
                break
            scores = fitness(model, [crowds[row] for row in rows], goals[rows], around)
            encoded += sum(map(len, scores))
            curve.append(float(torch.stack([s.min() for s in scores]).mean()))
            best = {row: evolve.parents(crowds[row], score, self.population // 2) for row, score in zip(rows, scores, strict=True)}
            if self.due(generation):
                if not hunt.affords(hunt.drawing(len(rows))):
                    break
                hunt.try_prompts(rows, model.spell(written(torch.stack([best[row][0] for row in rows]), around)))
            crowds |= {row: self.bred(best[row], letters, hunt.generator) for row in rows}
        hunt.details |= {"text_encodings": encoded, "fitness": [round(value, 4) for value in curve], "pairs": [list(p) for p in pairs]}

    def due(self, generation: int) -> bool:
        """Whether the best of this generation is drawn: `candidates` times, evenly, the last time at the end."""
        return generation * self.candidates // self.generations > (generation - 1) * self.candidates // self.generations

    def bred(self, best: Tensor, letters: Tensor, generator: torch.Generator) -> Tensor:
        """The next generation (m K)."""
        return evolve.mutated(evolve.children(best, self.cross, generator), self.mutate, letters, generator, elite=self.elite)

    def cost(self, model: Model, prompts: int) -> dict[str, float]:
        return {"forwards": pictures.drawing(model, (2 + self.candidates) * prompts)}


def default_pairs(name: str) -> tuple[tuple[str, str], ...]:
    """Sentences with and without a name."""
    scenes = ("", " on a red background", " on a blue background", " in a garden", " beside a house", " on a table")
    return tuple((f"{head} {name}{scene}", f"{head} thing{scene}") for head in ("a", "a picture of a") for scene in scenes)


@torch.no_grad()
def direction(model: Model, pairs: tuple[tuple[str, str], ...]) -> Tensor:
    """v (l d): the mean difference of the encodings, over whole padded prompts."""
    present, absent = (model.encode([pair[side] for pair in pairs]).tokens.float() for side in (0, 1))
    return (present - absent).mean(0)


def written(members: Tensor, around: Frame) -> Tensor:
    """The prompts (n l) of rows of tokens (n K)."""
    return Layout.of(members.tolist(), around).ids


@torch.no_grad()
def fitness(model: Model, crowds: list[Tensor], goals: Tensor, around: Frame) -> list[Tensor]:
    """Σ (e* − τ)² of every individual, population by population; lower is better."""
    sizes = [len(crowd) for crowd in crowds]
    ids = written(torch.cat(crowds), around)
    wanted = torch.arange(len(crowds)).repeat_interleave(torch.tensor(sizes))
    found = [
        evolve.squared(model.encode_tokens(part).tokens.float(), goals[rows.to(goals.device)])
        for part, rows in zip(ids.split(CHUNK), wanted.split(CHUNK), strict=True)
    ]
    return list(torch.cat(found).cpu().split(sizes))

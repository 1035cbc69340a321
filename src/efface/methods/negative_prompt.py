"""The negative prompt: guidance away from the concept instead of away from nothing. The null baseline that every method must beat.

    ε = ε(c_e) + s (ε(p) − ε(c_e))

in the place of ε(∅) + s (ε(p) − ε(∅)), with p the prompt, c_e the concept and s the guidance scale (Ho & Salimans, arXiv 2207.12598): what
every pipeline calls `negative_prompt`. Several targets become one text with commas between them; nothing is said for `keep`, and an
anchor is refused.

Trained: nothing; a fit calls no denoiser. Sampling costs what it cost before: two forwards a row and step. The sheet that asked for it
(SD-NP in the k-SAE paper's table) reports it to beat several published methods on nudity, as re-measured there and not by us.

Known failures: on the prompt that is the concept alone both halves are equal, and what is drawn is the concept without guidance; the more a
prompt says beside the concept, the better it works. It is a setting of the sampler that whoever draws can leave out; it does nothing
without guidance (refused at a scale of 1); the bare denoiser is un-erased, so that attacks on it are refused; it moves every prompt,
related or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from efface.core.edit import SamplingEdit
from efface.core.fitting import fitting
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Model
from efface.core.rules import NegativePrompt, away_from
from efface.core.task import Task


@final
@dataclass(frozen=True)
class NegativePromptBaseline(Method):
    """The negative prompt."""

    needs: ClassVar[Needs] = Needs(keep="measured only")
    paper: ClassVar[Paper] = Paper(
        title="Classifier-Free Diffusion Guidance (the negative prompt is a practice of its users)",
        authors="Ho, Salimans",
        venue="NeurIPS 2021 workshop",
        arxiv="2207.12598",
    )

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> SamplingEdit:
        with fitting(self, model, task, seed, resources) as fit:
            (text,) = away_from(model, task, joined=True)
            return SamplingEdit(NegativePrompt(text), fit.card())

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Nothing: a text is looked up."""
        return {"steps": 0, "forwards": 0, "backwards": 0}

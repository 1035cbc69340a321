"""SLD, safe latent diffusion: a third condition that guides away from the concept, only where the prompt heads towards it.

With ε_u, ε_p, ε_s the noise for nothing, the prompt and the safety text, at step i and element by element:

    μ = min(1, |s_S (ε_p − ε_s)|) where ε_p − ε_s < λ, else 0
    g_s = μ (ε_s − ε_u) + s_m ν;    ν ← β_m ν + (1 − β_m) g_s;    ε = ε_u + s_g (ε_p − ε_u − [i ≥ δ] g_s)

s_S = `strength`, λ = `threshold`, s_m = `momentum`, β_m = `momentum_decay`, δ = `warmup`, s_g the guidance scale. ν starts at 0 with each
trajectory and moves in the warm-up too. `core.rules.SafeLatent` computes it, by rewriting the conditional half to ε_p − g_s, which is the
same at every s_g.

Trained: nothing; a fit calls no denoiser. Sampling costs 3 forwards a row and step in the place of 2 (2 + n for n separate texts).

The presets "weak", "medium" (the default), "strong" and "max" are the paper's four; "diffusers-weak" is diffusers' weaker reading of the
first (s_S = 20 where the paper's, known to us through UCE's script, is 200). The safety text is the bare list of concepts in the authors'
code and the list behind "an image showing" in diffusers, which is our default: the bare text has no effect at all on the prompt that
is the concept alone, since ε_p = ε_s there. "authors" is "medium" with the bare list. Several concepts are one list with commas, as in the
authors' own safety text; `joined=False` gives each a guidance of its own, which is ours.

Departures: at a guidance of 1, where the authors' pipeline switches the safety off, the conditional half is still rewritten; networks
that predict velocity are guided in noise, which the authors' pipeline (SD 1.x) never meets. The warm-up goes by the time and not by
counting calls: with 50 DDIM steps it is the authors', step for step; with other numbers of steps it stays the same share of the
schedule, where theirs would cover half of a 20-step sampler; with PNDM, which asks twice for one time, it ends one step later.

Known failures: a setting of the sampler, which whoever draws can leave out; the bare denoiser is un-erased, so that attacks on it are
refused; strong settings move the composition of harmless prompts; weak on objects (in MACE's tables an accuracy of 84 % remains).
The paper's text was not read; the formulas are those of its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from efface.core.edit import SamplingEdit
from efface.core.fitting import fitting
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Model
from efface.core.rules import SafeLatent, away_from
from efface.core.task import Task

WEAK = {"warmup": 15, "strength": 200.0, "threshold": 0.0, "momentum": 0.0, "momentum_decay": 0.0}


@final
@dataclass(frozen=True)
class SLD(Method):
    """Safe latent diffusion."""

    needs: ClassVar[Needs] = Needs(keep="measured only")
    paper: ClassVar[Paper] = Paper(
        title="Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models",
        authors="Schramowski, Brack, Deiseroth, Kersting",
        venue="CVPR 2023",
        arxiv="2211.05105",
        code="ml-research/safe-latent-diffusion",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": {"prefix": ""},
        "weak": WEAK,
        "medium": {},
        "strong": {"warmup": 7, "strength": 2000.0, "threshold": 0.025, "momentum": 0.5, "momentum_decay": 0.7},
        "max": {"warmup": 0, "strength": 5000.0, "threshold": 1.0, "momentum": 0.5, "momentum_decay": 0.7},
        "diffusers-weak": {**WEAK, "strength": 20.0},
    }

    warmup: int = 10
    """Steps before the guidance sets in (δ), of the sampler's `warmup_of`; at most these."""
    strength: float = 1000.0
    """How fast the guidance saturates (s_S, the code's `sld_guidance_scale`); below 1 it is off."""
    threshold: float = 0.01
    """Where the prompt counts as heading towards the concept: ε_p − ε_s below it, in units of noise (λ)."""
    momentum: float = 0.3
    """Weight of the momentum (s_m)."""
    momentum_decay: float = 0.4
    """How much of the momentum stays from step to step (β_m); 0 to 1."""
    prefix: str = "an image showing"
    """What stands before the concepts in the safety text: diffusers' words, or "" (the authors' code)."""
    joined: bool = True
    """Whether all targets are one text with commas, or each has a guidance and a forward of its own."""
    warmup_of: int = 50
    """The number of steps n that δ is counted in: the guidance sets in at times below the share 1 − δ/n of the schedule."""

    def __post_init__(self) -> None:
        self.check_fields(at_least={"warmup": 0, "warmup_of": 1}, from_zero=("strength", "momentum", "momentum_decay"))
        self.check_field("threshold", abs(self.threshold) < float("inf"), "a finite number")
        self.check_field("momentum_decay", self.momentum_decay <= 1, "a number from 0 to 1")
        self.check_field("warmup", self.warmup <= self.warmup_of, f"at most warmup_of = {self.warmup_of}")

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> SamplingEdit:
        with fitting(self, model, task, seed, resources) as fit:
            rule = self.rule(away_from(model, task, joined=self.joined, prefix=self.prefix))
            # The prompt that is the safety text itself is left as it is, so that it cannot show whether the edit acts.
            probes = tuple(p if p not in rule.texts else f"a picture of {p}" for p in fit.card().probes)
            return SamplingEdit(rule, replace(fit.card(), probes=probes))

    def rule(self, texts: list[str]) -> SafeLatent:
        """The sampling rule for these safety texts."""
        return SafeLatent(
            texts,
            warmup=self.warmup,
            strength=self.strength,
            threshold=self.threshold,
            momentum=self.momentum,
            momentum_decay=self.momentum_decay,
            warmup_of=self.warmup_of,
        )

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Nothing: texts are looked up."""
        return {"steps": 0, "forwards": 0, "backwards": 0}

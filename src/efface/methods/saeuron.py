"""SAeUron: finds the latents of a sparse autoencoder that fire for a concept, and turns them round wherever they fire.

An autoencoder (`efface sae train`) explains the output x of one block of the denoiser, at every place, by a few of n latents:
a = ReLU(W_enc (x − b_dec) + b_enc), z = TopK(a), x̂ = zᵀ W_dec + b_dec. With μ_i(t, D) the mean of z_i over places and pictures of D at t:

    s_i(t) = μ_i(t, D_c) / Σ_j μ_j(t, D_c) − μ_i(t, D_¬c) / Σ_j μ_j(t, D_¬c);     F(t) = the latents of the highest scores
    z'_i   = γ μ_i(t, D_c) z_i  where i ∈ F(t) and z_i > μ̄_i(t), the mean over all concepts;  z_i elsewhere
    x'     = x + Σ_i (z'_i − z_i) W_dec[i]

c is the target; ¬c are the concepts of `keep` and, by `contrast`, others of its kind from `concepts/`, or the words that are given as
the vocabulary. An anchor has no effect. Several targets are merged; of a latent chosen for two the larger factor counts.

Nothing is trained: the autoencoder is handed in (`Resources.assets["sae"]`; the bundled model has its own), and is refused where it leaves
more than `max_unexplained` of the variance of this model's features unexplained. A fit draws `samples` trajectories of each concept
(`cost`), without a gradient. While attached, a call costs the selected rows of the encoder, and the whole encoder only for places where
one of them may fire.

All concepts are drawn from the same noise, as in the code, so that what noise decides (a background, where the prompt names none) cancels
in the score.

The preset names that begin with "authors" give the released runs; their values for objects are the commonest of a sweep for each class.
Ours: `selected` in the place of a percentile of 20480 latents; fewer samples and steps.
Different from the code in all: tables are found by the nearest training time and not by a counter of calls, so that any number of steps
may be drawn, and gradients pass. Ours keeps the autoencoder's error; the code adds it with the other sign, 2x̂ − x where nothing is
ablated: `error="repo"`, with which the published numbers were presumably made. The code acts on both halves of guidance though its
statistics are of the conditional one; `halves="conditional"` is the other reading. The final paper's text could not be read.

Known failures: γ is not free of scale, since it multiplies a mean activation, so that another autoencoder needs another γ
(`scaling="none"` leaves the mean out: z' = γ z); a concept that the autoencoder never saw is not found; a concept split over many latents
needs more of them (SAEmnesia); features may leave the distribution (arXiv 2606.31699). Whoever holds the model leaves the hook out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from efface.concepts.contrast import contrast
from efface.core.autoencoder import ASSET, Autoencoder
from efface.core.edit import FeatureEdit, Part
from efface.core.errors import Unsupported
from efface.core.features import LatentAblation, LatentTable
from efface.core.fitting import Fit, fitting
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Model
from efface.core.task import Concept, Task
from efface.models.sae import Training, bundled, traced, train
from efface.ops.sae import above_percentile, most, scores

AUTHORS: dict[str, Any] = {"percentile": 99.999, "error": "repo", "latent_steps": 100, "latent_guidance": 9.0}
"""With an autoencoder of 20480 latents and γ = -1, the styles of UnlearnCanvas."""


@final
@dataclass(frozen=True)
class SAeUron(Method):
    """Ablation of sparse latents."""

    needs: ClassVar[Needs] = Needs(assets=(ASSET,), keep="candidates")
    paper: ClassVar[Paper] = Paper(
        title="SAeUron: Interpretable Concept Unlearning in Diffusion Models with Sparse Autoencoders",
        authors="Cywiński, Deja",
        venue="ICML 2025",
        arxiv="2501.18052",
        code="cywinski/SAeUron",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors-style": {**AUTHORS, "samples": 20, "strength": -1.0},
        "authors-object": {**AUTHORS, "samples": 80, "strength": -5.0},
        "check": {"samples": 2, "latent_steps": 2, "contrast": 2},
    }

    selected: int = 2
    """How many latents are ablated at each time; the authors' is 1 to 3."""
    percentile: float | None = None
    """Ablate the latents of a score above this percentile instead (τ): of 20480, 99.999, 99.995 and 99.99 give 1, 2 and 3."""
    strength: float = -1.0
    """The multiplier γ; below 0, latents are turned round. The authors' is −1 for styles, −1 to −30 for objects."""
    scaling: Literal["mean", "none"] = "mean"
    """Whether γ is multiplied by the target's mean activation (the paper), or not: z' = γ z."""
    samples: int = 8
    """Pictures of each concept for the statistics; the authors' is 20 or 80."""
    contrast: int = 24
    """How many concepts beside those of `keep` the target is told from, at most."""
    latent_steps: int = 20
    """Times at which statistics are taken; the authors' is 100."""
    latent_guidance: float | None = None
    """Guidance of the statistics' trajectories; None is the model's own, the authors' is 9."""
    error: Literal["kept", "repo"] = "kept"
    """What becomes of x − x̂: kept (the paper's text), or added with the other sign (the code)."""
    halves: Literal["both", "conditional"] = "both"
    """Which halves of guidance are changed."""
    max_unexplained: float = 0.5
    """The largest share of the variance of this model's features that the autoencoder may leave unexplained."""
    templates: tuple[str, ...] = ("{}", "a picture of {}", "an image of {}", "a drawing of {}")
    """Prompts of a concept, by turns; `{}` is its text."""
    style_templates: tuple[str, ...] = ("a picture in {} style", "a dog in {} style", "a house in {} style", "an apple in {} style")
    """Prompts of concepts of the kind "style"."""

    def __post_init__(self) -> None:
        choices = {"scaling": ("mean", "none"), "error": ("kept", "repo"), "halves": ("both", "conditional")}
        least = {"selected": 1, "samples": 1, "contrast": 1, "latent_steps": 1}
        self.check_fields(at_least=least, above_zero=("max_unexplained",), one_of=choices)
        self.check_field("strength", math.isfinite(self.strength) and self.strength < 1, "a number below 1, which would change nothing")
        self.check_field("percentile", self.percentile is None or 0 < self.percentile < 100, "above 0 and below 100, or None")
        for name in ("templates", "style_templates"):
            texts = getattr(self, name)
            self.check_field(name, bool(texts) and all(text.count("{}") == 1 for text in texts), "texts with one {} each")

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> FeatureEdit:
        with fitting(self, model, task, seed, resources) as fit:
            sae = autoencoder(model, resources)
            sae.check(model)
            concepts = (*task.targets, *contrast(task, self.contrast, resources.vocabulary))
            noise = torch.randn(self.samples, *model.latent_shape, generator=fit.generator)
            means = Means()
            for step in fit.steps(len(concepts), {"means": means}):
                fit.log(self.observe(fit, sae, concepts[step], noise, means))
            table, part = self.select(means.tensor(), len(task.targets), self.times(model))
            info = {
                "place": sae.place,
                "targets": [c.name for c in task.targets],
                "contrast": [c.name for c in concepts[len(task.targets) :]],
            }
            feature = LatentAblation(sae.net, table, self.error, self.halves)
            return FeatureEdit(
                {sae.place: feature}, fit.card(), {"latents": Part(part, {**info, "unexplained": fit.figures[0]["unexplained"]})}
            )

    def times(self, model: Model) -> list[int]:
        """The falling times of the tables."""
        return model.schedule.grid(self.latent_steps)

    def prompts(self, concept: Concept) -> list[str]:
        """One prompt for each sample: every text of the concept in every template, by turns."""
        templates = self.style_templates if concept.kind == "style" else self.templates
        texts = [template.format(text) for template in templates for text in concept.texts]
        return [texts[i % len(texts)] for i in range(self.samples)]

    @torch.no_grad()
    def observe(self, fit: Fit, sae: Autoencoder, concept: Concept, noise: Tensor, means: Means) -> dict[str, float]:
        """Adds μ(t) of one concept, drawn from the noise z_T (samples c h w).

        Raises Mismatch where the autoencoder does not explain this model's features."""
        model, scale = fit.model, self.guidance(fit.model)
        features = traced(model, sae.place, self.prompts(concept), noise, self.times(model), scale).float()
        share = sae.explains(features.flatten(0, 2), self.max_unexplained, model)
        means.rows.append(torch.stack([sae.net.codes(each.flatten(0, 1)).mean(0) for each in features]).cpu())
        return {"unexplained": share}

    def guidance(self, model: Model) -> float:
        scale = model.default_guidance if self.latent_guidance is None else self.latent_guidance
        return scale if scale > 1 else 1.0

    def select(self, means: Tensor, targets: int, times: Sequence[int]) -> tuple[LatentTable, dict[str, Tensor]]:
        """The table, and what it was made from, for means (concepts T n) of which the first are the targets'."""
        level = means.mean(0)
        factors, chosen = torch.ones_like(level), torch.zeros_like(level, dtype=torch.bool)
        found = {}
        for number in range(targets):
            score = scores(means[number], others(means, number))
            mine = most(score, self.selected) if self.percentile is None else above_percentile(score, self.percentile)
            factor = self.strength * (means[number] if self.scaling == "mean" else torch.ones_like(level))
            larger = mine & (~chosen | (factor.abs() > factors.abs()))
            factors, chosen = torch.where(larger, factor, factors), chosen | mine
            found[f"scores/{number}"] = torch.where(mine, score, 0.0).amax(0)
        return compressed(torch.tensor(times), chosen, factors, level), {**found, "level": level.mean(0)}

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact where no vocabulary is given; a step is one concept."""
        concepts = len(task.targets) + len(contrast(task, self.contrast))
        halves = 1 if self.guidance(model) == 1 else 2
        return {"steps": concepts, "forwards": concepts * self.samples * self.latent_steps * halves}

    @classmethod
    def make_assets(cls, model: Model, task: Task, *, seed: int = 0) -> Mapping[str, Any]:
        """The model's own autoencoder where it has one; else a small one, trained for a second on what the task and its contrast name."""
        found = bundled(model)
        if found is None:
            names = [c.texts[0] for c in (*task.targets, *contrast(task, 6))]
            small = Training(expansion=4, steps=30, batch=256, lr=5e-3, trajectories=4, latent_steps=4, refill=20, pool=2)
            found = train(model, [name for each in names for name in (each, f"a picture of {each}")], small, seed=seed)
        return {ASSET: found}


def autoencoder(model: Model, resources: Resources) -> Autoencoder:
    """The one that was handed in, or that comes with the model. Raises Unsupported where there is none."""
    found = resources.assets.get(ASSET) or bundled(model)
    if not isinstance(found, Autoencoder):
        raise Unsupported(
            f"saeuron needs the asset {ASSET!r}, a sparse autoencoder for {model.id}, and none was given; train one with "
            "`efface sae train` and hand it in as Resources(assets={'sae': Autoencoder.load(path)})"
        )
    return found


@dataclass
class Means:
    """μ (T n) of the concepts seen so far, in order; a checkpoint can hold it."""

    rows: list[Tensor] = field(default_factory=list)

    def tensor(self) -> Tensor:
        """(concepts T n)."""
        return torch.stack(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.rows = list(state_dict["rows"])


def others(means: Tensor, number: int) -> Tensor:
    """The mean (T n) over all concepts but one."""
    return (means.sum(0) - means[number]) / (len(means) - 1)


def compressed(times: Tensor, chosen: Tensor, factors: Tensor, level: Tensor) -> LatentTable:
    """The chosen entries of (T n) as m columns, m the most that any time has; the rest of a shorter row never fires."""
    m = max(1, int(chosen.sum(1).max()))
    flags, latents = chosen.float().topk(m, dim=1)
    used = flags > 0
    return LatentTable(
        times, latents, torch.where(used, factors.gather(1, latents), 1.0), torch.where(used, level.gather(1, latents), torch.inf)
    )

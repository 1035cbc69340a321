"""SPEED, null-space constrained erasing: moves the concepts' outputs to their anchors' by a change that the kept concepts cannot see.

With rows t of the concepts and a of their anchors, T = mean t tᵀ, A = mean a tᵀ, and for each map W a projector P on the directions in
which the second moment of the kept rows is below `threshold`:

    ΔW = argmin over D P   mean ‖(W + D P) t − W a‖² + l ‖D P‖²   subject to   D P K = 0
       = W (A − T) P (I − M Q P) M,    M = (T P + l I)⁻¹,   Q = K (Kᵀ P M K + μ I)⁻¹ Kᵀ

l = `keep_weight`, μ = `regulariser`; K holds the start token's row and three k-means centres of the other rows of the empty prompt,
whose outputs stay exactly. Preservation is a constraint where UCE has a competing term, hence the hundred concepts at once. The kept
rows of each map are
- filtered (IPF, `filter`): those that the free change W (A − T)(I + T)⁻¹ moves more than the mean does;
- augmented (DPA, `copies`): r + n v, n ~ N(0, 1), v the direction that W sees least; kept are copies that move more than their mean.

Trained: `attn2.to_v.weight` (`maps`), by two eigendecompositions and two solves a map; no step and no denoiser call. Filter and copies make
the factor another one for each map, so there is no patch. The trace holds condition numbers and how many directions are free.

Departures: means and inverses are in float64; the k-means is ours, with a fixed start (the code's gives other centres on other versions),
and the pseudo-inverse in Q allows μ = 0 where the kept rows already hold K. Without concepts to keep, the rows of the empty prompt are
kept, as in the authors' run on nudity. The paper's strengthening by adversarial rounds is not in its released script, and not here.

Ours: `general` of the model's own words (`core.words.general`; name synonyms of the target in `exclude`) can be kept as well, for users who
cannot say what is to stay. 0, the default, is the authors'.

Known failures: with few concepts to keep, the filter leaves one or two of them and the others move (the authors keep a thousand; set
`filter=False`); with nothing like the target to keep, neighbours move with it; `threshold` is in units of squared embeddings, so that
another text encoder needs another value; the values alone carry the edit, and keys still attend to the concept's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from efface.core.card import Card
from efface.core.edit import Part, WeightEdit
from efface.core.errors import Unsupported
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.core.textmaps import Texts, advising, read
from efface.core.words import general
from efface.ops.project import centres, confined, null_projector, second_moment, shift, weakest_direction
from efface.ops.rows import cut

CENTRES = 3
"""Of the empty prompt's rows behind the start token."""


def filtered(rows: Tensor, free: Tensor) -> Tensor:
    """The rows (n d) that the map `free` (o d) moves at least as much as their mean."""
    moves = (rows @ free.T).norm(dim=1)
    return rows[moves >= moves.mean()]


def augmented(rows: Tensor, free: Tensor, direction: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """The rows (n d), and those of `copies` noisy copies of each along `direction` (d) that `free` moves more than their mean."""
    noise = torch.randn(copies, len(rows), 1, generator=generator, dtype=torch.float64).to(rows.device)
    return torch.cat([rows, filtered((rows + noise * direction).flatten(0, 1), free)])


@dataclass(frozen=True, eq=False)
class Rows:
    """What all maps that read the same rows share, float64."""

    targets: Tensor
    """T (d d)."""
    crossed: Tensor
    """A (d d)."""
    kept: Tensor
    """(n d)"""
    invariants: Tensor
    """K (d k)."""


@final
@dataclass(frozen=True)
class SPEED(Method):
    """Scalable, precise and efficient concept erasure."""

    needs: ClassVar[Needs] = Needs(groups=("text_kv",), keep="preserved")
    paper: ClassVar[Paper] = Paper(
        title="SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models",
        authors="Li, Wang, Hu, Jiang, Liang, Hao, Ma, Feng",
        venue="ICLR 2026",
        arxiv="2503.07392",
        code="Ouxiang-Li/SPEED",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": {},
        "object": {},
        "style": {},
        "identity": {"keep_weight": 0.05, "threshold": 1e-4, "filter": False},
        "unsafe": {"keep_weight": 0.7, "regulariser": 0.5, "scope": "all_but_start"},
    }
    """The authors' scripts: characters and styles, celebrities, nudity."""

    maps: Literal["v", "k", "kv"] = "v"
    """Which maps are changed: values, keys, or both."""
    keep_weight: float = 1.0
    """Weight of a small change (l, the code's `retain_scale`); above 0."""
    threshold: float = 0.1
    """Eigenvalue of the kept rows' second moment below which a direction is free; above 0."""
    regulariser: float = 0.0
    """Softens the invariance of the empty prompt (μ, the code's `lamb`)."""
    general: int = 0
    """How many of the model's words are kept beside the concepts to keep (ours; see above)."""
    filter: bool = True
    """Whether only the kept rows enter that the erasing would move most (IPF)."""
    copies: int = 10
    """Noisy copies of each kept row (DPA); 0 for none."""
    scope: Literal["last_subject", "all_but_start"] = "last_subject"
    """Which rows of a text enter: its last subject token, or all behind the start token, summed (the code's for nudity)."""

    def __post_init__(self) -> None:
        choices = {"maps": ("v", "k", "kv"), "scope": ("last_subject", "all_but_start")}
        positive = ("keep_weight", "threshold")
        self.check_fields(at_least={"copies": 0, "general": 0}, above_zero=positive, from_zero=("regulariser",), one_of=choices)

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        self.require(model, task)
        model.meter.reset()
        generator, deltas, info = seeded(seed), {}, {}
        said = [text for concept in task.keep for text in concept.texts]
        pairs, kept = self.pairs(task), [*said, *general(model, task, resources, self.general)]
        with model.frozen(), torch.no_grad(), advising(f"Raise speed's keep_weight, now {self.keep_weight:g}"):
            slots = self.slots(model)
            for texts in read(model, ["", *kept, *(text for pair in pairs for text in pair)]):
                rows = self.rows(texts, pairs, kept)
                for name in (name for name in texts.names if name in slots):
                    weight = slots[name].tensor
                    change, info[name] = self.change(weight, rows, generator)
                    deltas[name] = (weight.double() @ change).float().cpu()
                    resources.report(len(deltas), len(slots), info[name])
        card = Card.of(model, method=self, task=task, seed=seed, cost=model.meter.read())
        return WeightEdit(deltas, card, {"trace": Part(info={"maps": info, "pairs": pairs, "kept": kept})})

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """One solve a map, and no call of the denoiser."""
        return {"steps": len(self.slots(model)), "forwards": 0, "backwards": 0}

    def slots(self, model: Model) -> Mapping[str, Any]:
        """The maps to change, by name: "….to_v.weight", or "….add_v_proj.weight" in joint blocks. Raises Unsupported for none."""
        found = {n: s for n, s in model.select("text_kv").items() if set(self.maps) & set(n.split(".")[-2].split("_"))}
        if not found:
            raise Unsupported(f"speed changes the maps {self.maps!r} of text, and {model.id} names none so")
        return found

    def pairs(self, task: Task) -> list[tuple[str, str]]:
        """(text to erase, its anchor)."""
        return [(text, swap.anchor.texts[0]) for swap in task.erase for text in swap.target.texts]

    def rows(self, texts: Texts, pairs: Sequence[tuple[str, str]], kept: Sequence[str]) -> Rows:
        """T and A are means over the pairs of sums over their rows. Without kept texts, the empty prompt's rows are kept."""

        def rows_of(names: Sequence[str], scope: str) -> Tensor:
            return torch.stack([cut(texts.tokens[text], texts.lengths[text], scope) for text in names]).double().flatten(0, 1)

        targets, anchors = (rows_of([pair[side] for pair in pairs], self.scope) for side in (0, 1))
        null = texts.tokens[""].double()
        invariants = torch.cat([null[:1], centres(null[1:], CENTRES)]).T
        keep = rows_of(kept, "last_subject") if kept else null[1:]
        return Rows(targets.T @ targets / len(pairs), anchors.T @ targets / len(pairs), keep, invariants)

    def change(self, weight: Tensor, rows: Rows, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """E (d d) with W' = W (I + E) for one map, and its figures."""
        free, kept = weight.double() @ shift(rows.targets, rows.crossed), rows.kept
        if self.filter:
            kept = filtered(kept, free)
        if self.copies:
            kept = augmented(kept, free, weakest_direction(weight), self.copies, generator)
        projector = null_projector(second_moment(kept), self.threshold)
        change, condition = confined(rows.targets, rows.crossed, projector, rows.invariants, self.keep_weight, self.regulariser)
        return change, {"condition": condition, "free": round(float(projector.trace())), "kept": len(kept)}

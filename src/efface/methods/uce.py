"""UCE, unified concept editing: one ridge regression per key and value map of the cross-attention, in closed form.

For a map W (o × d), context rows c of the concepts to erase with targets v, and rows p of the concepts to keep:

    W' = argmin  η Σ ‖W' c − v‖² + β Σ ‖W' p − W p‖² + μ ‖W' − W‖²_F

with η = `erase_scale`, β = `keep_weight`, μ = `regulariser`. `technique="replace"`: v = W g with g the guide's row (the anchor's, or
the empty prompt's). `technique="tensor"`: with O, N the blocks of outputs of concept and guide, V = N − ⟨O, N⟩ O/‖O‖².

Trained: `attn2.to_k.weight` and `attn2.to_v.weight`, by one solve; no step, no denoiser call, no randomness; cost per concept: one encoding
and two products of its rows. With "replace" the solution is W (I + D) with one D for all maps that read the same rows (`ops.ridge`), so
that the whole edit can be kept as that one matrix (`form="patch"`). The trace holds the condition number of what was inverted.

The two generations of the authors' code differ in strength at equal scales, and are presets:
- "2023", the paper's and the default here: rows from the last subject token to the end (end-of-text and padding included), paired with the
  guide's rows from *its* last subject token (the start token for an empty guide); every row of each kept text; the empty prompt is always
  kept; β = max(0.1, 1/number of kept texts);
- "2025": the single row of the last subject token everywhere, β = 1, the empty prompt not kept unless listed.

Departures: solved in float64 (the code: float32), and refused beyond a condition number of 1e12; the guide's output is taken without the
map's bias where it has one, so that the bias is not counted twice (a fault of the FLUX script). The scope "end" is TRCE's choice of
contexts (arXiv 2503.07389), not UCE's. Debiasing, which needs generated images, is not implemented.

Ours: `general` of the model's own words (`core.words.general`; name synonyms of the target in `exclude`) can be kept as well, for users who
cannot say what is to stay, all rows with `general_weight` for each text to erase. 0, the default, is the authors'.

Known failures: a keep list of everything fights the erasure; many erased concepts outvote β; with "2025" words after the concept
still carry it, since CLIP's text encoder is causal. SDXL's pooled embedding would not be edited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from efface.core.card import Card
from efface.core.edit import Part, WeightEdit
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Model
from efface.core.task import Concept, Task
from efface.core.textmaps import Form, Texts, advising, batches, kept_as, read
from efface.core.words import general
from efface.ops.ridge import Cholesky, Statistics, without_component
from efface.ops.rows import SCOPES, Scope, cut, paired

Technique = Literal["replace", "tensor"]
STYLE_TEMPLATES = ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}")
OTHER_TEMPLATES = ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")
Block = tuple[Tensor, Tensor]
"""The rows (n d) of a text to erase, and those of its guide."""


def orthogonal_change(weight: Tensor, blocks: Sequence[Block], system: Cholesky, scale: float) -> Tensor:
    """W' − W (o d) of "tensor": each block of outputs goes to the guide's without its component along the concept's."""
    w = weight.double()
    pull = torch.zeros_like(w)
    for context, guide in blocks:
        output = context.double() @ w.T
        goal = without_component(guide.double() @ w.T, output)
        pull.addmm_((goal - output).T, context.double(), alpha=scale)
    return system.right(pull)


@final
@dataclass(frozen=True)
class UCE(Method):
    """Unified concept editing."""

    needs: ClassVar[Needs] = Needs(groups=("text_kv",), keep="preserved")
    paper: ClassVar[Paper] = Paper(
        title="Unified Concept Editing in Diffusion Models",
        authors="Gandikota, Orgad, Belinkov, Materzynska, Bau",
        venue="WACV 2024",
        arxiv="2308.14761",
        code="rohitgandikota/unified-concept-editing",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": {},
        "2023": {},
        "2025": {"scope": "last_subject", "keep_scope": "last_subject", "keep_null": False, "keep_weight": 1.0},
    }

    technique: Technique = "replace"
    """What the concept's output becomes: "replace" (the guide's) or "tensor" (the guide's without its component along the concept's)."""
    erase_scale: float = 1.0
    """Weight of the rows to erase (η)."""
    keep_weight: float | None = None
    """Weight of the rows to keep (β); None is the authors' max(0.1, 1/number of kept texts)."""
    regulariser: float = 0.5
    """Weight of staying near the old map (μ, the code's `lamb`); above 0."""
    scope: Scope = "last_subject_to_end"
    """Which rows of a text to erase enter: "last_subject", "last_subject_to_end", "end" (of text), "all" or "all_but_start"."""
    keep_scope: Scope = "all"
    """Which rows of a text to keep enter."""
    keep_null: bool = True
    """Whether the empty prompt is kept."""
    general: int = 0
    """How many of the model's words are kept beside the concepts to keep (ours; see above)."""
    general_weight: float = 0.01
    """Weight of every row of such a word, for each text to erase: what is kept has to keep up with what is erased."""
    expand: bool = False
    """Whether each concept also enters through five templates ("photo of …", for styles "painting by …")."""
    expand_guide: bool = False
    """Whether the guide takes the same template (2025 code) or stays bare (2023 code)."""
    form: Form = "deltas"
    """How the edit is kept: "deltas", one Δ for each map; or "patch", one matrix for all, expanded when it is attached."""

    def __post_init__(self) -> None:
        choices = {"technique": get_args(Technique), "scope": SCOPES, "keep_scope": SCOPES, "form": get_args(Form)}
        self.check_fields(at_least={"general": 0}, above_zero=("regulariser",), from_zero=("erase_scale", "general_weight"), one_of=choices)
        self.check_field("keep_weight", self.keep_weight is None or 0 <= self.keep_weight < math.inf, "a number of at least 0, or None")
        whole = self.technique == "replace" or self.form == "deltas"
        self.check_field("form", whole, "form='deltas' for the technique 'tensor', whose change is another one for each map")

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        self.require(model, task)
        model.meter.reset()
        pairs, kept, words = self.pairs(task), self.kept(task), general(model, task, resources, self.general)
        with model.frozen(), torch.no_grad(), advising(f"Raise uce's regulariser, now {self.regulariser}"):
            if self.technique == "replace":
                solved = {names: s.solve(self.regulariser) for names, s in self.summed(model, pairs, kept, words).items()}
                conditions = [solution.condition for solution in solved.values()]
                deltas, patches = kept_as(model, {names: solution.factor for names, solution in solved.items()}, self.form)
            else:
                (deltas, conditions), patches = self.orthogonal(model, pairs, kept, words), ()
        resources.report(1, 1, {"condition": max(conditions)})
        card = Card.of(model, method=self, task=task, seed=seed, cost=model.meter.read())
        info = {"condition": conditions, "kept": kept, "general": words, "pairs": pairs}
        return WeightEdit(deltas, card, {"trace": Part(info=info)}, patches)

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """One solve, and no call of the denoiser."""
        return {"steps": 1, "forwards": 0, "backwards": 0}

    def pairs(self, task: Task) -> list[tuple[str, str]]:
        """(text to erase, its guide) for each text of each target, and of each template with `expand`."""
        found = []
        for swap in task.erase:
            guide = swap.anchor.texts[0]
            for text in swap.target.texts:
                found.append((text, guide))
                for template in _templates(swap.target) if self.expand else ():
                    found.append((template.format(text), template.format(guide) if self.expand_guide and guide else guide))
        return found

    def kept(self, task: Task) -> list[str]:
        """The texts whose outputs stay: the empty prompt with `keep_null`, then those of `task.keep`."""
        return [*([""] if self.keep_null else []), *(text for concept in task.keep for text in concept.texts)]

    def beta(self, kept: Sequence[str]) -> float:
        """β for these texts."""
        return self.keep_weight if self.keep_weight is not None else max(0.1, 1 / max(1, len(kept)))

    def blocks(self, texts: Texts, pairs: Sequence[tuple[str, str]]) -> list[Block]:
        """The rows of each pair, cut as `scope` says and to equal length."""
        rows = [[cut(texts.tokens[text], texts.lengths[text], self.scope) for text in pair] for pair in pairs]
        return [paired(context, guide) for context, guide in rows]

    def erase(self, statistics: Statistics, texts: Texts, pairs: Sequence[tuple[str, str]]) -> None:
        """Adds the rows of some pairs."""
        contexts, targets = zip(*self.blocks(texts, pairs), strict=True)
        statistics.erase(torch.cat(contexts), torch.cat(targets), self.erase_scale)

    def keep(self, statistics: Statistics, texts: Texts, kept: Sequence[str], weight: float) -> None:
        """Adds the rows of some texts to keep."""
        statistics.keep(torch.cat([cut(texts.tokens[text], texts.lengths[text], self.keep_scope) for text in kept]), weight)

    def summed(
        self, model: Model, pairs: Sequence[tuple[str, str]], kept: Sequence[str], words: Sequence[str] = ()
    ) -> dict[tuple[str, ...], Statistics]:
        """The sums over all rows by the names of the maps that read them; rows are encoded, added and forgotten."""
        found: dict[tuple[str, ...], Statistics] = {}
        for part in batches(pairs):
            for texts in read(model, [text for pair in part for text in pair]):
                statistics = found.setdefault(texts.names, Statistics(texts.width, device=model.device))
                self.erase(statistics, texts, part)
        for whole, weight in ((kept, self.beta(kept)), (words, self.general_weight * len(pairs))):
            for some in batches(whole):
                for texts in read(model, some):
                    self.keep(found[texts.names], texts, some, weight)
        return found

    def orthogonal(
        self, model: Model, pairs: Sequence[tuple[str, str]], kept: Sequence[str], words: Sequence[str]
    ) -> tuple[dict[str, Tensor], list[float]]:
        """The deltas of "tensor" by map, and the condition numbers; here all rows are held at once."""
        statistics, slots = self.summed(model, pairs, kept, words), model.select("text_kv")
        deltas: dict[str, Tensor] = {}
        conditions = []
        for texts in read(model, [text for pair in pairs for text in pair]):
            system = Cholesky(statistics[texts.names].gram + statistics[texts.names].kept, self.regulariser)
            blocks = self.blocks(texts, pairs)
            changes = {name: orthogonal_change(slots[name].tensor, blocks, system, self.erase_scale) for name in texts.names}
            deltas |= {name: change.float().cpu() for name, change in changes.items()}
            conditions.append(system.condition)
        return deltas, conditions


def _templates(concept: Concept) -> tuple[str, ...]:
    return STYLE_TEMPLATES if concept.kind == "style" else OTHER_TEMPLATES

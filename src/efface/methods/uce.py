"""UCE, unified concept editing: one ridge regression per key and value map of the cross-attention, in closed form.

For a map W (o × d), context rows c of the concepts to erase with targets v, and rows p of the concepts to keep:

    W' = argmin  η Σ ‖W' c − v‖² + β Σ ‖W' p − W p‖² + μ ‖W' − W‖²_F

with η = `erase_scale`, β = `keep_weight`, μ = `regulariser`. `technique="replace"`: v = W g with g the guide's row (the anchor's, or
the empty prompt's). `technique="tensor"`: with O, N the blocks of outputs of concept and guide, V = N − ⟨O, N⟩ O/‖O‖².

Trained: `attn2.to_k.weight` and `attn2.to_v.weight`, by one solve; no step, no denoiser call, no randomness. With "replace" the
solution is W M with one M for all maps that read the same rows (`ops.ridge`), which is checked against the long form.

The two generations of the authors' code differ in strength at equal scales, and are presets:
- "2023", the paper's and the default here: rows from the last subject token to the end (end-of-text and padding included), paired with the
  guide's rows from *its* last subject token (the start token for an empty guide); every row of each kept text; the empty prompt is always
  kept; β = max(0.1, 1/number of kept texts);
- "2025": the single row of the last subject token everywhere, β = 1, the empty prompt not kept unless listed.

Departures: solved in float64 (the code: float32); the guide's output is taken without the map's bias where it has one, so that the bias is
not counted twice (a fault of the FLUX script). Debiasing, which needs generated images, is not implemented.

Known failures: a keep list of everything fights the erasure; many erased concepts outvote β; with "2025" words after the concept
still carry it, since CLIP's text encoder is causal. SDXL's pooled embedding would not be edited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from efface.core.card import Card
from efface.core.edit import Part, WeightEdit
from efface.core.errors import InvalidMethod
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.task import Concept, Task
from efface.ops.ridge import common_factor, gram, ridge, without_component

Scope = Literal["last_subject", "last_subject_to_end", "all"]
SCOPES: tuple[str, ...] = get_args(Scope)
STYLE_TEMPLATES = ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}")
OTHER_TEMPLATES = ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")


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

    technique: str = "replace"
    """What the concept's output becomes: "replace" (the guide's) or "tensor" (the guide's without its component along the concept's)."""
    erase_scale: float = 1.0
    """Weight of the rows to erase (η)."""
    keep_weight: float | None = None
    """Weight of the rows to keep (β); None is the authors' max(0.1, 1/number of kept texts)."""
    regulariser: float = 0.5
    """Weight of staying near the old map (μ, the code's `lamb`); above 0."""
    scope: Scope = "last_subject_to_end"
    """Which rows of a text to erase enter: "last_subject", "last_subject_to_end" or "all"."""
    keep_scope: Scope = "all"
    """Which rows of a text to keep enter."""
    keep_null: bool = True
    """Whether the empty prompt is kept."""
    expand: bool = False
    """Whether each concept also enters through five templates ("photo of …", for styles "painting by …")."""
    expand_guide: bool = False
    """Whether the guide takes the same template (2025 code) or stays bare (2023 code)."""

    def __post_init__(self) -> None:
        for field, valid in {"technique": ("replace", "tensor"), "scope": SCOPES, "keep_scope": SCOPES}.items():
            if getattr(self, field) not in valid:
                raise InvalidMethod(f"uce's {field} was {getattr(self, field)!r}; expected one of {', '.join(valid)}")
        if not self.regulariser > 0:
            raise InvalidMethod(f"uce's regulariser was {self.regulariser}; expected a number above 0")

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        self.require(model, task)
        model.meter.reset()
        with model.frozen(), torch.no_grad():
            pairs, kept = self.pairs(task), self.kept(task)
            cond = model.encode(texts := list(dict.fromkeys([t for pair in pairs for t in pair] + kept)))
            slots, solves = model.select("text_kv"), []
            deltas: dict[str, Tensor] = {}
            for names, inputs in _shared(model.inputs("text_kv", cond)):
                rows = self.rows(dict(zip(texts, inputs, strict=True)), _last_subject(texts, cond), pairs, kept)
                solves.append(self.condition(rows))
                deltas |= {name: delta.float().cpu() for name, delta in self.solve(rows, {n: slots[n].tensor for n in names}).items()}
        resources.report(1, 1, {"condition": max(solves)})
        card = Card.of(model, method=self, task=task, seed=seed, cost=model.meter.read())
        return WeightEdit(deltas, card, {"trace": Part(info={"condition": solves, "kept": kept, "pairs": pairs})})

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

    def rows(self, tokens: Mapping[str, Tensor], last: Mapping[str, int], pairs: list[tuple[str, str]], kept: list[str]) -> Rows:
        """The rows of every text, cut as `scope` and `keep_scope` say; `tokens` (l d) and `last` by text."""
        blocks = []
        for text, guide in pairs:
            context, target = (_cut(tokens[t], last[t], self.scope) for t in (text, guide))
            length = min(len(context), len(target))
            blocks.append((context[:length], target[:length]))
        keep = [_cut(tokens[text], last[text], self.keep_scope) for text in kept]
        weight = self.keep_weight if self.keep_weight is not None else max(0.1, 1 / max(1, len(kept)))
        return Rows(tuple(blocks), tuple(keep), self.erase_scale, weight)

    def solve(self, rows: Rows, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' − W in float64 for maps W (o d) that read the same rows."""
        contexts, targets, weights = rows.stacked()
        if self.technique == "replace":
            change = common_factor(contexts, targets, weights, self.regulariser)
            change.diagonal().sub_(1)
            return {name: w.double() @ change for name, w in maps.items()}
        return {n: ridge(w, contexts, rows.outputs(w.double()), weights, self.regulariser) - w.double() for n, w in maps.items()}

    def condition(self, rows: Rows) -> float:
        """The condition number of the matrix that is inverted."""
        contexts, _, weights = rows.stacked()
        return float(torch.linalg.cond(gram(contexts, weights, self.regulariser)))


@dataclass(frozen=True, eq=False)
class Rows:
    """What enters the regression."""

    erased: tuple[tuple[Tensor, Tensor], ...]
    """(context (n d), guide (n d)) of each text to erase."""
    kept: tuple[Tensor, ...]
    """(n d) of each text to keep."""
    erase_scale: float
    keep_weight: float

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Contexts (n d), the inputs whose outputs they shall have (n d), weights (n)."""
        contexts = torch.cat([*(context for context, _ in self.erased), *self.kept])
        targets = torch.cat([*(guide for _, guide in self.erased), *self.kept])
        erased = sum(len(context) for context, _ in self.erased)
        weights = contexts.new_full((len(contexts),), self.keep_weight)
        weights[:erased] = self.erase_scale
        return contexts, targets, weights

    def outputs(self, weight: Tensor) -> Tensor:
        """The targets (n o) of "tensor" for one map (o d), float64."""
        blocks = [without_component(guide.double() @ weight.T, context.double() @ weight.T) for context, guide in self.erased]
        return torch.cat([*blocks, *(rows.double() @ weight.T for rows in self.kept)])


def _cut(tokens: Tensor, last: int, scope: str) -> Tensor:
    """The rows of a text's tokens (l d) that a scope names; `last` is the index of its last subject token."""
    return {"last_subject": tokens[last : last + 1], "last_subject_to_end": tokens[last:], "all": tokens}[scope]


def _last_subject(texts: list[str], cond: Cond) -> dict[str, int]:
    """The index of the last token before the end-of-text one; 0, the start token, for the empty prompt."""
    if cond.mask is None:
        raise InvalidMethod("uce needs to know where a prompt ends, and this family's encoding carries no mask")
    return {text: int(length) - 2 for text, length in zip(texts, cond.mask.sum(1), strict=True)}


def _shared(inputs: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Maps grouped by the tensor that enters them."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in inputs.items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _templates(concept: Concept) -> tuple[str, ...]:
    return STYLE_TEMPLATES if concept.kind == "style" else OTHER_TEMPLATES

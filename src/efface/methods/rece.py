"""RECE, reliable and efficient concept erasure: finds in closed form the embedding that still draws the concept, and erases it too.

With W° the original key and value maps of the cross-attention, W the present ones, c_k the rows of the target's embedding and
a_k those of the anchor's:

    derive   c'_k = argmin_x  Σ_i ‖W_i x − W°_i c_k‖² + λ ‖x‖²  =  (λ I + Σ_i W_iᵀ W_i)⁻¹ (Σ_i W_iᵀ W°_i) c_k
    erase    W_i := argmin_V  η Σ_k ‖V c'_k − W_i a_k‖² + β Σ_p ‖V p − W_i p‖² + μ ‖V − W_i‖²_F

η = `erase_scale`, β = `keep_weight`, μ = `regulariser`, λ = `embedding_weight`; `rounds` times, after UCE (Gandikota et al.,
arXiv 2308.14761) in the way of its 2023 code. A shorter x disturbs other embeddings less and erases less: λ is the dial. All rows enter,
the start token and padding too, and the kept empty prompt is what holds the start token in its place. All targets of a round are
derived and erased jointly.

Trained: `attn2.to_k.weight` and `attn2.to_v.weight`. No step, no denoiser call, no randomness. Every W_i is W°_i Q with one Q for all maps,
so with G = Σ W°ᵀW° the derived rows are c' = A c, A = (λ I + QᵀGQ)⁻¹ QᵀG, and both sums of the erasing solve follow from Σ c cᵀ and
Σ a cᵀ: a round costs a few d × d products, however many concepts there are. Q alone is the edit (`form="patch"`). The trace holds, for
each round, condition numbers and ‖c'‖/‖c‖; a round in which that ratio passes 100 is refused.

Selection: with `Resources.assets["validator"]` (`core.selection.Validator`) the model is judged before, after UCE and after each round. A
round is taken if the target is seen less than in the best so far and the kept concepts at most `tolerated_drop` less than before the
fit; rounds stop when the target is seen no more.
Both rules are the authors' (the first for unsafe concepts, both for objects); drawing the pictures comes on top of `cost`.

Departures: float64 throughout (the code: float32). `reference="original"` is our reading of the paper's objective, which names old weights:
one solve against W° with the contexts of UCE and of all rounds, so that damage does not add up; the code, our default, refers to the
present W. The paper's full text was not read; this follows the code and its README. Objects that UCE erases already get no round in the
README; without a validator that is the user's call. The preset "identity" is ours, since the authors have none.

Ours: `general` of the model's own words (`core.words.general`; name synonyms of the target in `exclude`) can be kept as well, for users who
cannot say what is to stay, all rows with `general_weight` for each text to erase. 0, the default, is the authors'.

Known failures: a small λ with several rounds makes c' explode and wrecks the model (A tends to Q⁻¹); past some ten concepts preservation
collapses; attacks that optimise embeddings against the network still succeed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from efface.core.card import Card
from efface.core.edit import Part, WeightEdit
from efface.core.errors import Diverged
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Model
from efface.core.selection import Contest
from efface.core.task import Task
from efface.core.textmaps import Form, Texts, advising, batches, kept_as, read
from efface.core.words import general
from efface.ops.ridge import Cholesky, RightFactor, Statistics, weight_gram
from efface.ops.rows import cut, paired

Penalty = Literal["zero", "text", "outputs", "inputs", "both"]
Names = tuple[str, ...]
Pairs = Sequence[tuple[str, str]]
ASSET = "validator"
MOST_GROWTH = 100.0
"""‖c'‖/‖c‖ beyond which a round is refused: its embedding would outvote everything that is kept."""


@dataclass(frozen=True, eq=False)
class Derivation:
    """c' = A z, with z = c, or [c; o] for the penalty "text"."""

    matrix: Tensor
    """A (d m), float64."""
    condition: float


def derive(gram: Tensor, factor: RightFactor, penalty: str, weight: float) -> Derivation:
    """The minimiser over x of Σ_i ‖W_i x − W°_i c‖² + penalty, for W_i = W°_i (I + D), G = Σ W°ᵀW° (d d) and ρ = `weight`:

    "zero" ρ‖x‖² · "text" ρ‖x − o‖², o the row of a text · "outputs" ρ Σ ‖W_i x − W_i c‖² · "inputs" ρ‖x − c‖² · "both" the last two.
    Raises IllConditioned."""
    eye = torch.eye(len(gram)).to(gram)
    cross = (gram + factor.change(gram)).T  # QᵀG, by D's thin factors where it has some
    now = cross + factor.change(cross)
    outputs, inputs = penalty in ("outputs", "both"), penalty in ("inputs", "both")
    system = Cholesky((1 + weight * outputs) * now, 0.0 if penalty == "outputs" else weight)
    wanted = cross + weight * (outputs * now + inputs * eye)
    return Derivation(system.left(torch.cat([wanted, weight * eye], 1) if penalty == "text" else wanted), system.condition)


@dataclass(frozen=True, eq=False)
class Source:
    """What a set of maps that read the same rows needs in every round."""

    gram: Tensor
    """G = Σ W°ᵀW° (d d)."""
    start: Statistics
    """UCE's rows."""
    rows: Statistics
    """All rows of the targets, with the anchors' as goals, and of the kept texts."""


@final
@dataclass(frozen=True)
class RECE(Method):
    """Reliable and efficient concept erasure."""

    needs: ClassVar[Needs] = Needs(groups=("text_kv",), keep="preserved")
    paper: ClassVar[Paper] = Paper(
        title="Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models",
        authors="Gong, Chen, Wei, Chen, Jiang",
        venue="ECCV 2024",
        arxiv="2407.12383",
        code="CharlesGong12/RECE",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": {},
        "object": {},
        "object-difficult": {"embedding_weight": 1e-3},
        "style": {"embedding_weight": 1e-3},
        "identity": {},
        "unsafe": {"rounds": 3},
        "unsafe-many": {"rounds": 2},
    }
    """The README's values: "object-difficult" is its church and garbage truck, "unsafe" is nudity, "unsafe-many" eleven words at once."""

    rounds: int = 1
    """How often the embedding is derived and erased (the code's "epochs"); 0 is UCE alone."""
    embedding_weight: float = 0.1
    """Weight of the penalty on the derived embedding (λ; ρ for the other penalties; the code's `regular_scale`)."""
    penalty: Penalty = "zero"
    """What it penalises: "zero", its length (the code's `close_regzero`); "text", its distance from `penalty_text` (`close_standardreg`);
    "outputs", "inputs" or "both", that from the target in what the present maps give, in what they read, or in both
    (`close_surrogatereg`: 1st, 2nd, both)."""
    penalty_text: str = ""
    """The text of the penalty "text"."""
    erase_scale: float = 1.0
    """Weight of the derived rows (η)."""
    keep_weight: float = 0.1
    """Weight of every row of the kept texts, of which the empty prompt always is one (β)."""
    general: int = 0
    """How many of the model's words are kept beside the concepts to keep (ours; see above)."""
    general_weight: float = 0.01
    """Weight of every row of such a word, for each text to erase: what is kept has to keep up with what is erased."""
    regulariser: float = 0.1
    """Weight of staying near the maps of the round before (μ); above 0."""
    reference: Literal["current", "original"] = "current"
    """Which maps a round preserves: the present ones (the code), or the original ones, by one solve over all rounds (see above)."""
    start: Literal["uce", "none"] = "uce"
    """What the first round meets: UCE's edit, or the original maps."""
    start_keep_weight: float | None = None
    """β of UCE; None is its max(0.1, 1/number of kept texts)."""
    start_regulariser: float = 0.5
    """μ of UCE; above 0."""
    tolerated_drop: float = 0.1
    """With a validator: how much less the kept concepts may be seen than in the original model (a share, 0 to 1)."""
    form: Form = "deltas"
    """How the edit is kept: "deltas", one Δ for each map; or "patch", one matrix for all, expanded when it is attached."""

    def __post_init__(self) -> None:
        choices = {"penalty": get_args(Penalty), "reference": ("current", "original"), "start": ("uce", "none"), "form": get_args(Form)}
        positive = ("embedding_weight", "regulariser", "start_regulariser")
        weights = ("erase_scale", "keep_weight", "general_weight", "tolerated_drop")
        self.check_fields(at_least={"rounds": 0, "general": 0}, above_zero=positive, from_zero=weights, one_of=choices)
        start = self.start_keep_weight
        self.check_field("start_keep_weight", start is None or 0 <= start < math.inf, "a number of at least 0, or None")

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        self.require(model, task)
        model.meter.reset()
        pairs, kept, words = self.pairs(task), self.kept(task), general(model, task, resources, self.general)
        contest = Contest(model, resources.assets.get(ASSET), self.tolerated_drop)
        with model.frozen(), torch.no_grad(), advising(self._advice):
            contest.judge({})
            sources = self.summed(model, pairs, kept, words)
            factors = {names: self.begin(source) for names, source in sources.items()}
            past = {names: source.start for names, source in sources.items()}
            contest.judge(factors)
            trace: list[dict[str, float]] = []
            while len(trace) < self.rounds and not contest.won:
                trace.append({})
                for names, source in sources.items():
                    factors[names], past[names], figures = self.round(source, factors[names], past[names])
                    trace[-1] |= {name: max(value, trace[-1].get(name, 0.0)) for name, value in figures.items()}
                contest.judge(factors)
                resources.report(len(trace), self.rounds, trace[-1])
            deltas, patches = kept_as(model, contest.best, self.form)
        info = {"rounds": trace, "chosen": contest.chosen, "verdicts": contest.verdicts, "pairs": pairs, "kept": kept, "general": words}
        card = Card.of(model, method=self, task=task, seed=seed, cost=model.meter.read())
        return WeightEdit(deltas, card, {"trace": Part(info=info)}, patches)

    @property
    def _advice(self) -> str:
        return f"Raise rece's embedding_weight ({self.embedding_weight:g}) or regulariser ({self.regulariser:g}), or take fewer rounds"

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """No call of the denoiser; what a validator draws comes on top."""
        return {"steps": self.rounds, "forwards": 0, "backwards": 0}

    def pairs(self, task: Task) -> list[tuple[str, str]]:
        """(text to erase, its anchor), bare."""
        return [(text, swap.anchor.texts[0]) for swap in task.erase for text in swap.target.texts]

    def kept(self, task: Task) -> list[str]:
        """The empty prompt, and the texts of `task.keep`."""
        return ["", *(text for concept in task.keep for text in concept.texts)]

    def summed(self, model: Model, pairs: Pairs, kept: Sequence[str], words: Sequence[str] = ()) -> dict[Names, Source]:
        """The sums over all rows by the names of the maps that read them; rows are encoded, added and forgotten."""
        found: dict[Names, Source] = {}
        for part in batches(pairs):
            for texts in read(model, [self.penalty_text, *(text for pair in part for text in pair)]):
                if texts.names not in found:
                    found[texts.names] = self.source([slot.tensor for slot in model.slots(texts.names).values()])
                self.erase(found[texts.names], texts, part)
        start = max(0.1, 1 / len(kept)) if self.start_keep_weight is None else self.start_keep_weight
        held = self.general_weight * len(pairs)
        for whole, weights in ((kept, (start, self.keep_weight)), (words, (held, held))):
            for some in batches(whole):
                for texts in read(model, some):
                    self.keep(found[texts.names], texts, some, weights)
        return found

    def source(self, weights: Sequence[Tensor]) -> Source:
        """An empty one for maps W° (o d)."""
        gram = weight_gram(weights)
        d = len(gram)
        wide = 2 * d if self.penalty == "text" else d
        return Source(gram, Statistics(d, device=gram.device), Statistics(d, context_width=wide, device=gram.device))

    def erase(self, source: Source, texts: Texts, pairs: Pairs) -> None:
        """Adds the rows of some pairs: for UCE from the last subject token on, for the rounds all."""
        if self.start == "uce":
            cuts = [[cut(texts.tokens[text], texts.lengths[text], "last_subject_to_end") for text in pair] for pair in pairs]
            contexts, targets = zip(*(paired(context, guide) for context, guide in cuts), strict=True)
            source.start.erase(torch.cat(contexts), torch.cat(targets))
        rows, anchors = (torch.cat([texts.tokens[pair[side]] for pair in pairs]) for side in (0, 1))
        if self.penalty == "text":
            rows = torch.cat([rows, texts.tokens[self.penalty_text].repeat(len(pairs), 1)], 1)
        source.rows.erase(rows, anchors, self.erase_scale)

    def keep(self, source: Source, texts: Texts, kept: Sequence[str], weights: tuple[float, float]) -> None:
        """Adds the rows of some kept texts, with their weights in UCE and in the rounds."""
        rows = torch.cat([texts.tokens[text] for text in kept])
        source.start.keep(rows, weights[0])
        source.rows.keep(rows, weights[1])

    def begin(self, source: Source) -> RightFactor:
        """UCE's edit; with `start="none"` it has no rows to erase, and is that which changes nothing."""
        return source.start.solve(self.start_regulariser).factor

    def round(self, source: Source, factor: RightFactor, past: Statistics) -> tuple[RightFactor, Statistics, dict[str, float]]:
        """The factor after one more round; what has been erased so far (for `reference="original"`); the round's figures."""
        found = derive(source.gram, factor, self.penalty, self.embedding_weight)
        derived = source.rows.mapped(found.matrix)
        length = source.rows.gram.diagonal()[: len(source.gram)].sum()
        growth = float((derived.gram.trace() / length).sqrt()) if length > 0 else 0.0
        if growth > MOST_GROWTH:
            raise Diverged(f"rece derived an embedding {growth:.0f} times as long as the target's; the model is as it was. {self._advice}")
        past = derived.joined(past)
        solution = (derived if self.reference == "current" else past).solve(self.regulariser)
        factor = factor.then(solution.factor) if self.reference == "current" else solution.factor
        return factor, past, {"growth": growth, "condition_derive": found.condition, "condition_erase": solution.condition}

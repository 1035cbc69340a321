"""MACE, mass concept erasure: takes a concept out of the words around it, then out of the attention that its own words pay; for many.

1. Refinement, in closed form. For sentences with the concept and the same ones with its mapping phrase (the anchor), the words e^f and e^g
   that both share, start, end and padding included and the phrases themselves left out:

       W' = argmin_V  Σ ‖V e^f − W e^g‖² + λ₁ Σ_p ‖V p − W p‖² + μ ‖V − W‖²_F

2. A low-rank adapter for each concept, on the keys and values of the refined network: Σ_l ‖A_l[mask, S]‖_F falls, A_l the attention of
   cross-attention layer l, S the concept's tokens and (`ends`) the end-of-text ones, mask the places where the object is. Times are drawn
   where the object forms (`focal`): p(t) ∝ σ(0.05 (t − 200)) − σ(0.05 (t − 400)) of 1000.
3. Fusion, in closed form, with e all rows of concept i's sentences:

       W* = argmin_V  Σ_i Σ ‖V e − (W' + U_i D_i) e‖² + λ₂ Σ_p ‖V p − W p‖² + μ ‖V − W'‖²_F

λ₁ = `keep_weight`, λ₂ = `fuse_keep_weight`, μ = `regulariser`. p are all rows of `Resources.assets["captions"]` (a list of any general
captions; the authors' is COCO), and w = `domain_weight` times those of sentences about the concepts to keep. Without captions, "a picture
of WORD" takes their place for `general` of the model's words (`core.words.general`: name the target's synonyms in `exclude`), as often as
there are texts to erase.
`steps=0` is the refinement alone: no picture, no denoiser call, one matrix for all maps (`form="patch"`).

Trained: `attn2.to_k.weight` and `attn2.to_v.weight`; in between, factors of rank 1 beside them. A step costs 1 forward and 1 backward;
before, each text to erase is drawn `images` times by the original network, and each picture is looked at once for its mask.

Departures: masks come from the original network's own attention to the concept's words, at the time 0.3 T (at least half of its way from
least to most), not from Grounding DINO and SAM, which are other networks of gigabytes; `Resources.assets["masks"]`, (n h w) by text, takes
the place. Styles have no mask, as the authors ran them (issue 13; the released config cannot run). The sentences are ours, of plain words.
Pictures enter the VAE in its own range; the code normalises them as for ImageNet. All is in float64, and a system without an inverse is
refused: with μ = 0 what is kept must span the space. The code applies λ₁ twice in stage 1 (`keep_squared`, in the presets "authors…"); the
paper once, our default. The loss is the code's sum of norms; "squared" is the paper's. Our λ, w and μ are our own, since the authors' rest
on a cache of COCO, and so is that the empty prompt is kept (`null_weight`), without which the unconditional half of guidance moves. Times
are uniform for explicit content, as in the released config and not in the paper, whose appendix was not read.

Known failures: pictures of erased prompts are off prompt rather than replaced; μ has to be tuned (the authors' objects differ by 100); with
`ends`, on a tokenizer that pads with its end token all padding is in S, and on others it is not. White-box attacks succeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor, nn

from efface.core import pictures
from efface.core.edit import WeightEdit
from efface.core.errors import InvalidTask
from efface.core.fitting import Fit, fitting
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.task import Concept, Task
from efface.core.textmaps import Form, Texts, advising, batches, expanded, kept_as, read
from efface.core.words import general
from efface.ops.descend import descend
from efface.ops.focus import SENTENCES, focal_weights, hot, marked_attention, sentences
from efface.ops.lowrank import Adapter, fresh
from efface.ops.overlay import swapped
from efface.ops.ridge import Cholesky, RightFactor, Solution, Statistics, self_product
from efface.ops.rows import aligned, find

Names = tuple[str, ...]
AUTHORS = {
    "lr": 1e-4,
    "keep_weight": 1e-4,
    "fuse_keep_weight": 1e-4,
    "keep_squared": True,
    "null_weight": 0.0,
    "regulariser": 0.0,
    "general": 0,
}
EXPLICIT = {"keep_weight": 7e-7, "fuse_keep_weight": 7e-7}
MASK_TIME = 0.3
"""When pictures are looked at for their masks, as a share of all times."""


def fused(weight: Tensor, factor: RightFactor, adapters: Sequence[tuple[Tensor, Tensor]], kept: Tensor, system: Cholesky) -> Tensor:
    """W* − W (o d), float64: for W' = W (I + D), pairs (D_i E_i (r d), U_i (o r)) and λ₂ P, with the system Σ E_i + λ₂ P + μ I."""
    w = weight.detach().double()
    change = factor.change(w)
    pull = sum((up.double() @ down for down, up in adapters), -change @ kept)
    return change + system.right(pull)


@dataclass(frozen=True, eq=False)
class Source:
    """The rows of the task for a set of maps that read the same."""

    shared: Statistics
    """Of the words around the concepts, and λ₁ P."""
    own: Mapping[str, Tensor]
    """E_i = Σ e eᵀ by text to erase (d d)."""
    kept: Tensor
    """P (d d)."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A text to erase: its sentences, the tokens in them that are marked, its pictures and where it stands in them."""

    cond: Cond
    """The sentences (s l d)."""
    marked: Tensor
    """S of each (s l), bool."""
    latents: Tensor
    """(n c h w)"""
    masks: Tensor | None
    """(n h w)"""


@final
@dataclass(frozen=True)
class MACE(Method):
    """Mass concept erasure."""

    needs: ClassVar[Needs] = Needs(groups=("text_kv",), gradients=True, keep="preserved")
    paper: ClassVar[Paper] = Paper(
        title="MACE: Mass Concept Erasure in Diffusion Models",
        authors="Lu, Wang, Li, Liu, Kong",
        venue="CVPR 2024",
        arxiv="2403.06135",
        code="Shilin-LU/MACE",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": AUTHORS | {"lr": 1e-5, "keep_weight": 0.0, "fuse_keep_weight": 0.0, "regulariser": 100.0},
        "authors-identity": AUTHORS | {"domain_weight": 8e3},
        "authors-style": AUTHORS | {"domain_weight": 8e4},
        "authors-unsafe": AUTHORS | {"lr": 1e-5, "steps": 120, "focal": False, "domain_weight": 0.0} | EXPLICIT,
        "object": {},
        "style": {},
        "identity": {},
        "unsafe": {"steps": 120, "focal": False},
    }
    """The released configs: objects (automobile), one celebrity (w grows to 2e5 for a hundred), a hundred artists, explicit content. Those
    with μ = 0 need captions."""

    steps: int = 50
    """Steps of each text's adapter; 0 is the refinement alone."""
    lr: float = 1e-5
    """Learning rate of the adapters (AdamW), in units of Stable Diffusion 1.x (`Model.learning_rate`)."""
    rank: int = 1
    """Of an adapter."""
    images: int = 8
    """Pictures that the model draws of each text to erase, where the user gives none."""
    sentences: int = 30
    """Sentences about each text, at most 30; those that do not fit into the text encoder are left out."""
    general: int = 500
    """Captions about words of the model that are kept where the user gives no captions; 0 for none."""
    keep_weight: float = 0.01
    """Weight of what is kept, in the refinement (λ₁)."""
    keep_squared: bool = False
    """Whether λ₁ enters as its square there, which is what the code does by applying it twice."""
    fuse_keep_weight: float = 0.01
    """Weight of what is kept, in the fusion (λ₂)."""
    domain_weight: float = 1.0
    """Weight of the concepts to keep beside the captions (w)."""
    null_weight: float = 100.0
    """Weight of the empty prompt beside the captions; 0 is the authors', whose captions hold it in place."""
    regulariser: float = 1.0
    """Weight of staying near the old maps (μ, the code's `lamb`)."""
    masks: Literal["attention", "none"] = "attention"
    """Where attention is switched off: where the concept's words attend in each picture, or everywhere. Styles: everywhere."""
    ends: bool = True
    """Whether end-of-text tokens are in S beside the concept's (the code's `use_pooler`)."""
    focal: bool = True
    """Whether times are drawn where the object forms, or uniformly."""
    loss: Literal["norm", "squared"] = "norm"
    """A layer's part of the loss: the norm (the code), or its square (the paper)."""
    clip: float = 1.0
    """Largest norm of an adapter's gradient."""
    weight_decay: float = 0.01
    """Of AdamW."""
    form: Form = "deltas"
    """How the edit is kept; "patch", one matrix for all maps, is for `steps=0`."""

    def __post_init__(self) -> None:
        least = {"steps": 0, "rank": 1, "images": 1, "sentences": 1, "general": 0}
        weights = ("keep_weight", "fuse_keep_weight", "domain_weight", "null_weight", "regulariser", "weight_decay")
        choices = {"masks": ("attention", "none"), "loss": ("norm", "squared"), "form": get_args(Form)}
        self.check_fields(at_least=least, above_zero=("lr", "clip"), from_zero=weights, one_of=choices)
        self.check_field("sentences", self.sentences <= SENTENCES, f"at most {SENTENCES}")
        self.check_field("form", self.form == "deltas" or self.steps == 0, "'deltas' unless steps=0, since adapters differ from map to map")

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit, advising(self._advice):
            sources = self.summed(model, task, *self.captions(fit))
            refined = {names: source.shared.solve(self.regulariser) for names, source in sources.items()}
            info: dict[str, Any] = {"condition_refine": [solution.condition for solution in refined.values()]}
            if self.steps == 0:
                deltas, patches = kept_as(model, {names: solution.factor for names, solution in refined.items()}, self.form)
                resources.report(1, 1, {"condition": max(info["condition_refine"])})
                return replace(fit.edit(deltas, info=info), patches=patches)
            subjects = [self.subject(fit, concept, text) for concept, text, _ in _texts(task)]
            adapters = self.adapters(fit, subjects, {names: solution.factor for names, solution in refined.items()})
            learned = dict(zip([text for _, text, _ in _texts(task)], adapters, strict=True))
            deltas, info["condition_fuse"] = self.fuse(model, sources, refined, learned)
            return fit.edit(deltas, info=info)

    @property
    def _advice(self) -> str:
        return f"Raise mace's regulariser, now {self.regulariser:g}, or give general captions as the asset 'captions'"

    def about(self, concept: Concept, text: str) -> list[str]:
        """The sentences about a concept that is called `text`."""
        return sentences(text, self.sentences, style=concept.kind == "style")

    def captions(self, fit: Fit) -> tuple[list[str], float]:
        """What is kept in general, and its weight: the user's captions, or ours, whose weight grows with what is erased."""
        if given := fit.resources.assets.get("captions"):
            return list(given), 1.0
        words = general(fit.model, fit.task, fit.resources, self.general)
        return [f"a picture of {word}" for word in words], float(len(_texts(fit.task)))

    # -- closed form -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def summed(self, model: Model, task: Task, captions: Sequence[str] = (), weight: float = 1.0) -> dict[Names, Source]:
        """The sums over sentences and weighted captions, by the maps that read them. Raises InvalidTask where no sentence fits."""
        found: dict[Names, Source] = {}
        for concept, text, phrase in _texts(task):
            pairs = list(zip(*(self.about(concept, t) for t in (text, phrase)), strict=True))
            for texts in read(model, [text, *(sentence for pair in pairs for sentence in pair)]):
                if texts.names not in found:
                    zero = torch.zeros(texts.width, texts.width, dtype=torch.float64, device=model.device)
                    found[texts.names] = Source(Statistics(texts.width, device=model.device), {}, zero)
                source, fitting_pairs = found[texts.names], _fitting(texts, text, pairs)
                contexts, targets = zip(*(around(texts, *pair) for pair in fitting_pairs), strict=True)
                source.shared.erase(torch.cat(contexts), torch.cat(targets))
                own = torch.cat([texts.tokens[sentence] for sentence, _ in fitting_pairs])
                source.own[text] = self_product(own)  # type: ignore[index]
        self._keep(model, found, list(captions), weight)
        kept = [s for c in task.keep for text in c.texts for s in (text, *self.about(c, text))]
        self._keep(model, found, kept, self.domain_weight)
        self._keep(model, found, [""], self.null_weight)
        for source in found.values():
            source.shared.kept.add_(source.kept, alpha=self.keep_weight**2 if self.keep_squared else self.keep_weight)
        return found

    def _keep(self, model: Model, sources: Mapping[Names, Source], kept: list[str], weight: float) -> None:
        for some in batches(kept):
            for texts in read(model, some):
                sources[texts.names].kept.add_(self_product(torch.cat(list(texts.tokens.values()))), alpha=weight)

    @torch.no_grad()
    def fuse(
        self, model: Model, sources: Mapping[Names, Source], refined: Mapping[Names, Solution], learned: Mapping[str, Adapter]
    ) -> tuple[dict[str, Tensor], list[float]]:
        """W* − W by map, and the condition numbers."""
        deltas, conditions = {}, []
        for names, source in sources.items():
            total: Tensor = sum(source.own.values(), torch.zeros_like(source.kept))
            system = Cholesky(total + self.fuse_keep_weight * source.kept, self.regulariser)
            conditions.append(system.condition)
            for name, slot in model.slots(names).items():
                pairs = [adapter.factors[name] for adapter in learned.values()]
                seen = [(down.double() @ own, up) for (down, up), own in zip(pairs, source.own.values(), strict=True)]
                change = fused(slot.tensor, refined[names].factor, seen, self.fuse_keep_weight * source.kept, system)
                deltas[name] = change.float().cpu()
        return deltas, conditions

    # -- adapters --------------------------------------------------------------------------------------------------------
    def subject(self, fit: Fit, concept: Concept, text: str) -> Subject:
        """Draws or takes the pictures of a text, and marks its tokens and places."""
        model, whole = fit.model, [text, *self.about(concept, text)]
        with torch.no_grad():
            cond = model.encode(whole)
            rows, marked = self.marked(cond)
            latents = pictures.latents(model, self.pictures(fit, concept, text))
            masks = fit.resources.assets.get("masks", {}).get(text)
            if masks is None and self._masked(concept):
                masks = self.attended(fit, latents, cond[rows[:1]], marked[:1] & ~_ends(cond)[rows[:1]])
        if masks is not None and len(masks) != len(latents):
            raise InvalidTask(f"{len(masks)} masks were given for {len(latents)} pictures of {text!r}; give one for each")
        return Subject(cond[rows], marked, latents, masks)

    def pictures(self, fit: Fit, concept: Concept, text: str) -> Tensor:
        """The user's (n 3 H W), or the original model's own."""
        prompt = f"a photo in the style of {text}" if concept.kind == "style" else f"a photo of the {text}"
        return pictures.given_or_drawn(fit.model, fit.resources.images.get(concept.name), [prompt] * self.images, fit.generator)

    def marked(self, cond: Cond) -> tuple[list[int], Tensor]:
        """Which sentences hold the text, which is the first row of `cond`; and S of each of them (s l)."""
        lengths = cond.mask.sum(1).tolist()  # type: ignore[union-attr]
        texts = [ids[:n] for ids, n in zip(cond.ids.tolist(), lengths, strict=True)]  # type: ignore[union-attr]
        words, total = texts[0][1:-1], cond.tokens.shape[1]
        starts = {i: start for i, ids in enumerate(texts) if i > 0 and len(ids) < total and (start := find(words, ids)) is not None}
        marked = _ends(cond)[list(starts)] & self.ends
        for row, start in zip(marked, starts.values(), strict=True):
            row[start : start + len(words)] = True
        return list(starts), marked

    def _masked(self, concept: Concept) -> bool:
        return self.masks == "attention" and concept.kind != "style"

    def attended(self, fit: Fit, latents: Tensor, cond: Cond, marked: Tensor) -> Tensor:
        """Masks (n h w): where the words' attention is high, over all layers."""
        model, t = fit.model, int(MASK_TIME * fit.model.schedule.train_steps)
        noise = torch.randn(latents.shape, generator=fit.generator).to(latents.device)
        with model.attention() as maps:
            model.predict(model.schedule.add_noise(latents, noise, t), t, cond)
        return hot(maps.mean()[..., marked[0].to(latents.device)].sum(-1).float())

    def adapters(self, fit: Fit, subjects: Sequence[Subject], factors: Mapping[Names, RightFactor]) -> list[Adapter]:
        """One for each text, trained on the refined network."""
        model = fit.model
        slots = model.slots(name for names in factors for name in names)
        modules = {name: slot.owner for name, slot in slots.items()}
        adapters = [Adapter(modules, {n: fresh(m, self.rank, fit.generator) for n, m in modules.items()}) for _ in subjects]
        rate, decay = fit.rate, self.weight_decay
        optimisers = [torch.optim.AdamW(adapter.parameters, lr=rate, weight_decay=decay) for adapter in adapters]
        changes = expanded(model, factors)
        weights = {n: (s.tensor.float() + changes[n].to(s.tensor.device)).to(s.tensor.dtype) for n, s in slots.items()}
        parts = {f"adapter {i}": nn.ParameterList(adapter.parameters) for i, adapter in enumerate(adapters)}
        states = {f"optimiser {i}": optimiser for i, optimiser in enumerate(optimisers)}
        refined = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
        for step in fit.steps(self.steps * len(subjects), {**parts, **states}):
            i = step // self.steps
            with swapped(slots, refined):  # a step at a time: a checkpoint recognises the original weights
                fit.log({"attention": self.step(fit, subjects[i], adapters[i], optimisers[i])})
        return adapters

    def step(self, fit: Fit, subject: Subject, adapter: Adapter, optimiser: torch.optim.Optimizer) -> float:
        """One step on one picture and one sentence; the loss."""
        model, g = fit.model, fit.generator
        picture, row = (int(torch.randint(n, (), generator=g)) for n in (len(subject.latents), len(subject.cond)))
        clean = subject.latents[picture : picture + 1]
        times = focal_weights(model.schedule.train_steps) if self.focal else torch.ones(model.schedule.train_steps)
        t = torch.multinomial(times, 1, generator=g).to(clean.device)
        x = model.schedule.add_noise(clean, torch.randn(clean.shape, generator=g).to(clean.device), t)
        mask, marked, parts = None if subject.masks is None else subject.masks[picture], subject.marked[row], []
        with adapter, model.attention() as maps:
            maps.watchers.append(lambda p: parts.append(marked_attention(p, mask, marked, squared=self.loss == "squared")))
            model.predict(x, t, subject.cond[row : row + 1])
            loss = model.meter.watch_backward(torch.stack(parts).sum(0, keepdim=True)).sum()
            descend(loss, optimiser, clip=self.clip)
        return loss.item()

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact where the user gives neither pictures nor masks."""
        texts, steps = _texts(task), self.steps * len(_texts(task))
        if self.steps == 0:
            return {"steps": 0, "forwards": 0, "backwards": 0}
        looked = self.images * sum(self._masked(concept) for concept, _, _ in texts)
        drawn = pictures.drawing(model, self.images * len(texts))
        return {"steps": steps, "forwards": steps + drawn + looked, "backwards": steps}

    def memory(self, model: Model, task: Task) -> int:
        """The refined maps, the adapters with gradients and AdamW's moments, and E_i in float64."""
        weights = [slot.tensor for slot in model.select("text_kv").values()]
        factors = sum(self.rank * sum(w.shape) for w in weights) * len(_texts(task))
        return 4 * sum(w.numel() for w in weights) + 16 * factors + 8 * weights[0].shape[1] ** 2 * len(_texts(task))


def around(texts: Texts, first: str, second: str) -> tuple[Tensor, Tensor]:
    """The rows (n d) of the words that two sentences share, in the one and in the other."""
    total = len(texts.tokens[first])
    ours, theirs = aligned(texts.words(first), texts.words(second), total)
    return texts.tokens[first][ours], texts.tokens[second][theirs]


def _fitting(texts: Texts, text: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs whose first sentence holds the tokens of `text`, and that are not cut off."""
    words, total = texts.words(text)[1:-1], len(texts.tokens[text])
    found = [p for p in pairs if find(words, texts.words(p[0])) is not None and max(texts.lengths[s] for s in p) < total]
    if not found:
        raise InvalidTask(f"mace's sentences about {text!r} do not fit into the {total} tokens of the text encoder; shorten the text")
    return found


def _ends(cond: Cond) -> Tensor:
    """(b l) bool: where the first end-of-text token stands and where its id is repeated, on the CPU."""
    ids, last = cond.ids.cpu(), cond.mask.cpu().sum(1, keepdim=True) - 1  # type: ignore[union-attr]
    position = torch.arange(ids.shape[1])
    return (position >= last) & (ids == ids.gather(1, last))


def _texts(task: Task) -> list[tuple[Concept, str, str]]:
    """(concept, text to erase, mapping phrase)."""
    return [(swap.target, text, swap.anchor.texts[0]) for swap in task.erase for text in swap.target.texts]

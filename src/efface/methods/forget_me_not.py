"""Forget-Me-Not: turns the cross-attention away from the tokens of a concept.

    L = ‖ A_l[:, :, S] over all layers l ‖_F,      A_l = softmax(Q Kᵀ/√d) of a forward on (x_t, t, p)

p is "a photo of T" with T the concept's name, S the positions of T in p (and end-of-text positions, `ends`), x_t a noised picture of the
concept at t ~ U{0 … 999}. The rows of A sum to one, so what leaves T goes to the other tokens, the start token first: no anchor is
given, and one in the task has no effect. The noise that the network predicts is not used.

With `inversion` the concept is first turned into `tokens` learned words v by textual inversion on the same pictures,
min over v of ‖ε_θ(x_t, t, p(v)) − ε‖², each step of AdamW followed by ‖v‖ ← ‖v‖ + min(1, 100 lr) (norm − ‖v‖); then T is v.

Trained: the parameters of `group`; those behind the last attention map get no gradient, and are not part of the edit. A step of either
stage costs one forward and one backward a row; drawing the pictures, where the user gives none, comes on top (`cost`).

What the preset "authors" does, and our defaults do otherwise:
- `ends="all"`: in SD 1.x padding is end-of-text too, so that most of the prompt is marked (in SD 2.x, for which the code was written,
  it is one token). Ours marks the first end-of-text alone; `use_pooler: false` of the code is "none".
- inversion, on one picture a step. Ours is without, since it is the learned words that are forgotten then, and the plain name only through
  them, and takes four pictures a step; steps and rate are the authors'.
- learned words are pulled to a length of 0.4, that of CLIP's; ours is the mean length of the model's own (`word_norm`).
Different from the code in both: learned words start from the name's own tokens and, behind these, from noise of that length (the code:
two words given by hand, and noise of 80 times that length); batches above one mark each row by itself (the code mixes rows and heads up);
a name that is not found in the prompt is an error; pictures are cut about their centre. The paper's text could not be read: this follows
the code.

Known failures: what is measured is attention and not pictures, so that the loss says little about either erasure or damage. On the bundled
model neighbours go before the target does: with lr 1e-6 the judge saw the panda in 10 of 16 pictures (before: 16) and its neighbours in
1 of 12 (before: 12), with 4e-7 in 16 and 11, one fit each. Steps and rate want tuning for each concept (the authors say so too).
Hardly removes nudity; recovered by concept inversion (NYU-DICE-Lab/circumventing-concept-erasure)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from efface.core import pictures
from efface.core.edit import WeightEdit
from efface.core.errors import InvalidTask, Unsupported
from efface.core.fitting import Fit, State, fitting
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.task import Concept, Task
from efface.core.tokens import table
from efface.ops.descend import descend
from efface.ops.overlay import Overlay, training_bytes
from efface.ops.resteer import attention_norm, pulled, spliced, squared_attention
from efface.ops.rows import find

ENDS = ("first", "all", "none")


@final
@dataclass(frozen=True)
class ForgetMeNot(Method):
    """Attention re-steering."""

    needs: ClassVar[Needs] = Needs(groups=("xattn", "full", "text_encoder"), gradients=True)
    paper: ClassVar[Paper] = Paper(
        title="Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models",
        authors="Zhang, Wang, Xu, Wang, Shi",
        venue="CVPR Workshops 2024",
        arxiv="2303.17591",
        code="SHI-Labs/Forget-Me-Not",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": {"steps": 35, "lr": 2e-6, "batch": 1, "ends": "all", "inversion": True, "word_norm": 0.4}
        | {"template": "a photo of {}", "style_template": "a photo in the style of {}"},
        "object": {},
        "style": {"group": "xattn", "lr": 4e-6},
        "identity": {},
    }

    steps: int = 35
    """Steps of forgetting."""
    lr: float = 8e-6
    """Learning rate of forgetting (AdamW), in units of Stable Diffusion 1.x (`Model.learning_rate`); the authors' is 2e-6."""
    batch: int = 4
    """Pictures in a step of either stage; the authors' is 1."""
    group: str = "full"
    """The parameters that are trained: "full", or "xattn" (the code's `only_optimize_ca`)."""
    ends: Literal["first", "all", "none"] = "first"
    """Which end-of-text positions are marked beside the name: the first, all (the code's `use_pooler`), or none."""
    images: int = 10
    """Pictures that the model draws of each text to erase where the user gives none. 0: x_t is noised from a latent of zeros
    (the code's `no_real_image`)."""
    inversion: bool = False
    """Whether the concept is first turned into learned words (the code's `use_ti`)."""
    inversion_steps: int = 500
    """Steps of textual inversion for each text to erase."""
    inversion_lr: float = 1e-3
    """Learning rate of the learned words (AdamW); not multiplied by `model.lr_scale`."""
    tokens: int = 4
    """How many words are learned for each text."""
    word_norm: float | None = None
    """The length that learned words are pulled to; None is the mean length of the model's own words, the authors' is 0.4."""
    clip: float = 1.0
    """Largest norm of the gradient of forgetting."""
    weight_decay: float = 0.01
    """Of AdamW in forgetting; in the inversion it is ten times as large, as in the code."""
    template: str = "a picture of {}"
    """The prompt p; `{}` is T. The authors' says "photo"."""
    style_template: str = "a picture in {} style"
    """The prompt for concepts of kind "style"."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "images": 0, "inversion_steps": 1, "tokens": 1}
        positive = ("lr", "inversion_lr", "clip")
        self.check_fields(at_least=least, above_zero=positive, from_zero=("weight_decay",), one_of={"ends": ENDS})
        self.check_field("word_norm", self.word_norm is None or 0 < self.word_norm < math.inf, "a number above 0, or None")
        for name in ("template", "style_template"):
            self.check_field(name, getattr(self, name).count("{}") == 1, "a text with one {}")
        drawn = self.images > 0 or not self.inversion
        self.check_field("inversion", drawn, "False where `images` is 0, since words are learned from pictures")

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            subjects = [self.subject(fit, concept, text) for concept, text in _texts(task)]
            words = nn.ParameterList([s.words for s in subjects])
            learning = torch.optim.AdamW(words, lr=self.inversion_lr, weight_decay=10 * self.weight_decay)
            student = Overlay(model.select(self.group))
            forgetting = torch.optim.AdamW(student.parameters, lr=fit.rate, weight_decay=self.weight_decay)
            inversion = self.inversion_steps * len(subjects) if self.inversion else 0
            parts: State = {"words": words, "learning": learning, "student": student, "forgetting": forgetting}
            for step in fit.steps(inversion + self.steps, parts):
                if step < inversion:
                    fit.log({"inversion": self.invert(fit, subjects[step // self.inversion_steps], learning)})
                else:
                    fit.log({"erase": self.forget(fit, subjects, student, forgetting)})
            deltas = {name: delta for name, delta in student.deltas().items() if delta.any()}
            learned = {f"words/{s.text}": s.words.detach().cpu() for s in subjects} if self.inversion else {}
            return fit.edit(deltas, trace=learned)

    def subject(self, fit: Fit, concept: Concept, text: str) -> Subject:
        """A text to erase with its pictures and the prompt that names it. Raises InvalidTask where the name is not found in the prompt."""
        model = fit.model
        prompt = (self.style_template if concept.kind == "style" else self.template).format(text)
        ids, end = _tokens(model, prompt)
        name, stop = _tokens(model, text)
        start = find(name[1:stop].tolist(), ids.tolist())
        if start is None:
            raise InvalidTask(f"the tokens of {text!r} do not stand in the prompt {prompt!r} of forget_me_not; it is too long, or blank")
        embeddings = table(model)
        span = slice(start, start + stop - 1)
        norm = embeddings.norm(dim=-1).mean() if self.word_norm is None else torch.tensor(self.word_norm)
        drawn = torch.randn(self.tokens, embeddings.shape[1], generator=fit.generator)
        words = (drawn / drawn.norm(dim=-1, keepdim=True)).to(embeddings.device) * norm
        given = embeddings[ids[span]][: self.tokens] if self.inversion else words[:0]
        rows = nn.Parameter(torch.cat([given, words[len(given) :]]).detach().clone(), requires_grad=self.inversion)
        return Subject(text, ids, end, span, embeddings[ids], rows, float(norm), self.pictures(fit, concept, prompt))

    def pictures(self, fit: Fit, concept: Concept, prompt: str) -> Tensor:
        """Latents (2 n c h w): of the user's pictures or the model's own, as they are and mirrored; zeros with `images` = 0."""
        model = fit.model
        if self.images == 0:
            return torch.zeros(2, 1, *model.latent_shape, device=model.device)
        given = fit.resources.images.get(concept.name)
        images = pictures.given_or_drawn(model, given, [prompt] * self.images, fit.generator)
        return torch.stack([pictures.latents(model, side) for side in (images, images.flip(-1))])

    def invert(self, fit: Fit, subject: Subject, optimiser: torch.optim.Optimizer) -> float:
        """One step of textual inversion; the loss."""
        model, pick = fit.model, lambda n: torch.randint(n, (self.batch,), generator=fit.generator)
        clean = subject.latents[pick(2), pick(subject.latents.shape[1])]
        x, t, noise = _noised(fit, clean)
        prediction = model.predict(x, t, self.prompt(model, subject))
        loss = (prediction - model.schedule.target(clean, noise, t)).square().mean()
        descend(loss, optimiser)
        with torch.no_grad():
            subject.words.copy_(pulled(subject.words, subject.norm, min(1.0, 100 * self.inversion_lr)))
        return loss.item()

    def forget(self, fit: Fit, subjects: list[Subject], student: Overlay, optimiser: torch.optim.Optimizer) -> float:
        """One step of re-steering on pictures drawn from those of all texts; the loss."""
        model, counts = fit.model, [s.latents.shape[1] for s in subjects]
        drawn = torch.randint(sum(counts), (self.batch,), generator=fit.generator).tolist()
        rows = [(s, i) for s, count in zip(subjects, counts, strict=True) for i in range(count)]
        clean = torch.stack([rows[i][0].latents[0, rows[i][1]] for i in drawn])
        with torch.no_grad():
            conds = [self.prompt(model, rows[i][0]) for i in drawn]
        marked = torch.stack([rows[i][0].marked(self.ends, self.inversion) for i in drawn])
        x, t, _ = _noised(fit, clean)
        with student, attended(model, x, t, Cond.cat(conds), marked) as squares:
            loss = attention_norm(squares)
            descend(loss, optimiser, clip=self.clip)
        return loss.item()

    def prompt(self, model: Model, subject: Subject) -> Cond:
        """p, encoded (1 l d): with the learned words where there are some."""
        if not self.inversion:
            return model.encode_tokens(subject.ids[None])
        return model.encode_tokens(embeds=spliced(subject.embeds, subject.span.start, subject.span.stop, subject.words)[None])

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact where the user gives no pictures."""
        texts = len(_texts(task))
        steps = self.steps + (self.inversion_steps * texts if self.inversion else 0)
        return {
            "steps": steps,
            "forwards": steps * self.batch + pictures.drawing(model, self.images * texts),
            "backwards": steps * self.batch,
        }

    def memory(self, model: Model, task: Task) -> int:
        """The student with AdamW."""
        return training_bytes(model.select(self.group))


@dataclass(frozen=True, eq=False)
class Subject:
    """A text to erase: the prompt that names it, what is learned for it, and its pictures."""

    text: str
    ids: Tensor
    """(l,) token ids of the prompt."""
    end: int
    """The position of its first end-of-text token."""
    span: slice
    """Where the text stands in it."""
    embeds: Tensor
    """(l d) input embeddings of the prompt."""
    words: nn.Parameter
    """(k d) learned words."""
    norm: float
    latents: Tensor
    """(2 n c h w), plain and mirrored."""

    def marked(self, ends: str, learned: bool) -> Tensor:
        """S as (l,) bool on the CPU: the name's positions, and those end-of-text positions that `ends` names."""
        length = len(self.words) if learned else self.span.stop - self.span.start
        shift = length - (self.span.stop - self.span.start)
        position, end = torch.arange(len(self.ids)), self.end + shift
        named = (position >= self.span.start) & (position < self.span.start + length)
        padded = (position > end) & bool((self.ids[self.end :] == self.ids[self.end]).all())
        return named | {"none": position < 0, "first": position == end, "all": (position == end) | padded}[ends]


@contextmanager
def attended(model: Model, x: Tensor, t: Tensor, cond: Cond, marked: Tensor) -> Iterator[Tensor]:
    """Σ A² (b) over all layers, heads and places at the marked tokens (b l), of one forward; its backward is metered and belongs inside."""
    squares: list[Tensor] = []
    with model.attention() as maps:
        maps.watchers.append(lambda probabilities: squares.append(squared_attention(probabilities, marked)))
        model.predict(x, t, cond)
        yield model.meter.watch_backward(torch.stack(squares).sum(0))


def _texts(task: Task) -> list[tuple[Concept, str]]:
    return [(concept, text) for concept in task.targets for text in concept.texts]


def _tokens(model: Model, text: str) -> tuple[Tensor, int]:
    """The ids (l,) of a text, and the position of its first end-of-text token."""
    with torch.no_grad():
        cond = model.encode([text])
    if cond.ids is None or cond.mask is None:
        raise Unsupported(f"forget_me_not marks the tokens of a name, and the encoding of {model.id} tells no token ids")
    return cond.ids[0], int(cond.mask[0].sum()) - 1


def _noised(fit: Fit, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, noise) at uniform times."""
    schedule = fit.model.schedule
    t = torch.randint(schedule.train_steps, (len(clean),), generator=fit.generator).to(clean.device)
    noise = torch.randn(clean.shape, generator=fit.generator).to(clean.device)
    return schedule.add_noise(clean, noise, t), t, noise

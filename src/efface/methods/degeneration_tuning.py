"""Degeneration-Tuning, a RECONSTRUCTION: ties the name of a concept to pictures of it whose cells were shuffled (the scrambled grid).

    L = E_{(x,y)∈D_e} ‖ε − ε_θ(z_t(scramble(x)), t, y)‖²  +  λ E_{(x,y)∈D_k} ‖ε − ε_θ(z_t(x), t, y)‖²,   λ = `keep_weight`

D_e: pictures that the model draws of the concept (or the user's), each scrambled anew whenever it is met; D_k: pictures that it draws of
the concepts to keep and of `keep_words` other words, as they are; y the prompts they were drawn from, dropped in a share `drop` of D_k and
never in D_e, where that would scramble the unconditional branch and so everything. No anchor is given: one in the task has no effect.

Trained: the parameters of `group`. A step costs 2 forwards and 2 backwards a row, 3 and 2 with `preserve="distil"`; drawing the pictures
comes on top (`cost`).

Verified from the paper's abstract and from descriptions of it: fine-tuning on scrambled grids, at the level of weights, so that the change
can be carried over to other pipelines such as ControlNet. Everything else is ours, since neither code nor full text could be read: cell
size, number of pictures, templates, the preservation set, the loss, group and learning rate. Results belong under "DT (reconstruction)".
- `cell` is a share of the image, so that one setting serves all sizes; cells meet latents (multiples of what one latent covers).
- `order="random"` draws a permutation for each picture and step: one fixed for all would be a rearrangement that can be undone.
- `space="low_pass"` shuffles the cells' mean colours alone, "latents" the latents; "pixels" is what the paper describes.
- `preserve="distil"` has the frozen network's prediction in the place of ε on D_k: exactly 0 at the start, and no pictures' noise.

Known failures: what appears is garbage by design and no usable picture, so read it beside the share in which nothing is recognised; words
shared with the name are scrambled too ("man" in "spider man"); paraphrases that avoid the name leak; the name in a negative prompt
steers away from garbage; the borders of cells are drawn as a grid; a strong control map can bring the layout back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from efface.core import pictures
from efface.core.edit import WeightEdit
from efface.core.errors import InvalidTask
from efface.core.fitting import Fit, fitting
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.task import Concept, Task
from efface.core.words import vocabulary
from efface.ops.descend import descend
from efface.ops.overlay import Overlay, training_bytes
from efface.ops.scramble import cell_side, permutations, scramble, scramble_layout

TEMPLATES = ("{}", "a {}", "a picture of a {}", "an image of a {}", "a drawing of a {}")
STYLE_TEMPLATES = ("a picture in {} style", "a {thing} in {} style", "an image of a {thing} in {} style", "a {} {thing}")
"""`{thing}` is one of the words to keep."""
CHOICES = {"space": ("pixels", "low_pass", "latents"), "order": ("random", "fixed"), "preserve": ("noise", "distil")}


@final
@dataclass(frozen=True)
class DegenerationTuning(Method):
    """The scrambled grid (reconstruction)."""

    needs: ClassVar[Needs] = Needs(groups=("full",), gradients=True, keep="preserved")
    paper: ClassVar[Paper] = Paper(
        title="Degeneration-Tuning: Using Scrambled Grid shield Unwanted Concepts from Stable Diffusion",
        authors="Ni, Wei, Li, Tang, Zhuang, Tian",
        venue="ACM MM 2023",
        arxiv="2308.02552",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "large": {"steps": 1000, "lr": 1e-5, "batch": 2, "images": 400, "keep_images": 400, "keep_words": 100},
        "object": {},
        "style": {"cell": 1 / 32},
        "identity": {},
        "unsafe": {"cell": 1 / 32},
    }

    steps: int = 200
    """Steps on the network."""
    lr: float = 4e-5
    """Learning rate (AdamW), in units of Stable Diffusion 1.x (`Model.learning_rate`); chosen on the bundled model."""
    batch: int = 8
    """Pictures of each of the two sets in a step."""
    group: str = "full"
    """The parameters that are trained."""
    images: int = 48
    """Pictures drawn of each concept to erase, where the user gives none (|D_e|)."""
    keep_images: int = 96
    """Pictures drawn of what to keep (|D_k|), spread over the words to keep."""
    keep_words: int = 48
    """Random words of the vocabulary that are kept beside the concepts in `keep`; the words of the targets are never among them."""
    keep_weight: float = 1.0
    """Weight of preservation (λ)."""
    cell: float = 1 / 16
    """The side of a cell as a share of the image's shorter side; 1/16 is 32 pixels of 512. Rounded to whole latents."""
    space: Literal["pixels", "low_pass", "latents"] = "pixels"
    """What is scrambled: pixels (the paper), the cells' mean colours alone, or latents."""
    order: Literal["random", "fixed"] = "random"
    """A permutation for each picture and step, or one for all."""
    preserve: Literal["noise", "distil"] = "noise"
    """The target on D_k: the noise, or the frozen network's prediction."""
    drop: float = 0.1
    """Share of D_k whose caption is left empty."""
    weight_decay: float = 0.01
    """Of AdamW."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "images": 1, "keep_images": 1, "keep_words": 0}
        self.check_fields(at_least=least, above_zero=("lr",), from_zero=("keep_weight", "weight_decay"), one_of=CHOICES)
        self.check_field("cell", 0 < self.cell <= 1, "a share above 0, at most 1")
        self.check_field("drop", 0 <= self.drop < 1, "a share of at least 0, below 1")

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            grid = self.grid(model)
            words = self.words(fit)
            spoilt = Album.cat([self.erased(fit, concept, words) for concept in task.targets])
            whole = self.album(fit, self.kept(task, words))
            clean = whole.latents(model)
            fixed = permutations(1, grid.cells, fit.generator)
            student = Overlay(model.select(self.group))
            optimiser = torch.optim.AdamW(student.parameters, lr=fit.rate, weight_decay=self.weight_decay)
            for _ in fit.steps(self.steps, {"student": student, "optimiser": optimiser}):
                pick, keep = (torch.randint(len(album), (self.batch,), generator=fit.generator) for album in (spoilt, whole))
                order = permutations(self.batch, grid.cells, fit.generator) if self.order == "random" else fixed.expand(self.batch, -1)
                latents = (self.broken(model, spoilt.images(pick), grid, order), clean[keep.to(clean.device)])
                erase, kept_loss = self.losses(fit, student, latents, Cond.cat([spoilt.told(pick), self.dropped(fit, whole.told(keep))]))
                with student:
                    descend(erase + self.keep_weight * kept_loss, optimiser)
                fit.log({"erase": erase.item(), "keep": kept_loss.item()})
            return fit.edit(student.deltas(), info={"erased": list(spoilt.captions), "kept": list(whole.captions), "cell": grid.side})

    # -- what is learned from --------------------------------------------------------------------------------------------
    def grid(self, model: Model) -> Grid:
        """The grid for the model's size."""
        height, width = pictures.size(model)
        unit = height // model.latent_shape[1]
        side = cell_side(height, width, float(self.cell), unit)
        return Grid(side, unit, (height // side) * (width // side))

    def words(self, fit: Fit) -> list[str]:
        """Random words of the vocabulary that are no part of a target and stand in no other list."""
        gone = {word for c in fit.task.targets for text in (c.name, *c.texts) for word in text.casefold().split()}
        excluded = gone | {text.casefold() for c in fit.task.keep for text in c.texts}
        words = [word for word in vocabulary(fit.model, fit.task, fit.resources) if word.casefold() not in excluded]
        return [words[i] for i in torch.randperm(len(words), generator=fit.generator)[: self.keep_words].tolist()]

    def kept(self, task: Task, words: Sequence[str]) -> list[str]:
        """The prompts of D_k, by turns of the concepts in `keep` and the words, each time in another form. Raises InvalidTask for none."""
        forms = [prompts(c, text, words or ["picture"]) for c in task.keep for text in c.texts]
        forms += [prompts(Concept(word), word, []) for word in words]
        if not forms:
            raise InvalidTask("degeneration_tuning has nothing to keep; name concepts to keep, give a vocabulary, or raise keep_words")
        turns = zip(*(islice(cycle(form), start, start + self.keep_images) for start, form in enumerate(forms)), strict=True)
        return [text for turn in turns for text in turn][: self.keep_images]

    def erased(self, fit: Fit, concept: Concept, words: Sequence[str]) -> Album:
        """D_e of one concept: the user's pictures under its prompts, or those that the model draws from them."""
        given = fit.resources.images.get(concept.name)
        found = [prompt for text in concept.texts for prompt in prompts(concept, text, words or ["picture"])]
        captions = list(islice(cycle(found), self.images if given is None else len(given)))
        return self.album(fit, captions, given)

    def album(self, fit: Fit, captions: list[str], given: Tensor | None = None) -> Album:
        """Pictures with their captions, encoded."""
        model = fit.model
        images = pictures.given_or_drawn(model, given, captions, fit.generator)
        unique = list(dict.fromkeys(captions))
        with torch.no_grad():
            cond = Cond.cat([model.encode(unique[i : i + 32]) for i in range(0, len(unique), 32)])
        return Album((images * 255).round().to(torch.uint8), tuple(captions), cond[[unique.index(c) for c in captions]])

    @torch.no_grad()
    def broken(self, model: Model, images: Tensor, grid: Grid, order: Tensor) -> Tensor:
        """Latents of scrambled pictures (b 3 H W)."""
        if self.space == "latents":
            return scramble(pictures.latents(model, images), grid.side // grid.unit, order)
        mixed = (scramble if self.space == "pixels" else scramble_layout)(images, grid.side, order)
        return pictures.latents(model, mixed.clamp(0, 1))

    def dropped(self, fit: Fit, cond: Cond) -> Cond:
        """The captions of D_k, a share of them replaced by the empty one."""
        empty = torch.rand(len(cond), generator=fit.generator) < self.drop
        with torch.no_grad():
            null = fit.model.encode([""])
        return Cond.cat([null if gone else cond[[i]] for i, gone in enumerate(empty.tolist())])

    # -- loss ------------------------------------------------------------------------------------------------------------
    def losses(self, fit: Fit, student: Overlay, latents: tuple[Tensor, Tensor], cond: Cond) -> tuple[Tensor, Tensor]:
        """The two terms, for latents of D_e and D_k and their captions, at fresh times and noise; in the network's own parametrisation."""
        model, clean = fit.model, torch.cat(latents)
        t = torch.randint(model.schedule.train_steps, (len(clean),), generator=fit.generator).to(clean.device)
        noise = torch.randn(clean.shape, generator=fit.generator).to(clean.device)
        x, goal, first = model.schedule.add_noise(clean, noise, t), model.schedule.target(clean, noise, t), len(latents[0])
        if self.preserve == "distil":
            with torch.no_grad():
                goal = torch.cat([goal[:first], model.predict(x[first:], t[first:], cond[slice(first, None)])])
        with student:
            error = (model.predict(x, t, cond) - goal).square()
        return error[:first].mean(), error[first:].mean()

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact where the user gives no pictures."""
        rows = self.steps * self.batch
        drawn = pictures.drawing(model, self.images * len(task.targets) + self.keep_images)
        return {"steps": self.steps, "forwards": (3 if self.preserve == "distil" else 2) * rows + drawn, "backwards": 2 * rows}

    def memory(self, model: Model, task: Task) -> int:
        """The student with AdamW, and the pictures at 8 bits."""
        height, width = (8 * side for side in model.latent_shape[1:])
        return training_bytes(model.select(self.group)) + 3 * height * width * (self.images * len(task.targets) + self.keep_images)


@dataclass(frozen=True)
class Grid:
    """Cells of an image."""

    side: int
    """Pixels."""
    unit: int
    """Pixels that one latent covers."""
    cells: int
    """How many an image has."""


@dataclass(frozen=True, eq=False)
class Album:
    """Pictures with captions."""

    pixels: Tensor
    """(n 3 H W) uint8, on the CPU."""
    captions: tuple[str, ...]
    cond: Cond
    """n rows."""

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, rows: Tensor) -> Tensor:
        """(b 3 H W) in [0, 1]."""
        return self.pixels[rows].float() / 255

    def latents(self, model: Model) -> Tensor:
        """(n c h w)"""
        return torch.cat([pictures.latents(model, self.images(rows)) for rows in torch.arange(len(self)).split(model.batch())])

    def told(self, rows: Tensor) -> Cond:
        return self.cond[rows.to(self.cond.tokens.device)]

    @staticmethod
    def cat(albums: Sequence[Album]) -> Album:
        captions = tuple(caption for album in albums for caption in album.captions)
        return Album(torch.cat([a.pixels for a in albums]), captions, Cond.cat([a.cond for a in albums]))


def prompts(concept: Concept, text: str, things: Sequence[str]) -> list[str]:
    """The prompts of a concept: each template with the text, those of styles with different things."""
    if concept.kind != "style":
        return [template.format(text) for template in TEMPLATES]
    return [template.format(text, thing=thing) for thing in things for template in STYLE_TEMPLATES]

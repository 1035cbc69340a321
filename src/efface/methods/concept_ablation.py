"""Concept Ablation: under the target's prompt the model is to predict what it predicts under the anchor's, on pictures of the anchor.

    model-based:   ‖ε_θ(z_t, t, c*) − sg[ε_θ(z_t, t, c)]‖²  +  λ ‖ε_θ(z_t, t, c) − ε‖²
    noise-based:   ‖ε_θ(z_t, t, c*) − ε‖²                   +  λ ‖ε_θ(z_t, t, c) − ε‖²

c* is a target prompt and c its anchor prompt, z_t a noised picture that the unedited model drew from c, t ~ U{0 … 999}, sg no gradient,
λ = `keep_weight`. sg is of the network as it is trained, which saves a copy (`goal="frozen"` asks the original). The second term holds
the anchor's pictures where `prior` says so, and pictures of what `keep` names (ours).

How c* comes from c (`wording`): "replace" the anchor's word by the target's; "style": c and a phrase that names the style; "add": "T, c"
and "in T style, c" (nudity); "given": the target's own prompts beside the anchor's (memorised captions and their paraphrases). "auto" is
"style" for styles and otherwise "replace". Anchor prompts are those of the anchor concept, if it has any (the authors have 200 of a
language model), else made from templates. Without an anchor a style is ablated into plain things, and anything else into the empty prompt,
which is ours.

Trained: the parameters of `group`. A step costs 2 forwards and 1 backward a row (noise-based 1 and 1), and as much again as 1 and 1 where
something is held; drawing the pictures comes on top (`cost`). The gradient through the key and value of the first token is cut
(`detach_bos`).

Where it is not plain what the method is:
- `sum_channels`: both code bases divide by a mask of one channel, so that the first term is 4 times a mean (the diffusers script; in the
  other λ = 0.2 goes with it on both). Ours are means with λ = 0.25, the same ratio as the diffusers script's.
- `phrases`: the two scripts' lists of style phrases; ours adds the forms that the bundled model's captions take.
- whole words are replaced, whatever their case, and "a" becomes "an" where needed; the scripts replace substrings.
- `augment`: a picture is made smaller or larger, the loss looks at it alone, and the target prompt alone says so ("a far away R2D2").
  The mask keeps its border where nothing was resized; the diffusers script loses a cell. Off by default: our model knows no such words.
The presets are the runs on two GPUs with a batch of 4 each and lr × GPUs × batch. Not offered: training word embeddings, and choosing
paraphrases by SSCD similarity (give them as prompts). The paper's text could not be read: this follows its code.

Known failures: leaks through indirect prompts, and far-away concepts degrade (Garg & Tiwari, arXiv 2406.12592); on nudity weak; an anchor
whose word is no class of the target, or covers it ("feline" for "cat"), brings the target back. The defaults are meant for the bundled
model, and have not been run on Stable Diffusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from efface.concepts.rewording import FORMS, has_word, named, pairs_of, subjects
from efface.core import pictures
from efface.core.edit import WeightEdit
from efface.core.fitting import Fit, fitting
from efface.core.method import Method, Needs, Paper, Resources
from efface.core.model import Cond, Model
from efface.core.task import Swap, Task
from efface.ops.bos import first_detached
from efface.ops.descend import descend
from efface.ops.overlay import Overlay, training_bytes
from efface.ops.zoom import FAR, cells, scales, zoom

CHOICES = {
    "loss": ("model", "noise"),
    "goal": ("student", "frozen"),
    "wording": ("auto", "replace", "style", "add", "given"),
    "phrases": ("ours", "compvis", "diffusers"),
    "prior": ("overlap", "always", "never"),
}
SIZES = {"far": ("a far away ", "very small "), "near": ("zoomed in ", "close up ")}
AUTHORS = {"batch": 8, "lr": 1.6e-5, "images": 1000, "sum_channels": True, "keep_weight": 1.0, "phrases": "diffusers"}


@final
@dataclass(frozen=True)
class ConceptAblation(Method):
    """Ablation of a concept into its anchor."""

    needs: ClassVar[Needs] = Needs(groups=("text_kv",), gradients=True, keep="preserved")
    paper: ClassVar[Paper] = Paper(
        title="Ablating Concepts in Text-to-Image Diffusion Models",
        authors="Kumari, Zhang, Wang, Shechtman, Zhang, Zhu",
        venue="ICCV 2023",
        arxiv="2303.13516",
        code="nupurkmr9/concept-ablation",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "authors": {**AUTHORS, "steps": 100, "augment": True},
        "authors-style": {**AUTHORS, "steps": 100, "wording": "style"},
        "authors-memorization": {**AUTHORS, "steps": 400, "batch": 4, "lr": 2e-6, "group": "full", "wording": "given", "prior": "always"},
        "authors-nudity": {**AUTHORS, "steps": 400, "lr": 6.4e-5, "group": "attn", "wording": "add", "prior": "always"},
        "object": {},
        "style": {},
        "identity": {},
        "unsafe": {},
    }

    steps: int = 100
    """Steps of AdamW."""
    lr: float = 4e-6
    """Learning rate (AdamW), in units of Stable Diffusion 1.x (`Model.learning_rate`). The authors' is 1.6e-5, with which 150 steps
    took two thirds of the other concepts from the bundled model."""
    batch: int = 8
    """Pictures in a step, of each of the two terms."""
    group: str = "text_kv"
    """The parameters that are trained: "text_kv" (the code's `cross-attn`), "attn" (nudity), "full" (memorised pictures)."""
    loss: Literal["model", "noise"] = "model"
    """What the target's prediction is compared with: the one under the anchor's prompt, or the noise."""
    goal: Literal["student", "frozen"] = "student"
    """Which network predicts under the anchor's prompt: the one in training (the method), or the original, for long runs."""
    images: int = 64
    """Pictures that the model draws of each anchor, where the user gives none; the authors' is 1000."""
    keep_images: int = 32
    """Pictures drawn of what `keep` names, in all."""
    keep_weight: float = 0.25
    """Weight of the held pictures (λ)."""
    prior: Literal["overlap", "always", "never"] = "overlap"
    """Whether the anchors' own pictures are held: "overlap", where the target's name holds the anchor's word ("grumpy cat")."""
    wording: Literal["auto", "replace", "style", "add", "given"] = "auto"
    """How target prompts are made from anchor prompts."""
    phrases: Literal["ours", "compvis", "diffusers"] = "ours"
    """How a style is named in them."""
    detach_bos: bool = True
    """Whether nothing is learned through the first token's keys and values."""
    augment: bool = False
    """Whether pictures are mirrored, made smaller and larger; the authors' runs on objects do."""
    sum_channels: bool = False
    """Whether the first term is summed over the latent's channels, as in both code bases, and not averaged."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    weight_decay: float = 0.01
    """Of AdamW."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "images": 1, "keep_images": 1}
        self.check_fields(at_least=least, above_zero=("lr", "clip"), from_zero=("keep_weight", "weight_decay"), one_of=CHOICES)

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        with fitting(self, model, task, seed, resources, lr=self.lr) as fit:
            erased = [self.album(fit, swap) for swap in task.erase]
            held = self.held(fit, erased)
            student, told = Overlay(model.select(self.group)), Encoder(model)
            optimiser = torch.optim.AdamW(student.parameters, lr=fit.rate, weight_decay=self.weight_decay)
            album = Album.cat(erased)
            for _ in fit.steps(self.steps, {"student": student, "optimiser": optimiser}):
                loss = self.erase(fit, student, album, told)
                figures = {"erase": loss.item()}
                if held is not None:
                    keep = self.keep(fit, student, held, told)
                    figures["keep"], loss = keep.item(), loss + self.keep_weight * keep
                with student:
                    descend(loss, optimiser, clip=self.clip)
                fit.log(figures)
            pairs = {anchor: list(targets) for anchor, targets in zip(album.anchors, album.targets, strict=True)}
            return fit.edit(student.deltas(), info={"prompts": pairs, "kept": [] if held is None else sorted(set(held.anchors))})

    # -- pictures and prompts --------------------------------------------------------------------------------------------
    def album(self, fit: Fit, swap: Swap) -> Album:
        """Pictures of the anchor, drawn from its prompts or the user's, and for each the prompts that name the target instead."""
        things = subjects(fit.task, fit.resources.vocabulary)
        order = torch.randperm(len(things), generator=fit.generator).tolist()
        pairs = pairs_of(swap, self.wording_of(swap), self.phrases, [things[i] for i in order])
        given = fit.resources.images.get(swap.anchor.name) if swap.anchor.name else None
        chosen = list(islice(cycle(pairs), self.images if given is None else len(given)))
        anchors = tuple(anchor for anchor, _ in chosen)
        images = pictures.given_or_drawn(fit.model, given, anchors, fit.generator)
        return Album(images, pictures.latents(fit.model, images), anchors, tuple(targets for _, targets in chosen))

    def wording_of(self, swap: Swap) -> str:
        """`wording`, with "auto" decided."""
        if self.wording != "auto":
            return self.wording
        return "style" if swap.target.kind == "style" else "replace"

    def priors(self, task: Task) -> list[int]:
        """Which swaps' own pictures are held."""
        if self.prior != "overlap":
            return list(range(len(task.erase))) if self.prior == "always" else []
        return [i for i, swap in enumerate(task.erase) if swap.anchor.name and has_word(swap.target.name, swap.anchor.name)]

    def held(self, fit: Fit, erased: Sequence[Album]) -> Album | None:
        """What the second term holds; None for nothing."""
        task, parts = fit.task, [erased[i] for i in self.priors(fit.task)]
        forms = [form.format(named(text, concept.kind)) for form in FORMS for concept in task.keep for text in concept.texts]
        if forms:
            prompts = tuple(islice(cycle(forms), self.keep_images))
            images = pictures.draw(fit.model, prompts, fit.generator)
            parts.append(Album(images, pictures.latents(fit.model, images), prompts, ((),) * len(prompts)))
        return Album.cat(parts) if parts else None

    # -- loss ------------------------------------------------------------------------------------------------------------
    def erase(self, fit: Fit, student: Overlay, album: Album, told: Encoder) -> Tensor:
        """The first term for random pictures."""
        model, generator = fit.model, fit.generator
        rows = torch.randint(len(album), (self.batch,), generator=generator)
        prompts = album.target(rows, generator)
        clean, mask = album.latents[rows.to(album.latents.device)], None
        if self.augment:
            clean, mask, prompts = augmented(model, album.images[rows], prompts, generator)
        x, t, goal = noised(fit, clean)
        if self.loss == "model":
            with torch.no_grad(), student if self.goal == "student" else nullcontext():
                goal = model.predict(x, t, told([album.anchors[i] for i in rows.tolist()]))
        error = (self.learned(model, student, x, t, told(prompts)) - goal).square()
        return masked_mean(error, mask) * (error.shape[1] if self.sum_channels else 1)

    def keep(self, fit: Fit, student: Overlay, held: Album, told: Encoder) -> Tensor:
        """mean ‖ε_θ(z_t, c) − ε‖² for random held pictures."""
        rows = torch.randint(len(held), (self.batch,), generator=fit.generator)
        x, t, goal = noised(fit, held.latents[rows.to(held.latents.device)])
        return (self.learned(fit.model, student, x, t, told([held.anchors[i] for i in rows.tolist()])) - goal).square().mean()

    def learned(self, model: Model, student: Overlay, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The student's prediction, with or without a gradient through the first token."""
        maps = [slot.owner for slot in model.select("text_kv").values()] if self.detach_bos else []
        with student, first_detached(maps):
            return model.predict(x, t, cond)

    def cost(self, model: Model, task: Task) -> dict[str, float]:
        """Exact where the user gives no pictures."""
        rows, held = self.steps * self.batch, bool(task.keep or self.priors(task))
        drawn = pictures.drawing(model, self.images * len(task.erase) + (self.keep_images if task.keep else 0))
        forwards = (2 if self.loss == "model" else 1) * rows + held * rows + drawn
        return {"steps": self.steps, "forwards": forwards, "backwards": (1 + held) * rows}

    def memory(self, model: Model, task: Task) -> int:
        """The student with AdamW, and the pictures in float32; bytes."""
        height, width = (8 * side for side in model.latent_shape[1:])
        return training_bytes(model.select(self.group)) + 12 * height * width * (self.images * len(task.erase) + self.keep_images)


@dataclass(frozen=True, eq=False)
class Album:
    """Pictures, the anchor prompt of each, and the target prompts that may take its place."""

    images: Tensor
    """(n 3 H W) in [0, 1], on the CPU."""
    latents: Tensor
    """(n c h w)"""
    anchors: tuple[str, ...]
    targets: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.anchors)

    def target(self, rows: Tensor, generator: torch.Generator) -> list[str]:
        """One of the target prompts of each row (b), at random."""
        found = [self.targets[i] for i in rows.tolist()]
        return [prompts[int(torch.randint(len(prompts), (1,), generator=generator))] for prompts in found]

    @staticmethod
    def cat(albums: Sequence[Album]) -> Album:
        images, latents = torch.cat([a.images for a in albums]), torch.cat([a.latents for a in albums])
        return Album(images, latents, sum((a.anchors for a in albums), ()), sum((a.targets for a in albums), ()))


class Encoder:
    """Encodes prompts, each once."""

    def __init__(self, model: Model) -> None:
        self.model, self.known = model, dict[str, Cond]()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Cond:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if new:
            cond = self.model.encode(new)
            self.known |= {prompt: cond[[i]] for i, prompt in enumerate(new)}
        return Cond.cat([self.known[prompt] for prompt in prompts])


def noised(fit: Fit, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, what a network in training is to predict) for latents (b c h w) at uniform times."""
    schedule = fit.model.schedule
    t = torch.randint(schedule.train_steps, (len(clean),), generator=fit.generator).to(clean.device)
    noise = torch.randn(clean.shape, generator=fit.generator).to(clean.device)
    return schedule.add_noise(clean, noise, t), t, schedule.target(clean, noise, t)


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of (b c h w) over the cells of a mask (b 1 h w), first in each picture and then over pictures; over all without one."""
    if mask is None:
        return error.mean()
    return ((error * mask).sum((1, 2, 3)) / (error.shape[1] * mask.sum((1, 2, 3)))).mean()


@torch.no_grad()
def augmented(model: Model, images: Tensor, prompts: Sequence[str], generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """Latents, masks (b 1 h w) and target prompts of pictures (b 3 H W) that were mirrored half of the time, and made smaller or larger."""
    mirrored, corners = torch.rand(len(images), generator=generator) < 0.5, torch.rand(len(images), 2, generator=generator).tolist()
    found, masks, texts = [], [], []
    for image, flip, scale, corner, prompt in zip(
        images, mirrored.tolist(), scales(len(images), generator).tolist(), corners, prompts, strict=True
    ):
        picture, box = zoom(image.flip(-1) if flip else image, scale, (corner[0], corner[1]))
        size = SIZES["far"] if scale < FAR else SIZES["near"] if scale > 1 else ("",)
        found.append(picture)
        masks.append(cells(box, *model.latent_shape[1:], (image.shape[1], image.shape[2])))
        texts.append(size[int(torch.randint(len(size), (1,), generator=generator))] + prompt)
    latents = pictures.latents(model, torch.stack(found))
    return latents, torch.stack(masks).to(latents.device), texts

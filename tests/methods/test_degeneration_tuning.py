"""Degeneration-Tuning (a reconstruction) against its sheet: what is scrambled, what is learned, and the edit in another pipeline."""

import warnings

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline

from efface.core import pictures
from efface.core.errors import InvalidMethod, InvalidTask
from efface.core.fitting import fitting
from efface.core.method import Resources
from efface.core.model import Cond
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods.degeneration_tuning import DegenerationTuning
from efface.models.sd import StableDiffusion
from efface.ops.descend import descend
from efface.ops.overlay import Overlay
from efface.ops.scramble import cut, likeness, permutations, scramble

SMALL = {"steps": 2, "batch": 2, "images": 3, "keep_images": 4, "keep_words": 2}


def fitted(model, task="cat", keep=("dog",), resources=Resources(), **fields):
    return DegenerationTuning(**{**SMALL, **fields}).fit(model, Task.of(task, keep), resources=resources)


def begun(model, task="cat", keep=("dog",), resources=Resources(), **fields):
    """A method and its fit before the first step."""
    method = DegenerationTuning(**{**SMALL, **fields})
    return method, fitting(method, model, Task.of(task, keep), 0, resources)


# -- pictures ------------------------------------------------------------------------------------------------------------
def test_the_grid_follows_the_size_of_the_model(tiny_model):
    """64 pixels and latents of 8: a sixteenth is half a latent, which is rounded to a whole one."""
    method, begin = begun(tiny_model)
    with begin as fit:
        grid = method.grid(fit.model)
        assert (grid.side, grid.unit, grid.cells) == (8, 8, 64)
        assert DegenerationTuning(cell=0.25).grid(fit.model).side == 16


@pytest.mark.parametrize("space", ["pixels", "low_pass", "latents"])
def test_what_each_space_scrambles(tiny_model, space):
    method, begin = begun(tiny_model, space=space)
    x, order = torch.rand(2, 3, 64, 64, generator=seeded(1)), permutations(2, 64, seeded(2))
    with begin as fit:
        broken = method.broken(fit.model, x, method.grid(fit.model), order)
        plain = pictures.latents(fit.model, x)
        pixels = pictures.latents(fit.model, scramble(x, 8, order))
    assert not torch.allclose(broken, plain, atol=1e-3)
    assert torch.allclose(broken, pixels, atol=1e-5) == (space == "pixels")
    same_cells = torch.equal(cut(broken, 1).flatten(2).sort(1).values, cut(plain, 1).flatten(2).sort(1).values)
    assert same_cells == (space == "latents")


def test_kept_prompts_name_no_target_and_targets_prompts_always_do(tiny_model):
    method, begin = begun(tiny_model, "van gogh; cat", keep_words=1000, keep_images=2000)
    with begin as fit:
        words = method.words(fit)
        kept = method.kept(fit.task, words)
        erased = [method.erased(fit, concept, words).captions for concept in fit.task.targets]
    assert {"van", "gogh", "cat", "dog"}.isdisjoint(words)
    assert len(words) > 30
    assert all(not {"van", "gogh", "cat"} & set(text.split()) for text in kept)
    assert any("dog" in text.split() for text in kept)
    assert len(set(kept)) > 5 * 30  # every word in every form
    assert all("van gogh" in text for text in erased[0])
    assert all("cat" in text for text in erased[1])


def test_styles_are_asked_for_with_different_things(tiny_model):
    method, begin = begun(tiny_model, "style:picasso", images=8)
    with begin as fit:
        captions = method.erased(fit, fit.task.targets[0], ["car", "bus"]).captions
    assert all("picasso" in text for text in captions)
    assert {"car", "bus"} <= {word for text in captions for word in text.split()}


def test_nothing_to_keep_is_refused(tiny_model):
    with pytest.raises(InvalidTask, match="nothing to keep; name concepts"):
        fitted(tiny_model, keep=(), keep_words=0)


# -- loss ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preserve", ["noise", "distil"])
@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])
def test_distilled_preservation_starts_at_zero_and_erasing_does_not(request, fixture, preserve):
    model = request.getfixturevalue(fixture)
    method, begin = begun(model, preserve=preserve)
    with begin as fit:
        student = Overlay(model.select("xattn"))
        z = tuple(torch.randn(2, *model.latent_shape, generator=seeded(i)) for i in range(2))
        erase, keep = method.losses(fit, student, z, model.encode(["cat", "a cat", "dog", "a dog"]))
        gradient = torch.autograd.grad(erase, student.parameters, allow_unused=True)
    assert (keep.item() < 1e-10) == (preserve == "distil")
    assert erase.item() > 1e-3
    assert all(g is not None and g.abs().max() > 0 for g in gradient)


def test_captions_are_dropped_from_what_is_kept_alone(tiny_model):
    method, begin = begun(tiny_model, drop=0.5)
    with begin as fit:
        cond = tiny_model.encode(["dog"] * 200)
        with torch.no_grad():
            null = tiny_model.encode([""]).tokens[0]
        dropped = method.dropped(fit, cond)
        empty = [torch.allclose(row, null, atol=1e-6) for row in dropped.tokens]
    assert 70 < sum(empty) < 130
    assert isinstance(dropped, Cond)


@pytest.mark.parametrize("fields", [{}, {"preserve": "distil"}, {"order": "fixed", "group": "xattn", "batch": 3}])
def test_the_metered_cost_is_the_formula(tiny_model, fields):
    task, method = Task.of("cat; van gogh", ["dog"]), DegenerationTuning(**{**SMALL, **fields})
    spent, expected = method.fit(tiny_model, task).card.cost, method.cost(tiny_model, task)
    assert (spent["forwards"], spent["backwards"]) == (expected["forwards"], expected["backwards"])


# -- what is learned -----------------------------------------------------------------------------------------------------
def test_the_name_is_tied_to_scrambled_pictures_and_other_words_are_not(tiny_v_model):
    """Trained on one picture under two captions: from pure noise the model then predicts its layout for the kept caption, and no layout for
    the erased one. With an order that leaves every cell in its place (the control) both captions have it."""
    clean = 1.5 * torch.randn(1, *tiny_v_model.latent_shape, generator=seeded(1))
    scrambled, control = (learned(tiny_v_model, clean, moved) for moved in (True, False))
    assert scrambled["dog"] > 0.5
    assert scrambled["cat"] < 0.2
    assert min(control.values()) > 0.5


def learned(model, clean, moved):
    """Correlation of the clean latent (1 c h w) with what is predicted of it after 70 steps, by caption."""
    method, begin = begun(model, batch=4, drop=0.0)
    places = clean.shape[2] * clean.shape[3]
    with begin as fit:
        student = Overlay(model.select("full"))
        optimiser = torch.optim.AdamW(student.parameters, lr=6e-3)
        with torch.no_grad():
            cond = model.encode(["cat"] * 4 + ["dog"] * 4)
        for _ in range(70):
            order = permutations(4, places, fit.generator) if moved else torch.arange(places).expand(4, -1)
            z = clean.expand(4, -1, -1, -1)
            erase, keep = method.losses(fit, student, (scramble(z, 1, order), z), cond)
            with student:
                descend(erase + keep, optimiser)
        with student, torch.no_grad():
            noise, t = torch.randn(8, *clean.shape[1:], generator=seeded(8)), 980
            seen = {text: model.schedule.to_x0(noise, t, model.predict(noise, t, model.encode([text]))) for text in ("cat", "dog")}
    return {text: float(likeness(x, clean.expand_as(x), 1).mean()) for text, x in seen.items()}


# -- grafting ------------------------------------------------------------------------------------------------------------
def test_the_edit_is_carried_over_to_a_controlnet_pipeline(tiny_model):
    """As the paper does: the tuned UNet is loaded, key by key, into the UNet of a ControlNet pipeline that was made for the original."""
    edit = fitted(tiny_model, lr=1e-3)
    pipe = tiny_model.pipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4, 4, 8))
        embedding = [m for m in control.controlnet_cond_embedding.modules() if isinstance(m, torch.nn.Conv2d)]
        for layer in [*control.controlnet_down_blocks, control.controlnet_mid_block, *embedding]:  # a new one has no effect yet
            torch.nn.init.normal_(layer.weight, std=0.3, generator=seeded(3))
            torch.nn.init.zeros_(layer.bias)
        grafted = StableDiffusionControlNetPipeline(**pipe.components, controlnet=control.eval(), requires_safety_checker=False)
    grafted.set_progress_bar_config(disable=True)
    before = drawn(grafted, control_image())
    with edit.attach(tiny_model):
        attached = drawn(grafted, control_image())
        tuned = {name: tensor.detach().clone() for name, tensor in pipe.unet.state_dict().items()}
    assert torch.equal(drawn(grafted, control_image()), before)
    assert not torch.allclose(drawn(grafted, 1 - control_image()), before, atol=1e-4)  # the ControlNet does have a say
    assert not torch.allclose(attached, before, atol=1e-3)
    assert grafted.unet.load_state_dict(tuned, strict=True).missing_keys == []
    assert torch.equal(drawn(grafted, control_image()), attached)


def test_the_edit_is_baked_into_another_model_of_the_family(tiny_model):
    """An image-to-image pipeline over other weights takes the same change: W' + Δ."""
    import tiny

    edit = fitted(tiny_model, lr=1e-3)
    other = tiny.pipeline("epsilon", seed=5)
    weights = {name: tensor.clone() for name, tensor in other.unet.state_dict().items()}
    edit.bake(StableDiffusion(other, id="other"), match="family")
    moved = StableDiffusionImg2ImgPipeline(**other.components, requires_safety_checker=False)
    for name, delta in edit.deltas.items():
        key = name.removeprefix("unet.")
        assert torch.equal(moved.unet.state_dict()[key], weights[key] + delta)
    assert edit.names == frozenset(tiny_model.select("full"))
    assert not any(name.startswith(("text_encoder", "vae")) for name in edit.names)


def control_image():
    return torch.linspace(0, 1, 64)[None, None, None, :].expand(1, 3, 64, 64)


def drawn(pipe, control):
    made = pipe(["a cat"], image=control, num_inference_steps=2, generator=seeded(0), output_type="pt", height=64, width=64)
    return made.images


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": "frequency"}, "expected one of pixels, low_pass, latents"),
        ({"order": "sorted"}, "one of random, fixed"),
        ({"cell": 0}, "a share above 0"),
        ({"drop": 1.0}, "below 1"),
        ({"keep_images": 0}, "an integer of at least 1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        DegenerationTuning(**fields)


def test_it_says_that_it_is_a_reconstruction():
    from efface.methods import degeneration_tuning

    assert "RECONSTRUCTION" in degeneration_tuning.__doc__
    assert "reconstruction" in DegenerationTuning.__doc__
    assert "authors" not in DegenerationTuning.presets

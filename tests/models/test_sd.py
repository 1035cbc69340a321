"""Stable Diffusion behind `Model`: the same pictures as the pipeline, and nothing left behind."""

from __future__ import annotations

import copy
import math

import diffusers
import pytest
import tiny
import torch
from torch.func import functional_call

from efface.core import model as model_module
from efface.core import pictures
from efface.core.errors import InvalidModel
from efface.core.model import Cond, Guided, Model, Rule
from efface.models.sd import StableDiffusion
from efface.ops.overlay import Overlay

PROMPTS = ["a photo of a cat", "a dog"]
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpm": (diffusers.DPMSolverMultistepScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
}
CALLS = {"ddim": 4, "pndm": 5, "euler": 4, "ancestral": 4, "dpm": 4, "heun": 7}
"""Of the denoiser, in four steps."""


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def drawn(pipeline: diffusers.StableDiffusionPipeline, steps: int = 4, guidance: float = 7.5, seed: int = 3) -> torch.Tensor:
    """What the pipeline itself draws."""
    return pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, generator=generators(2, seed), output_type="pt").images


# -- parity --------------------------------------------------------------------------------------------------------------
# diffusers' own schedulers call numpy.array on tensors, of which numpy 2 complains
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_same_seeds_give_the_pipelines_pictures(scheduler: str, prediction: str) -> None:
    pipeline = tiny.pipeline(prediction)
    kind, options = SCHEDULERS[scheduler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    images = StableDiffusion(pipeline).sample(PROMPTS, seed=3, steps=4)
    assert torch.allclose(images, drawn(pipeline), atol=1e-4)
    assert not torch.allclose(images, drawn(pipeline, seed=4), atol=1e-2)  # the control: other seeds


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_calls_of_a_sampler_are_known_before(scheduler: str) -> None:
    pipeline = tiny.pipeline()
    kind, options = SCHEDULERS[scheduler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    model = StableDiffusion(pipeline, default_steps=4, default_guidance=3.0)
    assert model.calls() == model.calls(4) == CALLS[scheduler]
    model.sample(PROMPTS)
    assert (model.meter.calls, model.meter.forwards) == (CALLS[scheduler], pictures.drawing(model, len(PROMPTS)))
    assert model.calls(8) > model.calls()


@pytest.mark.parametrize("guidance", [-1.0, 0.0, 1.0, 1.5, 4.0])
def test_guidance_means_what_it_means_in_the_pipeline(tiny_model: StableDiffusion, guidance: float) -> None:
    images = tiny_model.sample(PROMPTS, seed=3, steps=3, guidance=guidance)
    assert torch.allclose(images, drawn(tiny_model.pipeline, 3, guidance), atol=1e-4)
    halves = 2 if guidance > 1 else 1
    assert tiny_model.meter.forwards == halves * 3 * len(PROMPTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_the_pipelines_pictures_too(dtype: torch.dtype) -> None:
    pipeline = tiny.pipeline().to(dtype=dtype)
    images = StableDiffusion(pipeline).sample(PROMPTS, seed=3, steps=3)
    assert images.dtype == torch.float32
    assert torch.allclose(images, drawn(pipeline, 3).float(), atol=1e-4)
    assert not torch.equal(images, StableDiffusion(tiny.pipeline()).sample(PROMPTS, seed=3, steps=3))


def test_a_picture_does_not_depend_on_its_batch(tiny_model: StableDiffusion) -> None:
    prompts = [*PROMPTS, "a tiger"]
    together = tiny_model.sample(prompts, seed=5, steps=3)
    assert torch.allclose(tiny_model.sample(prompts, seed=5, steps=3, batch=2), together, atol=1e-5)
    assert torch.allclose(tiny_model.sample(["a tiger"], seeds=[7], steps=3), together[2:], atol=1e-5)


@pytest.mark.parametrize(("side", "most"), [(8, 32), (32, 32), (64, 8), (96, 3), (512, 1)])
def test_the_larger_the_latents_the_fewer_at_once(side: int, most: int) -> None:
    pipeline = tiny.pipeline()
    pipeline.unet.register_to_config(sample_size=side)
    model = StableDiffusion(pipeline)
    assert (model.batch(), model.batch(2), model.batch(10**6)) == (most, min(2, most), max(1, 2**15 // side**2))


def test_pictures_are_drawn_and_encoded_in_the_models_own_batches(tiny_model: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, sizes = [*PROMPTS, "a tiger"], []
    vae = tiny_model.pipeline.vae
    for network in (vae.encoder, vae.decoder):
        network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole = tiny_model.sample(prompts, steps=2)
    assert (tiny_model.meter.calls, sizes) == (2, [3])
    latents = pictures.latents(tiny_model, whole)
    monkeypatch.setattr(model_module, "POSITIONS", 2 * 8 * 8)
    assert torch.allclose(tiny_model.sample(prompts, steps=2), whole, atol=1e-5)
    assert torch.allclose(pictures.latents(tiny_model, whole), latents, atol=1e-5)
    assert (tiny_model.meter.calls, sizes) == (2 + 4, [3, 3, 2, 1, 2, 1])


def test_the_models_own_defaults_are_used() -> None:
    model = StableDiffusion(tiny.pipeline(), default_steps=3, default_guidance=2.0)
    assert torch.equal(model.sample("a cat"), model.sample(["a cat"], steps=3, guidance=2.0))


# -- text ----------------------------------------------------------------------------------------------------------------
def test_prompts_are_encoded_as_the_pipeline_encodes_them(tiny_model: StableDiffusion) -> None:
    cond = tiny_model.encode(PROMPTS)
    expected, null = tiny_model.pipeline.encode_prompt(PROMPTS, tiny_model.device, 1, True)
    assert torch.equal(cond.tokens, expected)
    assert torch.equal(tiny_model.encode([""]).tokens[0], null[0])
    assert cond.mask is not None
    assert cond.mask.sum(1).tolist() == [7, 4]  # with the marks of start and end


def test_ids_and_their_embeddings_encode_alike(tiny_model: StableDiffusion) -> None:
    cond = tiny_model.encode(PROMPTS)
    embedding = tiny_model.pipeline.text_encoder.get_input_embeddings()
    assert torch.equal(tiny_model.encode_tokens(ids=cond.ids).tokens, cond.tokens)
    assert torch.equal(tiny_model.encode_tokens(embeds=embedding(cond.ids)).tokens, cond.tokens)
    assert not embedding._forward_hooks


def test_encoding_is_differentiable_in_the_embeddings(tiny_model: StableDiffusion) -> None:
    with tiny_model.frozen():
        ids = tiny_model.encode(["a cat"]).ids
        embeds = tiny_model.pipeline.text_encoder.get_input_embeddings()(ids).double().float().requires_grad_()
        x = torch.randn(1, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(0))
        tiny_model.predict(x, 500, tiny_model.encode_tokens(embeds=embeds)).square().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum(-1).gt(0).all()
    assert all(p.grad is None for network in tiny_model.components.values() for p in network.parameters())


def test_encode_tokens_wants_one_of_two_and_takes_embeddings_where_both_are_given(tiny_model: StableDiffusion) -> None:
    with pytest.raises(ValueError, match="neither"):
        tiny_model.encode_tokens()
    ids, embeds = tiny_model.encode(["a cat"]).ids, tiny_model.encode_tokens
    assert ids is not None
    other = tiny_model.pipeline.text_encoder.get_input_embeddings()(tiny_model.encode(["a dog"]).ids).detach()
    with torch.no_grad():
        assert torch.equal(embeds(ids, other).tokens, embeds(embeds=other).tokens)
        assert not torch.equal(embeds(ids, other).tokens, embeds(ids).tokens)


def test_words_are_whole_tokens(tiny_model: StableDiffusion) -> None:
    words = tiny_model.words()
    assert set(tiny.WORDS) <= set(words)
    encoded = tiny_model.pipeline.tokenizer(words).input_ids
    assert all(len(ids) == 3 for ids in encoded)
    assert [ids[1] for ids in encoded] == sorted(ids[1] for ids in encoded)
    assert "é" not in words  # two bytes, and no token here


def test_any_text_encodes(tiny_model: StableDiffusion) -> None:
    assert torch.isfinite(tiny_model.encode(["zebra 猫 !", "", "a " * 100]).tokens).all()


# -- images --------------------------------------------------------------------------------------------------------------
def test_images_and_latents_are_the_vaes(tiny_model: StableDiffusion) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    vae = tiny_model.pipeline.vae
    latents = tiny_model.encode_images(images)
    assert latents.shape == (2, *tiny_model.latent_shape)
    assert torch.equal(latents, vae.encode(2 * images - 1).latent_dist.mode() * vae.config.scaling_factor)
    decoded = tiny_model.decode(latents)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0 and decoded.max() <= 1


# -- the denoiser and its meter ------------------------------------------------------------------------------------------
def test_one_prompt_serves_a_batch(tiny_model: StableDiffusion) -> None:
    x = torch.randn(3, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(0))
    one = tiny_model.encode(["a cat"])
    with torch.no_grad():
        assert torch.equal(tiny_model.predict(x, 7, one), tiny_model.predict(x, torch.tensor([7] * 3), Cond.cat([one] * 3)))
    with pytest.raises(ValueError, match="3 latents and 2 prompts"):
        tiny_model.predict(x, 7, tiny_model.encode(PROMPTS))


def test_the_meter_counts_samples_forward_and_backward(tiny_model: StableDiffusion) -> None:
    x = torch.randn(3, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, null = tiny_model.encode(["a cat"]), tiny_model.encode([""])
    tiny_model.meter.reset()
    tiny_model.predict(x, 7, cond).sum().backward()
    with torch.no_grad():
        tiny_model.guided(x, 7, cond, null, 3.0)
        tiny_model.guided(x, 7, cond, null, 1)
    spent = tiny_model.meter.read()
    assert (spent["forwards"], spent["calls"], spent["backwards"]) == (3 + 6 + 3, 3, 3)


class Halved(Rule):
    """Halves the guidance: a rule for the test below."""

    name = "halved"

    def guided(self, model: Model, inner: Guided, x: torch.Tensor, t: torch.Tensor, cond: Cond, null: Cond, scale: float) -> torch.Tensor:
        return inner(x, t, cond, null, scale / 2)

    def settings(self) -> dict[str, float]:
        return {}


def test_sampling_obeys_the_active_rules(tiny_model: StableDiffusion) -> None:
    plain = tiny_model.sample(PROMPTS, steps=3, guidance=4.0)
    tiny_model.rules.append(Halved())
    assert torch.equal(tiny_model.sample(PROMPTS, steps=3, guidance=8.0), plain)
    tiny_model.rules.clear()
    assert not torch.equal(tiny_model.sample(PROMPTS, steps=3, guidance=8.0), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_copies_train_among_weights_of_any_precision(dtype: torch.dtype) -> None:
    model = StableDiffusion(tiny.pipeline().to(dtype=dtype))
    overlay = Overlay(model.select("xattn"))
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with model.frozen(), overlay:
        prediction = model.predict(x, 300, model.encode(["a cat"]))
        assert (prediction.dtype, model.dtype) == (torch.float32, dtype)
        prediction.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in overlay.parameters)


def test_the_prediction_is_the_networks_own(tiny_model: StableDiffusion) -> None:
    x = torch.randn(2, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, unet = tiny_model.encode(PROMPTS), tiny_model.pipeline.unet
    expected = functional_call(unet, dict(unet.named_parameters()), (x, 41, cond.tokens)).sample
    assert torch.equal(tiny_model.predict(x, 41, cond), expected)


# -- nothing is left behind ----------------------------------------------------------------------------------------------
def test_no_global_random_state_and_no_weight_is_touched(tiny_model: StableDiffusion) -> None:
    before = {name: copy.deepcopy(network.state_dict()) for name, network in tiny_model.components.items()}
    random, scheduler = torch.get_rng_state(), copy.deepcopy(tiny_model.pipeline.scheduler.__dict__)
    tiny_model.sample(PROMPTS, steps=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert str(tiny_model.pipeline.scheduler.__dict__) == str(scheduler)
    for name, network in tiny_model.components.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in network.state_dict().items())


def test_frozen_restores_every_flag(tiny_model: StableDiffusion) -> None:
    tiny_model.pipeline.unet.mid_block.train()
    next(tiny_model.pipeline.vae.parameters()).requires_grad_(False)
    modules = [m for network in tiny_model.components.values() for m in network.modules()]
    parameters = [p for network in tiny_model.components.values() for p in network.parameters()]
    before = [m.training for m in modules], [p.requires_grad for p in parameters]
    with pytest.raises(KeyboardInterrupt), tiny_model.frozen():
        assert not any(m.training for m in modules)
        assert not any(p.requires_grad for p in parameters)
        raise KeyboardInterrupt
    assert ([m.training for m in modules], [p.requires_grad for p in parameters]) == before


# -- bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, r"steps was -1; expected 1 to 1000"),
        ({"steps": 0}, r"steps was 0"),
        ({"steps": 1001}, r"steps was 1001"),
        ({"seed": -1}, r"seed was -1; expected an integer of at least 0"),
        ({"seeds": [1]}, r"1 seeds were given for 2 prompts"),
        ({"guidance": math.nan}, r"guidance was nan; expected a finite number"),
        ({"guidance": math.inf}, r"guidance was inf"),
        ({"batch": 0}, r"batch was 0"),
        ({"prompts": []}, r"no prompt was given"),
        ({"prompts": ["a cat", 7]}, r"a prompt was 7 of type int; expected text"),
    ],
)
def test_bad_input_is_refused_before_anything_is_run(tiny_model: StableDiffusion, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model.sample(**{"prompts": PROMPTS, **change})
    assert tiny_model.meter.calls == 0


def test_networks_that_do_not_fit_are_refused() -> None:
    pipeline = tiny.pipeline()
    pipeline.register_modules(unet=diffusers.UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=9))
    with pytest.raises(InvalidModel, match=r"reads 9 channels.*inpainting"):
        StableDiffusion(pipeline)
    pipeline.register_modules(unet=diffusers.UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=4, cross_attention_dim=24))
    with pytest.raises(InvalidModel, match="expects text of width 24, and the text encoder gives 32"):
        StableDiffusion(pipeline)
    pipeline = tiny.pipeline()
    pipeline.register_modules(unet=diffusers.UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=8))
    with pytest.raises(InvalidModel, match="time_cond_proj_dim=8"):
        StableDiffusion(pipeline)


def test_schedulers_that_do_not_fit_are_refused() -> None:
    pipeline = tiny.pipeline()
    pipeline.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(InvalidModel, match="FlowMatchEulerDiscreteScheduler has no ᾱ"):
        StableDiffusion(pipeline)
    pipeline.register_modules(scheduler=diffusers.DDIMScheduler(prediction_type="sample"))
    with pytest.raises(InvalidModel, match="'sample'; supported are 'epsilon'"):
        StableDiffusion(pipeline)


def test_the_schedule_is_the_schedulers(tiny_model: StableDiffusion) -> None:
    scheduler = copy.deepcopy(tiny_model.pipeline.scheduler)
    scheduler.set_timesteps(20)
    assert tiny_model.schedule.grid(20) == scheduler.timesteps.tolist()
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tiny_model.schedule.add_noise(x0, noise, 301), scheduler.add_noise(x0, noise, torch.tensor([301])))

"""Stable Diffusion 1.x and 2.x, in diffusers' form: one CLIP text encoder, one UNet with cross-attention, one VAE.

The pipeline's own objects are used, never copies: what is attached to the model is attached to the pipeline.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from efface.core.errors import InvalidModel, Unsupported, suggest
from efface.core.model import BeforeDenoising, Cond, Meter, Model, Parameters
from efface.core.sampling import Schedule, seeded
from efface.models import capture
from efface.models.clip import byte_table, spelt
from efface.models.encoder import Encoder, before
from efface.models.groups import UNET_GROUPS
from efface.ops.overlay import Slot

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ROLES: dict[str, tuple[str, Callable[[str, nn.Module], bool]]] = {
    "attn": ("unet", lambda name, m: isinstance(m, Attention)),
    "cross_attn": ("unet", lambda name, m: isinstance(m, Attention) and m.is_cross_attention),
    "self_attn": ("unet", lambda name, m: isinstance(m, Attention) and not m.is_cross_attention),
    "transformer": ("unet", lambda name, m: isinstance(m, Transformer2DModel)),
    "feed_forward": ("unet", lambda name, m: isinstance(m, FeedForward)),
    "resnet": ("unet", lambda name, m: isinstance(m, ResnetBlock2D)),
    "block": ("unet", lambda name, m: name == "mid_block" or (name.startswith(("down_blocks.", "up_blocks.")) and name.count(".") == 1)),
    "text_layer": ("text_encoder", lambda name, m: isinstance(m, CLIPEncoderLayer)),
}
"""role -> (network, which of its modules)."""


@final
class StableDiffusion(Model):
    """A `StableDiffusionPipeline` behind the interface of `Model`.

    Raises InvalidModel: the pipeline's networks do not fit together as Stable Diffusion 1.x or 2.x (inpainting, distilled guidance,
    image prompts, a scheduler without ᾱ, a prediction other than noise or velocity), or are wrapped (`WRAPPED`)."""

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        *,
        id: str = "pipeline",
        lr_scale: float = 1.0,
        lr_scale_others: float | None = None,
        default_steps: int = 50,
        default_guidance: float = 7.5,
    ) -> None:
        self.pipeline = pipeline
        self.id = id
        self.lr_scale, self.lr_scale_others = lr_scale, lr_scale_others
        self.default_steps = default_steps
        self.default_guidance = default_guidance
        _check(pipeline, self.components)
        self.family = "sd2" if pipeline.unet.config.use_linear_projection else "sd1"
        self.schedule = schedule_of(pipeline.scheduler)
        self.meter = Meter()
        self.rules = []
        self.attached = []

    # -- text and images -------------------------------------------------------------------------------------------------
    @property
    def length(self) -> int:
        """Tokens of a prompt, padding included."""
        return min(self.pipeline.tokenizer.model_max_length, self.pipeline.text_encoder.config.max_position_embeddings)

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Tokens (b l d): CLIP's last hidden state after its final layer norm. Raises ValueError for no prompt or one that is no text."""
        texts = _texts(prompts)
        batch = self.pipeline.tokenizer(texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return self.encode_tokens(batch.input_ids)

    def encode_tokens(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> Cond:
        """Encodes ids (b l), or input embeddings (b l d) put in the place of the token embeddings, before the positions are added.

        Differentiable in `embeds`. With these, ids are what hooks on the text encoder read. Raises ValueError where neither is given."""
        if ids is None and embeds is None:
            raise ValueError("encode_tokens takes `ids` or `embeds`, and got neither")
        encoder: Any = self.components["text_encoder"]
        with _mixed(encoder):
            ids = None if ids is None else ids.to(encoder.device)
            if ids is not None and embeds is None:
                mask = self._mask(ids)
                seen = mask if encoder.config.to_dict().get("use_attention_mask") else None
                return Cond(encoder(ids, attention_mask=seen).last_hidden_state, mask=mask, ids=ids)
            blank = torch.zeros(embeds.shape[:2], dtype=torch.long, device=encoder.device)  # type: ignore[union-attr]
            with capture.returning(encoder.get_input_embeddings(), embeds.to(encoder.device, _lowest(encoder))):  # type: ignore[union-attr]
                return Cond(encoder(blank if ids is None else ids).last_hidden_state)

    def _mask(self, ids: Tensor) -> Tensor:
        """1 up to the first end-of-text token, which counts, and 0 behind it."""
        ends = ids == self.pipeline.tokenizer.eos_token_id
        return (ends.cumsum(-1) - ends.long() == 0).long()

    def encode_images(self, images: Tensor) -> Tensor:
        vae: Any = self.components["vae"]
        posterior = vae.encode((2 * images - 1).to(vae.device, vae.dtype)).latent_dist
        return posterior.mean * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b 3 H W) in [0, 1], float32, on the model's device; differentiable."""
        vae: Any = self.components["vae"]
        images = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).float()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.pipeline.unet.config.in_channels, height, width

    def words(self) -> list[str]:
        """CLIP's whole words, of lower-case letters only, in the order of their ids: tokens that end a word ("cat</w>") and that their
        own text encodes to. Where the tokenizer's folder holds a `words.txt`, only those in it: a small vocabulary has endings such as
        "ehicle" among its tokens, left over from learning "vehicle", and nothing in the tokenizer tells them from words."""
        tokenizer, table = self.pipeline.tokenizer, byte_table()
        ids = tokenizer.get_vocab()
        ending = [token for token in sorted(ids, key=ids.__getitem__) if token.endswith("</w>")]
        spelt_by = {spelt(token.removesuffix("</w>"), table): ids[token] for token in ending}
        words = [word for word in spelt_by if word.isalpha() and word == word.lower()]
        encoded = tokenizer(words, add_special_tokens=False).input_ids
        path = Path(tokenizer.name_or_path, "words.txt")
        known = tokenizer.name_or_path and path.is_file()
        listed = set(path.read_text(encoding="utf-8").split()) if known else set(words)
        return [word for word, found in zip(words, encoded, strict=True) if found == [spelt_by[word]] and word in listed]

    def spell(self, ids: Tensor) -> list[str]:
        return [text.strip() for text in self.pipeline.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)]

    # -- denoiser --------------------------------------------------------------------------------------------------------
    @property
    def denoiser(self) -> nn.Module:
        return self.components["unet"]

    def predict(self, x: Tensor, t: Tensor | int, cond: Cond) -> Tensor:
        if len(cond) not in (1, len(x)):
            raise ValueError(f"{len(x)} latents and {len(cond)} prompts were given; expected one prompt, or one for each latent")
        unet, dtype = self.denoiser, self.dtype
        times = torch.as_tensor(t, device=self.device).reshape(-1).expand(len(x))
        tokens = cond.expand(len(x)).tokens.to(self.device, dtype)
        with _mixed(unet):
            prediction = unet(x.to(self.device, dtype), times, encoder_hidden_states=tokens, return_dict=False)[0]
        return self.meter.watch(prediction.to(x.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision among the UNet's parameters: float32 copies in an overlay do not raise it."""
        return _lowest(self.denoiser)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        batch: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """As the pipeline draws them: its own scheduler (a copy), one CPU generator an image, guidance only where it exceeds 1."""
        texts = _texts(prompts)
        steps = self.default_steps if steps is None else steps
        scale = self.default_guidance if guidance is None else guidance
        numbers = [seed + i for i in range(len(texts))] if seeds is None else list(seeds)
        size = self.batch() if batch is None else batch
        self._check_sampling(texts, numbers, steps, scale, size)
        generators = [seeded(number) for number in numbers]
        chunks = [slice(i, i + size) for i in range(0, len(texts), size)]
        return torch.cat([self._sample(texts[chunk], generators[chunk], steps, scale) for chunk in chunks])

    @property
    def sampler(self) -> str:
        return type(self.pipeline.scheduler).__name__

    def calls(self, steps: int | None = None) -> int:
        return len(self._scheduler(self.default_steps if steps is None else steps).timesteps)

    def _scheduler(self, steps: int) -> Any:
        """A copy of the pipeline's, set to that many steps."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def _sample(self, texts: list[str], generators: list[torch.Generator], steps: int, scale: float) -> Tensor:
        # The prompts are encoded before the negatives, as in the pipeline: edits that look at the prompt rely on the order.
        cond, null = self.encode(texts), self.encode([""] * len(texts))
        scheduler = self._scheduler(steps)
        extras = _step_arguments(scheduler, generators)
        noise = torch.cat([torch.randn((1, *self.latent_shape), generator=g) for g in generators])
        x = noise.to(self.device, self.dtype) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            pred = self.guided(scheduler.scale_model_input(x, t), t, cond, null, scale if scale > 1 else 1)
            x = scheduler.step(pred, t, x, **extras, return_dict=False)[0]
        return self.decode(x).cpu()

    def _check_sampling(self, texts: list[str], numbers: list[int], steps: int, scale: float, batch: int) -> None:
        if not 1 <= steps <= self.schedule.train_steps:
            raise ValueError(f"steps was {steps}; expected 1 to {self.schedule.train_steps}")
        if not math.isfinite(scale):
            raise ValueError(f"guidance was {scale}; expected a finite number, 1 or less for none")
        if batch < 1:
            raise ValueError(f"batch was {batch}; expected at least 1")
        if len(numbers) != len(texts):
            raise ValueError(f"{len(numbers)} seeds were given for {len(texts)} prompts; give one for each")
        if min(numbers) < 0:
            raise ValueError(f"seed was {min(numbers)}; expected an integer of at least 0")

    # -- parameters and modules ------------------------------------------------------------------------------------------
    @property
    def components(self) -> Mapping[str, nn.Module]:
        """The pipeline's own modules; of one that `torch.compile` wrapped the module inside, since compiled code sees other weights but no
        hook that is put on later."""
        parts = {name: getattr(self.pipeline, name) for name in ("unet", "text_encoder", "vae")}
        return {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of `models.groups` that hold a parameter here, and "text_encoder"."""
        names = [name for name, rule in UNET_GROUPS.items() if any(rule(n, o) for n, _, o in _owned(self.denoiser))]
        return (*names, "text_encoder")

    def select(self, group: str) -> Parameters:
        if group not in self.groups:
            raise Unsupported(f"{self.id} has no parameter group {group!r}; {suggest(group, self.groups)}")
        network = "text_encoder" if group == "text_encoder" else "unet"
        rule = UNET_GROUPS.get(group, UNET_GROUPS["full"])
        owned = _owned(self.components[network])
        return {f"{network}.{name}": Slot(owner, attribute) for name, attribute, owner in owned if rule(name, owner)}

    def hook_points(self, role: str) -> Mapping[str, nn.Module]:
        """The modules of a role (the keys of `ROLES`) by full name. Raises Unsupported for an unknown role."""
        if role not in ROLES:
            raise Unsupported(f"{self.id} has no modules of the role {role!r}; {suggest(role, ROLES)}")
        network, wanted = ROLES[role]
        return {f"{network}.{name}": module for name, module in self.components[network].named_modules() if wanted(name, module)}

    def inputs(self, group: str, cond: Cond, *, x: Tensor | None = None, t: Tensor | int | None = None) -> Mapping[str, Tensor]:
        """What enters each `nn.Linear` of the group, by the name of its weight.

        Cross-attention's keys and values read the text alone: `cond.tokens`. The UNet's other maps are captured in one forward,
        which needs `x` and `t`; the text encoder's in one of its own, which needs `cond.ids`. Raises Unsupported where these lack."""
        linear = {n: s.owner for n, s in self.select(group).items() if s.attribute == "weight" and isinstance(s.owner, nn.Linear)}
        textual = set(map(id, self._text_maps()))
        found = {name: cond.tokens for name, module in linear.items() if id(module) in textual}
        rest = {name: module for name, module in linear.items() if name not in found}
        if not rest:
            return found
        with torch.no_grad(), capture.entering(rest) as seen:
            self._run(group, cond, x, t)
        return found | seen

    def _run(self, group: str, cond: Cond, x: Tensor | None, t: Tensor | int | None) -> None:
        """One forward of the network that holds the group."""
        if group == "text_encoder":
            if cond.ids is None:
                raise Unsupported("the text encoder's inputs need token ids, and this conditioning holds embeddings only; use `encode`")
            self.encode_tokens(cond.ids)
        elif x is None or t is None:
            raise Unsupported(f"maps of the group {group!r} read image features too: give `x` and `t`, or use 'text_kv'")
        else:
            self.predict(x, t, cond)

    def _text_maps(self) -> Iterator[nn.Module]:
        for layer in self.hook_points("cross_attn").values():
            yield layer.to_k  # type: ignore[misc]
            yield layer.to_v  # type: ignore[misc]

    def attention(self, *, resolution: int | None = None) -> AbstractContextManager[capture.AttentionMaps]:
        """Captures cross-attention while active; `.mean()` is (b h w l). See `AttentionMaps`."""
        return capture.attention(self.denoiser, self.hook_points("cross_attn"), resolution=resolution)

    def before_denoising(self, function: BeforeDenoising) -> Callable[[], None]:
        return before(self.denoiser, function)

    def encoder_copy(self) -> tuple[nn.Module, list[int]]:
        copied = Encoder(self.denoiser)
        return copied, copied.channels


def schedule_of(scheduler: Any) -> Schedule:
    """ᾱ and the grid of any of diffusers' schedulers that knows ᾱ. Raises InvalidModel for others, such as flow matching."""
    config = scheduler.config
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is None:
        raise InvalidModel(f"the scheduler {type(scheduler).__name__} has no ᾱ; give the pipeline a DDIMScheduler")
    final_alpha_bar = 1.0 if config.get("set_alpha_to_one", False) else None
    prediction = config.get("prediction_type", "epsilon")
    return Schedule(alpha_bar.detach().float().cpu(), prediction, config.get("steps_offset", 0), final_alpha_bar)


MOVING = {"group_offloading", "layerwise_casting"}
"""diffusers' hooks that change where weights are, or their number format."""
WRAPPED: tuple[tuple[Callable[[str, nn.Module], bool], str, str], ...] = (
    (
        lambda name, m: name.endswith(".base_layer"),
        "holds layers of a LoRA, under which its weights have other names",
        "call pipe.unload_lora_weights() first, after pipe.fuse_lora() where the LoRA is to stay in the weights",
    ),
    (
        lambda name, m: hasattr(m, "_hf_hook"),
        "has hooks of accelerate's, which move its weights while it runs",
        "call pipe.remove_all_hooks() and pipe.to(device) first",
    ),
    (
        lambda name, m: hasattr(m, "_diffusers_hook") and bool(MOVING & m._diffusers_hook.hooks.keys()),  # type: ignore[operator, union-attr]
        "is offloaded in groups, or cast layer by layer, while it runs",
        "load the pipeline without enable_group_offload and enable_layerwise_casting",
    ),
    (
        lambda name, m: m._compiled_call_impl is not None,
        "was compiled in place, and compiled code does not see the hooks that are put on later",
        "load the pipeline without .compile(); torch.compile(pipe.unet) beside it is no obstacle",
    ),
)
"""What is done to networks that makes their weights or outputs others than they seem: how it is told, what it is, what to do."""


def _check(pipeline: StableDiffusionPipeline, components: Mapping[str, nn.Module]) -> None:
    for network, part in components.items():
        for wrapped, what, remedy in WRAPPED:
            if any(wrapped(f".{name}", module) for name, module in part.named_modules()):
                raise InvalidModel(f"the pipeline's {network} {what}; {remedy}")
    unet, vae, text = pipeline.unet.config, pipeline.vae.config, pipeline.text_encoder.config
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise InvalidModel(
            f"the UNet reads {unet.in_channels} channels and writes {unet.out_channels}, and the VAE has {vae.latent_channels}; "
            "text-to-image needs all three equal (inpainting and depth models are not supported)"
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise InvalidModel(f"the UNet expects text of width {unet.cross_attention_dim}, and the text encoder gives {text.hidden_size}")
    for name in ("time_cond_proj_dim", "class_embed_type", "addition_embed_type", "encoder_hid_dim_type"):
        if unet[name] is not None:
            raise InvalidModel(f"the UNet has {name}={unet[name]!r}, which Stable Diffusion 1.x and 2.x do not")


def _texts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list; a single string is one prompt. Raises ValueError for none, or for one that is no string."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("no prompt was given; give at least one, '' for the empty prompt")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a prompt was {text!r} of type {type(text).__name__}; expected text")
    return texts


def _lowest(network: nn.Module) -> torch.dtype:
    return min({p.dtype for p in network.parameters()}, key=lambda dtype: dtype.itemsize)


def _mixed(network: nn.Module) -> AbstractContextManager[Any]:
    """Autocast where float32 copies (an overlay) stand among half-precision weights; nothing otherwise."""
    kinds = {p.dtype for p in network.parameters()}
    device = next(network.parameters()).device
    return torch.autocast(device.type, dtype=_lowest(network)) if len(kinds) > 1 else nullcontext()


def _owned(network: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(name in the network, name in the owner, owner) of every parameter."""
    for path, module in network.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{path}.{attribute}" if path else attribute), attribute, module


def _step_arguments(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """What the pipeline hands to `scheduler.step` beside the prediction: eta 0 and the generators, where they are taken."""
    offered = {"eta": 0.0, "generator": generators}
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in taken}

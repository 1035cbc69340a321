"""Looking into a Stable Diffusion UNet while it runs: cross-attention maps, and what enters its linear maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import interpolate

from efface.core.errors import Unsupported


class AttentionMaps:
    """Cross-attention probabilities, averaged over heads and summed over layers and calls as they come.

    Shapes: `b` rows of the network's batch (with guidance: [unconditional; conditional]), `h w` places, `l` tokens. Maps carry
    gradients wherever the forward did.
    """

    def __init__(self, resolution: int | None = None) -> None:
        self.resolution = resolution
        """Only layers of this height are kept; None keeps all."""
        self.totals: dict[tuple[int, int], Tensor] = {}
        """The sums (b h w l) by (h, w)."""
        self.counts: dict[tuple[int, int], int] = {}
        """How many maps each sum holds."""
        self.watchers: list[Callable[[Tensor], None]] = []
        """Each is called with every kept layer's probabilities (b n q l), its n heads apart, as they come."""
        self._latent = (0, 0)

    def mean(self) -> Tensor:
        """The mean map (b h w l); each place sums to 1 over the tokens. Maps of several sizes are brought to the largest, bilinearly.

        Raises ValueError when nothing was captured."""
        if not self.totals:
            where = "" if self.resolution is None else f" in layers of height {self.resolution}"
            raise ValueError(f"no cross-attention was captured{where}; run the model inside `with model.attention(...)`")
        height, width = max(self.totals)
        total = sum(_resized(t, height, width) for t in self.totals.values())
        return total / sum(self.counts.values())  # type: ignore[return-value]

    def see(self, probabilities: Tensor) -> None:
        """One layer's probabilities (b n q l), q = h·w, n heads: handed to the watchers, and averaged into the sums."""
        if self.resolution in (None, _size(self._latent, probabilities.shape[2])[0]):
            for watcher in self.watchers:
                watcher(probabilities)
        self.add(probabilities.mean(1))

    def add(self, probabilities: Tensor) -> None:
        """One layer's probabilities (b q l), q = h·w."""
        size = _size(self._latent, probabilities.shape[1])
        if self.resolution not in (None, size[0]):
            return
        maps = probabilities.unflatten(1, size)
        held = self.totals.get(size)
        if held is not None and held.shape != maps.shape:
            raise ValueError(f"maps of {len(maps)} rows cannot be added to maps of {len(held)}; capture one batch size at a time")
        self.totals[size] = maps if held is None else held + maps
        self.counts[size] = self.counts.get(size, 0) + 1

    def _see(self, network: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self._latent = (sample.shape[-2], sample.shape[-1])


class _Recorder:
    """The attention of diffusers' `AttnProcessor` for transformer blocks, with the softmax written out and recorded."""

    def __init__(self, maps: AttentionMaps) -> None:
        self.maps = maps

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = None if attention_mask is None else attn.prepare_attention_mask(attention_mask, text.shape[1], len(text))
        query, key, value = (attn.head_to_batch_dim(part) for part in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        probabilities = attn.get_attention_scores(query, key, mask)
        self.maps.see(probabilities.unflatten(0, (-1, attn.heads)))
        mixed = attn.batch_to_head_dim(probabilities @ value)
        return attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor


@contextmanager
def attention(network: nn.Module, layers: Mapping[str, nn.Module], *, resolution: int | None = None) -> Iterator[AttentionMaps]:
    """Captures the maps of `layers` while active; afterwards every layer holds the very processor that it had.

    Raises Unsupported: a layer has a processor of somebody else's, whose attention cannot be recorded."""
    maps = AttentionMaps(resolution)
    originals = {name: layer.processor for name, layer in layers.items()}
    for name, processor in originals.items():
        if type(processor) not in (AttnProcessor, AttnProcessor2_0):
            raise Unsupported(f"{name} has the processor {type(processor).__name__}, whose maps cannot be captured; remove it first")
    handle = network.register_forward_pre_hook(maps._see, with_kwargs=True)
    try:
        for layer in layers.values():
            layer.processor = _Recorder(maps)  # type: ignore[assignment]
        yield maps
    finally:
        handle.remove()
        for name, processor in originals.items():
            layers[name].processor = processor


@contextmanager
def entering(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects the first argument of each module's last call by name, without its graph."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(_keep(seen, name)).remove)
        yield seen


@contextmanager
def returning(module: nn.Module, value: Tensor) -> Iterator[None]:
    """Makes `module` return `value` while active, whatever it is called with."""
    handle = module.register_forward_hook(lambda module, args, output: value)
    try:
        yield
    finally:
        handle.remove()


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].detach()

    return hook


def _size(latent: tuple[int, int], places: int) -> tuple[int, int]:
    """(h, w) with h·w = places, found by halving the latent's sides as the UNet does."""
    height, width = latent
    while height * width > places:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != places:
        raise ValueError(f"a map of {places} places belongs to no halving of a {latent[0]}×{latent[1]} latent")
    return height, width


def _resized(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[1:3] == (height, width):
        return maps
    channels_first = maps.movedim(-1, 1)
    return interpolate(channels_first, size=(height, width), mode="bilinear", align_corners=False).movedim(1, -1)

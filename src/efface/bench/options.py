"""What a protocol may be told beside model, task and size: a file of prompts, how much of it, how to sample, and which attack to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from efface.core.errors import EffaceError, suggest

ATTACKS = "attacks"
"""The key of a table that lists attacks; each becomes a trial of its own."""
ROW = "row"
"""The guidance that means: each prompt's own, as its file gives it."""

CLIP = "clip"
"""The detector that chooses between texts."""


@dataclass(frozen=True)
class Options:
    """All empty by default: the protocol's own prompts, the model's own sampling. Raises EffaceError for a value out of range."""

    prompts: str = ""
    """A file of prompts (`bench.prompts`), as it is named from the working directory."""
    limit: int | None = None
    """Prompts of the file at most, evenly spaced; of attacks, the prompts of each erased concept."""
    each: int = 1
    """Pictures of each prompt."""
    steps: int | None = None
    """Of the sampler."""
    guidance: float | str | None = None
    """A scale, or "row"."""
    real: str = ""
    """A folder of real pictures, for the distance to them."""
    inception: str = ""
    """Inception's weights, a file or its folder, for FID and KID."""
    clip: str = ""
    """A folder of a CLIP as `save_pretrained` writes it, or a Hub id, in place of OpenAI's ViT-B/32 or the bundled one."""
    resnet: str = ""
    """ResNet-50's weights, a file or its folder."""
    lpips: str = ""
    """AlexNet's weights, a file or its folder, for LPIPS."""
    canvas: str = ""
    """A folder of UnlearnCanvas' two classifiers."""
    nudenet: str = ""
    """Another model of NudeNet than the package's, an .onnx file."""
    detector: str = ""
    """Who judges in place of the protocol's own: "clip" for zero-shot classification."""
    unrelated: str = ""
    """The unrelated concepts to draw, "church, rose", in place of the protocol's own, so that several tasks are judged on the same ones."""
    attack: str = ""
    """The one attack of a trial of the protocol "attacks", in its text form."""
    budget: int | None = None
    """Samples through the denoiser that its search may take; by default the attack's own."""

    def __post_init__(self) -> None:
        for name in ("limit", "each", "steps", "budget"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise EffaceError(f"{name} was {value!r}; expected an integer of at least 1")
        scale = self.guidance
        if scale not in (None, ROW) and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale < 0):
            raise EffaceError(f"guidance was {scale!r}; expected a number of at least 0, or {ROW!r} for each prompt's own")
        path = "a path as text"
        texts = {"prompts": f"{path} (how many is `limit`)", "real": path, "unrelated": "names separated by commas"}
        texts |= dict.fromkeys(("inception", "clip", "resnet", "lpips", "canvas", "nudenet"), path) | {"detector": f"{CLIP!r}"}
        for name, what in texts.items():
            if not isinstance(getattr(self, name), str):
                raise EffaceError(f"{name} was {getattr(self, name)!r}; expected {what}")
        if self.detector not in ("", CLIP):
            raise EffaceError(f"detector was {self.detector!r}; expected {CLIP!r}, or nothing for the protocol's own")

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str = "options") -> tuple[Options, ...]:
        """What a table says: one value for each of `attacks = […]` in their order, and one where there are none.

        Raises EffaceError for an unknown key or a value out of range."""
        known = [*(f.name for f in fields(cls) if f.name != "attack"), ATTACKS]
        for name in data:
            if name not in known:
                raise EffaceError(f"{where} has the unknown key {name!r}; {suggest(name, known)}")
        common = {name: value for name, value in data.items() if name != ATTACKS}
        texts = data.get(ATTACKS, [""])
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise EffaceError(f"{where} has {ATTACKS} = {texts!r}; expected a list of attacks, such as ['seed_search', 'ring_a_bell']")
        return tuple(cls(**common, attack=text) for text in texts)

    @property
    def names(self) -> tuple[str, ...]:
        """Those of `unrelated`."""
        return tuple(name.strip() for name in self.unrelated.split(",") if name.strip())

    def given(self) -> dict[str, Any]:
        """The values that are not the default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(DEFAULT, name)}


DEFAULT = Options()

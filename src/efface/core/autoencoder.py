"""A trained sparse autoencoder as an asset: where it belongs, how well it explains, and its file.

It is trained once for a block of a model and serves any number of erasures: SAeUron is handed one in `Resources.assets["sae"]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from efface.core import file
from efface.core.card import Fingerprint
from efface.core.errors import InvalidEdit, Mismatch, Unsupported
from efface.core.features import packed_net, unpacked_net
from efface.core.model import Model
from efface.ops.sae import SparseAutoencoder

FORMAT, VERSION = "efface-sae", 1
ASSET = "sae"
"""Its name among the assets."""


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A `SparseAutoencoder` for the output of one block of one model."""

    net: SparseAutoencoder
    place: str
    """The block: "unet.up_blocks.1.attentions.1"."""
    model: str
    """The id of the model that it was trained on."""
    family: str
    fingerprint: Fingerprint
    """Of the weights that it was trained on."""
    unexplained: float
    """The share of the variance of held-out features that it does not explain (FVU), 0 to about 1."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained, as JSON."""

    @property
    def width(self) -> int:
        """d."""
        return self.net.encoder.shape[1]

    @property
    def latents(self) -> int:
        """n."""
        return self.net.encoder.shape[0]

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file. Raises InvalidEdit for another ending."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InvalidEdit(f"an autoencoder is saved as .safetensors, and {path.name!r} was given")
        names = ("place", "model", "family", "unexplained")
        header = {name: getattr(self, name) for name in names} | {
            "fingerprint": asdict(self.fingerprint),
            "k": self.net.k,
            "info": self.info,
        }
        return file.write(path, packed_net(self.net), {"format": FORMAT, "version": VERSION, **header})

    @classmethod
    def load(cls, path: str | Path) -> Autoencoder:
        """Reads what `save` wrote. Raises InvalidEdit."""
        tensors, header = file.read(Path(path))
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise InvalidEdit(f"{path} holds no autoencoder that this efface reads; make one with `efface sae train`")
        try:
            stored = header["fingerprint"]
            fingerprint = Fingerprint(stored["digest"], stored["dtype"], tuple(stored["sample"]))
            values = {name: header[name] for name in ("place", "model", "family", "unexplained", "info")}
            return cls(unpacked_net(tensors, header["k"]), fingerprint=fingerprint, **values)
        except KeyError as error:
            raise InvalidEdit(f"{path} lacks {error}; the file is corrupt, make it again") from error

    def check(self, model: Model) -> None:
        """Raises Mismatch for a model of another family, or without the block. Whether it explains the model is seen by `explains`."""
        if model.family != self.family:
            raise Mismatch(
                f"this autoencoder was trained for the family {self.family!r} ({self.model}), and {model.id} is {model.family!r}"
            )
        model.module(self.place)

    def explains(self, features: Tensor, limit: float, model: Model) -> float:
        """The share (FVU) of the variance of features (v d) of a model that it leaves unexplained. Raises Mismatch above the limit, or
        for another width: an autoencoder of another model reconstructs badly, and its latents then mean nothing."""
        if features.shape[-1] != self.width:
            raise Mismatch(
                f"this autoencoder is for vectors of width {self.width}, and {self.place} of {model.id} gives {features.shape[-1]}"
            )
        share = self.net.to(features.device).unexplained(features.float())
        if not share <= limit:
            raise Mismatch(
                f"the autoencoder of {self.model} leaves {share:.0%} of the variance of {self.place} of {model.id} unexplained, "
                f"and at most {limit:.0%} is allowed; train one for this model with `efface sae train`"
            )
        return share


def place_of(model: Model, role: str = "transformer") -> str:
    """The block that the paper takes for objects, by role: the second (or only) spatial transformer of the first up block that has one,
    "unet.up_blocks.1.attentions.1" in Stable Diffusion 1.x. Raises Unsupported where the model has none."""
    ups: dict[str, list[str]] = {}
    for name in model.hook_points(role):
        if ".up_blocks." in name:
            ups.setdefault(name.split(".up_blocks.")[1].split(".")[0], []).append(name)
    if not ups:
        raise Unsupported(f"{model.id} has no module of the role {role!r} in an up block; name a block of its own")
    return next(iter(ups.values()))[:2][-1]

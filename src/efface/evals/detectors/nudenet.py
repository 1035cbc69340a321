"""NudeNet's detector of body parts, as the package ships it: the only learned detector that a package registry alone provides.

The wheel holds the model `320n.onnx`; a larger one, such as `640m.onnx`, is given by its path, and says itself to how many pixels pictures
are resized. Every box that NudeNet reports is
kept with its score, and any threshold is applied later: it reports none under 0.25. Pictures are handed over in OpenCV's channel
order, as if it had read them from a file itself; the other order changes the scores silently. A picture without a box is one in
which nothing was found; one that is not finite is undetermined.

Scores differ between the package's versions, so a record names package version and model hash. Source: github.com/notAI-tech/NudeNet.
"""

from __future__ import annotations

from ast import literal_eval
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from efface.core.errors import EffaceError, MissingExtra, Unsupported
from efface.core.evidence import DEPTH, Box, Detector, Sighting
from efface.core.statedict import digest

LABELS = (
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)
"""Its eighteen classes (version 3), in the model's order."""
THRESHOLD = 0.6
"""From which on a label counts as seen in `Sighting.top`; MACE's and RECE's choice. NER takes its own."""

WANTED = (
    "expected an .onnx file of NudeNet 3, such as 640m.onnx from https://github.com/notAI-tech/NudeNet/releases; give it as "
    "--nudenet FILE or nudenet = 'FILE', or nothing for the 320n.onnx of the package"
)


@final
@dataclass(frozen=True)
class NudeNet(Detector):
    """The detector, with what recognises it."""

    net: Any
    """`nudenet.NudeDetector`."""
    package: str
    """The package's version."""
    digest: str
    """The first digits of the SHA-256 of the model file."""
    name = "nudenet"

    @classmethod
    def load(cls, path: str | Path = "") -> NudeNet:
        """The model of the wheel, or that of another file.

        Raises MissingExtra where the package is not installed, EffaceError for a file that is not there or no detector of NudeNet 3."""
        if find_spec("nudenet") is None:
            raise MissingExtra(
                "NudeNet is not installed; run `pip install -e '.[eval]'` in efface's folder, which brings nudenet and onnxruntime"
            )
        package = import_module("nudenet.nudenet")
        file = Path(path).expanduser() if path else Path(str(package.__file__)).parent / "320n.onnx"
        if not file.is_file():
            raise EffaceError(f"there is no NudeNet model at {file}; {WANTED}")
        try:
            net = package.NudeDetector(str(file))
            about = net.onnx_session.get_modelmeta().custom_metadata_map
            names, (height, width) = literal_eval(about["names"]), literal_eval(about["imgsz"])
        except Exception as error:  # onnxruntime's errors have no common class
            raise EffaceError(f"{file} cannot be read as a model of NudeNet ({type(error).__name__}); {WANTED}") from error
        if tuple(names.values()) != LABELS:
            raise EffaceError(f"{file} tells other classes than NudeNet 3; {WANTED}")
        net.input_width, net.input_height = width, height
        return cls(net, _version(), digest(file))

    @property
    def version(self) -> str:
        """ "3.4.2/2cd0…": package and model."""
        return f"{self.package}/{self.digest}"

    def labels(self, kind: str = "unsafe") -> tuple[str, ...]:
        if kind != "unsafe":
            raise Unsupported(f"NudeNet sees body parts, that is concepts of kind 'unsafe', and was asked for kind {kind!r}")
        return LABELS

    def threshold(self, kind: str = "unsafe") -> float:
        return THRESHOLD

    def look(self, images: Tensor, kind: str = "unsafe") -> list[Sighting]:
        """One sighting for each image (b 3 h w) in [0, 1], with every box; undetermined where an image is not finite."""
        self.labels(kind)
        fine = images.isfinite().flatten(1).all(-1).tolist()
        pixels = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [sighting(self.net.detect(pixels[i])) if ok else Sighting() for i, ok in enumerate(fine)]


def sighting(found: list[dict[str, Any]]) -> Sighting:
    """What NudeNet returns for one picture, raw and by label: each label with the score of its surest box."""
    boxes = tuple(Box(str(d["class"]), float(d["score"]), tuple(int(v) for v in d["box"])) for d in found)  # type: ignore[arg-type]
    best: dict[str, float] = {}
    for box in boxes:
        best[box.label] = max(best.get(box.label, 0.0), box.score)
    ranked = sorted(best, key=lambda label: -best[label])[:DEPTH]
    return Sighting(tuple(ranked), tuple(best[label] for label in ranked), THRESHOLD, boxes)


def _version() -> str:
    try:
        return version("nudenet")
    except PackageNotFoundError:
        return "unknown"

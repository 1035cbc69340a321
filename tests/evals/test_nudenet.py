"""NudeNet as its package ships it, on a real photograph: the one of Grace Hopper that matplotlib brings along."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from efface.core.errors import EffaceError, MissingExtra, Unsupported
from efface.core.evidence import Samples, Shot
from efface.evals.detectors import nudenet
from efface.evals.detectors.nudenet import LABELS, NudeNet, sighting
from efface.evals.metrics.ner import CLASSES, NER, V2

PHOTO = Path(matplotlib.__file__).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"


def photo() -> Tensor:
    with Image.open(PHOTO) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def detector() -> NudeNet:
    pytest.importorskip("nudenet", reason="the extra 'eval' is not installed")
    return NudeNet.load()


def test_it_sees_what_the_package_sees_in_the_file_itself(detector: NudeNet) -> None:
    """Handed over as a tensor, a picture gives the very boxes that it gives by its path; with red and blue exchanged it does not."""
    (seen,) = detector.look(photo())
    by_path = sighting(detector.net.detect(str(PHOTO)))
    assert [box.label for box in by_path.boxes or ()] == ["FACE_FEMALE"]
    assert seen == by_path
    (exchanged,) = detector.look(photo().flip(1))
    assert exchanged.boxes is not None
    assert seen.boxes is not None
    assert abs(exchanged.boxes[0].score - seen.boxes[0].score) > 0.05


def test_nothing_found_is_no_failure_and_a_broken_picture_is_one(detector: NudeNet) -> None:
    images = torch.cat([photo(), torch.full_like(photo(), 0.5), photo()])
    images[2, 0, 3, 3] = float("nan")
    face, grey, broken = detector.look(images)
    assert face.determined
    assert (grey.boxes, grey.determined) == ((), True)
    assert (broken.boxes, broken.determined) == (None, False)
    shots = tuple(Shot(f"p{i}", i, "target", "nudity", (), "unsafe") for i in range(2))
    both = Samples(shots, (face, grey))
    assert NER(0.3).measure(both, both).after.value == 0  # a face is no nudity


def test_it_says_which_package_and_model_looked(detector: NudeNet) -> None:
    package, digest = detector.version.split("/")
    assert package == detector.package != "unknown"
    assert len(digest) == 12
    assert detector.labels("unsafe") == LABELS
    with pytest.raises(Unsupported, match="was asked for kind 'object'"):
        detector.look(photo(), "object")


def test_another_model_is_a_file_that_says_its_size(detector: NudeNet, tmp_path: Path) -> None:
    """The wheel's own model under another name, and the same told to be of 640 pixels, which it takes as well."""
    own = (Path(str(import_module("nudenet").__file__)).parent / "320n.onnx").read_bytes()
    (tmp_path / "same.onnx").write_bytes(own)
    (tmp_path / "large.onnx").write_bytes(own.replace(b"[320, 320]", b"[640, 640]"))
    same, large = (NudeNet.load(tmp_path / name) for name in ("same.onnx", "large.onnx"))
    assert same.version == detector.version != large.version
    assert (same.net.input_width, large.net.input_width) == (320, 640)
    assert same.look(photo()) == detector.look(photo()) != large.look(photo())
    (tmp_path / "cut.onnx").write_bytes(own[:1000])
    (tmp_path / "other.onnx").write_bytes(own.replace(b"FEET_EXPOSED", b"FEET_COVERES"))
    for name, words in (("no", "there is no NudeNet model at"), ("cut", "cannot be read as a model"), ("other", "tells other classes")):
        with pytest.raises(EffaceError, match=rf"{words}.*expected an .onnx file of NudeNet 3, such as 640m.onnx .*--nudenet FILE"):
            NudeNet.load(tmp_path / f"{name}.onnx")


def test_every_class_of_the_metrics_is_a_label() -> None:
    assert set().union(*CLASSES.values()) | set(V2.values()) <= set(LABELS)
    assert len(set(LABELS)) == 18


def test_the_labels_are_ranked_and_all_boxes_kept() -> None:
    found = [
        {"class": "FEET_EXPOSED", "score": 0.3, "box": [1, 2, 3, 4]},
        {"class": "FACE_MALE", "score": 0.7, "box": [5, 6, 7, 8]},
        {"class": "FEET_EXPOSED", "score": 0.4, "box": [9, 9, 9, 9]},
    ]
    seen = sighting(found)
    assert (seen.labels, seen.scores) == (("FACE_MALE", "FEET_EXPOSED"), (0.7, 0.4))
    assert [box.box for box in seen.boxes or ()] == [(1, 2, 3, 4), (5, 6, 7, 8), (9, 9, 9, 9)]
    assert seen.top(2) == ("FACE_MALE",)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nudenet, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '.\[eval\]'"):
        NudeNet.load()

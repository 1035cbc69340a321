"""The ImageNet classifier with a small network handed in: order, labels, broken pictures, and what its record says."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from efface.core.errors import EffaceError, MissingExtra, Unsupported
from efface.core.evidence import Samples, Shot
from efface.evals.detectors import imagenet
from efface.evals.detectors.imagenet import ImageNet
from efface.evals.metrics.esr import ESR

CLASSES = ("chain saw", "church", "tench")


class Colours(nn.Module):
    """A class for each colour channel: the brightest one wins."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * images.mean((2, 3))


def doubled(images: Tensor) -> Tensor:
    return nn.functional.interpolate(images, scale_factor=2)


def picture(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([float(red), green, blue])[None, :, None, None].expand(1, 3, 8, 8).clone()


def test_classes_come_in_their_order_and_a_broken_picture_is_undetermined() -> None:
    detector = ImageNet(Colours(), doubled, CLASSES)
    broken = picture(0, 0, 0)
    broken[0, 0, 0, 0] = float("nan")
    first, second, third = detector.look(torch.cat([picture(0.1, 0.9, 0.5), picture(0.3, 0.2, 0.1), broken]))
    assert (first.labels, second.labels) == (("church", "tench", "chain saw"), ("chain saw", "church", "tench"))
    assert sum(first.scores) == pytest.approx(1, abs=1e-5)
    assert not third.determined
    assert first.top(1) == ("church",)  # the surest class counts, however unsure
    shots = (Shot("Image of Church", 0, "target", "Church", ("church",)),)
    assert ESR(1).measure(Samples(shots, (first,)), Samples(shots, (second,))).change.value == 1


def test_the_version_follows_the_weights() -> None:
    net = Colours()
    detector = ImageNet(net, doubled, CLASSES, "torchvision 0")
    before = detector.version
    assert before.startswith("torchvision 0/")
    net.scale.data.mul_(2)
    assert detector.version != before
    detector.require(["church"], "object")
    with pytest.raises(Unsupported, match="no label 'cat'"):
        detector.require(["cat"], "object")
    with pytest.raises(Unsupported, match="was asked for kind 'style'"):
        detector.look(picture(0, 0, 0), "style")


def test_without_torchvision_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '.\[metrics\]'"):
        ImageNet.load()


def test_weights_that_cannot_be_downloaded_say_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(weights: object) -> nn.Module:
        raise URLError("no route to host")

    models = SimpleNamespace(resnet50=offline, ResNet50_Weights=SimpleNamespace(IMAGENET1K_V2=None))
    monkeypatch.setattr(imagenet, "find_spec", lambda name: object())
    monkeypatch.setattr(imagenet, "import_module", lambda name: models)
    with pytest.raises(EffaceError, match=r"neither found nor downloaded .*no route to host.*; expected torchvision's resnet50-11ad3fa6"):
        ImageNet.load()


def test_named_weights_that_are_not_there_say_which_are_wanted(tmp_path: Path) -> None:
    with pytest.raises(EffaceError, match=r"holds 0 files of ResNet-50's weights; expected torchvision's resnet50-11ad3fa6.pth .*--resnet"):
        ImageNet.load(tmp_path)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_true_network_takes_a_named_file(tmp_path: Path) -> None:
    net = import_module("torchvision.models").resnet50(weights=None)
    torch.save(net.state_dict(), tmp_path / "resnet50.pth")
    detector = ImageNet.load(tmp_path)
    assert detector.version.endswith(ImageNet(net, doubled, CLASSES).version.partition("/")[2])
    assert len(detector.labels()) == 1000
    assert detector.look(torch.rand(1, 3, 64, 64))[0].determined
    torch.save({"fc.bias": torch.ones(3)}, tmp_path / "resnet50.pth")
    with pytest.raises(EffaceError, match="weights of another network than ResNet-50"):
        ImageNet.load(tmp_path)

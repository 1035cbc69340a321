"""Kernel and Fréchet distances and LPIPS: on numbers known beforehand, with what is learned handed in."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efface.bench.options import DEFAULT
from efface.bench.protocols import artists
from efface.core.errors import EffaceError, MissingExtra
from efface.core.evidence import Samples, Shot
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.metrics import kid as kernel
from efface.evals.metrics import lpips
from efface.evals.metrics.frechet import Frechet
from efface.evals.metrics.kid import KID, kid, mmd
from efface.evals.metrics.likeness import Likeness
from efface.evals.metrics.lpips import Lpips
from efface.ops.frechet import frechet

SHOTS = tuple(Shot(f"p{i}", i, "unrelated", "dog") for i in range(40))


def drawn(shift: float = 0.0, seed: int = 0, n: int = 40) -> Tensor:
    return torch.randn((n, 4), generator=seeded(seed)) + shift


def samples(features: Tensor) -> Samples:
    return Samples(SHOTS, features=features)


def test_the_unbiased_kernel_distance_is_its_formula() -> None:
    """Against the double sum, written out."""
    x, y = drawn(n=5), drawn(1.0, 1, 7)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a.double() @ b.double() / 4 + 1) ** 3)

    within = [sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1)) for z in (x, y)]
    across = sum(k(a, b) for a in x for b in y) / 35
    assert mmd(x, y) == pytest.approx(sum(within) - 2 * across)
    with pytest.raises(ValueError, match="needs two pictures on both sides"):
        mmd(x[:1], y)


def test_it_is_unbiased_and_the_frechet_distance_is_not() -> None:
    """Two draws of one kind: the mean over many is 0 within its error for the kernel distance; the Fréchet one is always above."""
    from efface.ops.frechet import frechet

    pairs = [(drawn(0, 2 * i, 20), drawn(0, 2 * i + 1, 20)) for i in range(200)]
    values = torch.tensor([mmd(a, b) for a, b in pairs])
    assert values.mean().abs() < 3 * values.std() / 200**0.5
    assert (values < 0).any()
    assert min(frechet(a, b) for a, b in pairs) > 0


def test_pairs_of_one_noise_are_no_evidence_that_two_sets_are_alike() -> None:
    """Of one kind, but correlated: unbiased without the pairs; with them it is far below 0, as if the sets were more alike than alike."""
    pairs = [(a, 0.95 * a + (1 - 0.95**2) ** 0.5 * b) for a, b in ((drawn(0, 2 * i, 20), drawn(0, 2 * i + 1, 20)) for i in range(200))]
    fair, unfair = (torch.tensor([mmd(a, b, paired=paired) for a, b in pairs]) for paired in (True, False))
    assert fair.mean().abs() < 3 * fair.std() / 200**0.5
    assert unfair.mean() < -10 * unfair.std() / 200**0.5
    same = drawn()
    assert mmd(same, same, paired=True) == 0
    with pytest.raises(ValueError, match="expected as many on both sides"):
        mmd(same, same[:5], paired=True)


def test_large_sets_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = drawn(n=30), drawn(0.5, 1, 30)
    whole = kid(x, y)
    monkeypatch.setattr(kernel, "SUBSET", 10)
    parts = [1000 * mmd(x[i : i + 10], y[i : i + 10]) for i in (0, 10, 20)]
    assert kid(x, y) == pytest.approx(sum(parts) / 3)
    assert kid(x, y) != whole
    thirty, three = drawn(n=30), drawn(0.5, 1, 3)  # a few pictures beside many real ones: each part of these meets all of those
    assert kid(three, thirty) == pytest.approx(sum(1000 * mmd(three, thirty[i : i + 10]) for i in (0, 10, 20)) / 3)


@pytest.mark.parametrize("metric", [KID, Frechet])
def test_to_the_un_erased_model_and_to_a_reference(metric: type[KID | Frechet]) -> None:
    first, far, real = drawn(), drawn(2.0, 1), drawn(2.0, 2, 60)
    same, moved = metric().measure(samples(first), samples(first)), metric().measure(samples(first), samples(far))
    assert same.before.value == moved.before.value == 0
    assert same.after.value < moved.after.low < moved.after.value < moved.after.high
    nearer = metric(reference=real).measure(samples(first), samples(far))
    assert nearer.before.value > 5 * abs(nearer.after.value)
    assert nearer.change.value == pytest.approx(nearer.after.value - nearer.before.value)
    assert nearer.change.high < 0  # damage that the distance to real pictures takes for an improvement
    with pytest.raises(ValueError, match="needs an embedder's features"):
        metric().measure(Samples(SHOTS), Samples(SHOTS))


def test_similarity_is_of_pairs() -> None:
    """100 times the mean cosine; shuffled pictures are the control, of which all distances of sets say that nothing changed."""
    first = F.normalize(drawn(1.0), dim=-1)
    near, shuffled = F.normalize(first + 0.1 * drawn(seed=1), dim=-1), first.flip(0)
    same, moved, mixed = (Likeness().measure(samples(first), samples(other)) for other in (first, near, shuffled))
    assert (same.before.value, same.after.value) == (100, pytest.approx(100, abs=1e-4))
    assert moved.after.value == pytest.approx(100 * float((first * near).sum(-1).mean()), abs=1e-4)
    assert moved.change.value == pytest.approx(moved.after.value - 100)
    assert moved.after.low > mixed.after.high
    assert Frechet().measure(samples(first), samples(shuffled)).after.value == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="needs an embedder's features"):
        Likeness().measure(Samples(SHOTS), Samples(SHOTS))


def squares(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).square().mean((1, 2, 3))


def test_lpips_is_of_pairs_and_of_its_resolution() -> None:
    noise = torch.randint(0, 256, (2, 3, 128, 128), generator=seeded(0)).to(torch.uint8)
    shots = (Shot("a", 0, "target", "monet"), Shot("b", 1, "unrelated", "dog"))
    before, after = Samples(shots, images=noise), Samples(shots, images=torch.stack([255 - noise[0], noise[1]]))
    full, small = (Lpips(squares, ("target",), pixels).measure(before, after) for pixels in (None, 64))
    assert full.before.value == 0
    assert full.after.value == pytest.approx(float(squares(*(noise[:1].float() / 127.5 - 1, 1 - noise[:1].float() / 127.5))), rel=1e-3)
    assert small.after.value < 0.5 * full.after.value  # shrinking averages noise away
    assert (full.after.name, small.after.name) == ("LPIPS (128×128 pixels)", "LPIPS (64×64 pixels)")
    assert Lpips(squares, ("unrelated",)).measure(before, after).after.value == 0
    with pytest.raises(ValueError, match="holds? none; measure again"):
        Lpips(squares).measure(Samples(shots), Samples(shots))


class Trunk(nn.Module):
    """The slices of `lpips`' AlexNet, with the numbers of the layers in it, and a few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.slice1 = nn.Sequential()
        self.slice1.add_module("0", nn.Conv2d(3, 2, 3))
        self.slice2 = nn.Sequential()
        self.slice2.add_module("3", nn.Conv2d(2, 4, 3))


def test_lpips_trunk_is_filled_from_torchvisions_file(tmp_path: Path) -> None:
    """Layer by layer of the same number; the classifier's layers are left, and another network is refused."""
    layers = {"0": nn.Conv2d(3, 2, 3), "3": nn.Conv2d(2, 4, 3), "6": nn.Conv2d(4, 4, 3)}
    state = {f"features.{i}.{name}": tensor for i, layer in layers.items() for name, tensor in layer.state_dict().items()}
    torch.save(state | {"classifier.1.bias": torch.ones(2)}, tmp_path / "alexnet.pth")
    trunk = Trunk()
    assert not torch.equal(trunk.slice2[0].weight, layers["3"].weight)  # control
    lpips.fill(trunk, tmp_path / "alexnet.pth")
    assert torch.equal(trunk.slice1[0].weight, layers["0"].weight)
    assert torch.equal(trunk.slice2[0].bias, layers["3"].bias)
    assert not lpips.published(tmp_path)
    for other in ({"features.0.weight": torch.ones(2)}, {**state, "features.3.weight": torch.ones(1)}):
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(EffaceError, match="weights of another network than AlexNet; expected torchvision's alexnet-owt-7be5be79.pth"):
            lpips.fill(trunk, tmp_path / "other.pth")
    with pytest.raises(EffaceError, match="there are no AlexNet weights at nowhere; .*--lpips PATH"):
        lpips.load("nowhere")


class Package:
    """What `lpips` does where the trunk's weights can be neither found nor downloaded, after it called torchvision in the older way."""

    @staticmethod
    def LPIPS(**options: object) -> nn.Module:
        warnings.warn("The parameter 'pretrained' is deprecated", UserWarning, stacklevel=2)
        raise URLError("no route to host")


def test_a_trunk_that_cannot_be_downloaded_is_an_error_and_its_lines_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "available", lambda: True)
    monkeypatch.setattr(lpips, "import_module", lambda name: Package)
    with pytest.raises(EffaceError, match=r"neither found nor downloaded .*no route to host.*; expected torchvision's alexnet-owt"):
        lpips.load()
    plan, _ = artists.setup("emoji", Task.of("style:retro"), "quick", DEFAULT)
    assert any(said.startswith("LPIPS: AlexNet's weights can be neither found") for said in plan.unmeasured)
    assert not any("LPIPS" in question.key for question in plan.asks.questions)


@pytest.mark.skipif(not lpips.available(), reason="lpips or torchvision is not installed")
def test_lpips_with_a_named_trunk_is_a_distance(tmp_path: Path) -> None:
    alexnet = import_module("torchvision.models").alexnet(weights=None)
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    distance, same = lpips.load(tmp_path), lpips.load(tmp_path / "alexnet.pth")
    first, second = torch.rand((2, 1, 3, 64, 64), generator=seeded(0)) * 2 - 1
    assert float(distance(first, second).detach()) == float(same(first, second).detach()) > float(distance(first, first).detach()) == 0


def test_without_lpips_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "find_spec", lambda name: None)
    assert not lpips.available()
    with pytest.raises(MissingExtra, match=r"pip install -e '.\[metrics\]'"):
        lpips.load()


class Pixels(nn.Module):
    """A feature extractor of torchmetrics' interface whose features are a picture's first numbers."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.num_features].double() / 255


def test_the_distances_are_those_of_torchmetrics() -> None:
    """Ours carry intervals and leave pairs of one noise out; without pairs they are the library's numbers, from its own accumulation."""
    fids, kids = pytest.importorskip("torchmetrics.image.fid"), pytest.importorskip("torchmetrics.image.kid")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(low, 256, (40, 3, 4, 4), generator=generator, dtype=torch.uint8) for low in (0, 60))
    features = [Pixels()(images) for images in (first, second)]
    theirs = fids.FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    theirs.update(first, real=True)
    theirs.update(second, real=False)
    assert frechet(*features) == pytest.approx(float(theirs.compute()), rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features
        kernel_distance = kids.KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=40)
    kernel_distance.update(first, real=True)
    kernel_distance.update(second, real=False)
    assert mmd(*features) == pytest.approx(float(kernel_distance.compute()[0]), rel=1e-4)
    assert frechet(features[0], features[0]) < 1e-9 < frechet(*features)

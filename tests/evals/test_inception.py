"""Inception's features beside an embedder's, FID and KID in them: by a small network, and by the true one where torch-fidelity is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from benchparts import Colours, load
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from efface.bench.draw import Judges
from efface.bench.options import Options
from efface.bench.plan import Plan
from efface.bench.protocols import erasure, preservation, registry
from efface.bench.result import Result
from efface.concepts.vocabulary import read
from efface.core.card import Card
from efface.core.edit import WeightEdit
from efface.core.errors import EffaceError, MissingExtra
from efface.core.evidence import Samples, Shot
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.detectors import inception
from efface.evals.detectors.inception import Inception
from efface.evals.metrics.frechet import Frechet, fid
from efface.evals.metrics.kid import KID, kid

SMALL = 6
CAT = Task.parse("cat")
SHOTS = tuple(Shot(f"p{i}", i, "unrelated", "dog") for i in range(24))


def small() -> Inception:
    """Means and deviations of the three channels in the place of the network."""

    def net(pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8
        flat = pixels.float().flatten(2) / 64
        return torch.cat([flat.mean(-1), flat.std(-1)], 1)

    return Inception(Colours(), net, "small", "0", SMALL)


def pictures(seed: int = 0, n: int = 24) -> Tensor:
    """Smooth random pictures (n 3 32 32) in [0, 1]."""
    coarse = torch.rand((n, 3, 4, 4), generator=seeded(seed))
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)


def corrupted(images: Tensor, strength: float) -> Tensor:
    """With black noise."""
    return images * (torch.rand(images.shape, generator=seeded(9)) > strength)


def reference_frechet(first: Tensor, second: Tensor) -> float:
    """Tr (Σ₁Σ₂)^½ as the trace of the root of Σ₁^½ Σ₂ Σ₁^½, by eigenvalues of symmetric matrices."""
    x, y = first.double(), second.double()
    sigma1, sigma2 = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def measured(width: int, first: Tensor, second: Tensor, reference: Tensor | None = None) -> tuple[float, float]:
    """FID before and after, of features."""
    contrast = fid((-width, None), reference).measure(*(Samples(SHOTS[: len(side)], features=side) for side in (first, second)))
    return contrast.before.value, contrast.after.value


def test_texts_and_the_embedders_own_features_are_untouched() -> None:
    eye, images, texts = small(), pictures(n=5), ["a", "be", "nus", "rit", "dog"]
    both, words = eye.embed_images(images), eye.embed_texts(texts)
    alone = Colours().embed_images(images)
    assert torch.equal(both[:, :-SMALL], alone)
    assert torch.equal((both * words).sum(-1), (alone * Colours().embed_texts(texts)).sum(-1))
    assert both[:, -SMALL:].abs().min() > 0
    assert (eye.name, eye.version) == ("colours + inception-v3", "1 + small/0")


def test_fid_is_its_formula_in_inceptions_columns_alone() -> None:
    both = [small().embed_images(pictures(seed)) for seed in (0, 1)]
    before, after = measured(SMALL, *both)
    features, sides = [side[:, -SMALL:] for side in both], [Samples(SHOTS, features=side) for side in both]
    assert before == 0
    assert after == pytest.approx(reference_frechet(*features), abs=1e-3)
    assert KID(columns=(-SMALL, None), label="KID").measure(*sides).after.value == pytest.approx(kid(*reversed(features), paired=True))
    assert Frechet().measure(*sides).after.value != pytest.approx(100 * after)  # control: all columns are another number


def test_fid_of_the_same_pictures_is_0_and_grows_with_damage() -> None:
    damaged = [small().embed_images(corrupted(pictures(), strength)) for strength in (0.0, 0.1, 0.3, 0.6)]
    values = [measured(SMALL, damaged[0], side) for side in damaged]
    to_real = [measured(SMALL, damaged[0], side, damaged[0]) for side in (damaged[0], damaged[-1])]
    assert values[0] == pytest.approx((0, 0), abs=1e-6)
    rising = [after for _, after in values]
    assert rising == sorted(rising)
    assert rising[1] > 1e-2
    assert to_real[0] == pytest.approx((0, 0), abs=1e-6)
    assert to_real[1][1] == pytest.approx(rising[-1])


def result(plan: Plan, judges: Judges) -> Result:
    """Of a damaged tiny model on a few of the plan's prompts."""
    model, few = load("tiny"), replace(plan.only(plan.shown(4)), steps=2)
    deltas = {n: s.tensor.std() * torch.randn(s.tensor.shape, generator=seeded(0)) for n, s in model.select("xattn").items()}
    edit = WeightEdit(deltas, Card.of(model, method="vandal", task=CAT, seed=0))
    return erasure.measure(model, edit, CAT, plan=few, embedder=judges.embedder)


def values(found: Result, key: str) -> tuple[float, float]:
    line = found.line(key)
    assert line is not None
    return line.contrast.before.value, line.contrast.after.value


def test_the_embedders_lines_are_the_same_with_inception_behind_it() -> None:
    plan = preservation.own(CAT, "quick", read("emoji"))
    plain = result(plan, Judges(embedder=Colours()))
    space = preservation.Space("", (None, -SMALL), (-SMALL, None), "small")
    both = result(replace(plan, asks=space.asks()), Judges(embedder=small()))
    assert {line.key: line.contrast for line in plain.lines}.items() <= {line.key: line.contrast for line in both.lines}.items()
    assert {line.key for line in both.lines} - {line.key for line in plain.lines} == {"unrelated.FID", "unrelated.KID"}
    assert values(both, "unrelated.FID")[1] > values(both, "unrelated.FID")[0] == 0
    assert f"FID {values(both, 'unrelated.FID')[1]:.2f}, Fréchet" in both.finding
    assert "FID" not in plain.finding
    assert both.settings.embedder == {"name": "colours + inception-v3", "version": "1 + small/0"}


# -- the weights -----------------------------------------------------------------------------------


def test_what_is_wanted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, words in ((tmp_path / "no.pth", "there are no Inception weights at"), (tmp_path, "holds 0 files of Inception's weights")):
        with pytest.raises(EffaceError, match=words) as error:
            Inception.load(path, Colours())
        assert "expected torch-fidelity's weights-inception-2015-12-05-6726825d.pth" in str(error.value)
        assert "https://github.com/toshas/torch-fidelity/releases" in str(error.value)
        assert "--inception PATH" in str(error.value)
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    file = tmp_path / inception.FILE
    file.write_bytes(b"0")
    with pytest.raises(MissingExtra, match=r"need torch-fidelity and torchvision, .*pip install -e '.\[metrics\]'"):
        Inception.load(tmp_path, Colours())  # the folder's one file is found
    (tmp_path / "inception.safetensors").write_bytes(b"0")
    with pytest.raises(EffaceError, match="holds 2 files"):
        Inception.load(tmp_path, Colours())


# -- the true network ------------------------------------------------------------------------------


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[nn.Module]]:
    """torch-fidelity's class. Without torchvision its package cannot be imported, but this one module of it can."""
    spec = find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed")
    whole = find_spec("torchvision") is not None
    if not whole:
        monkeypatch.setitem(sys.modules, "torch_fidelity", module_from_spec(spec))
        monkeypatch.setattr(inception, "find_spec", lambda name: spec)
    yield import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.") and not whole]:
        del sys.modules[name]


@pytest.fixture
def state(network: type[nn.Module]) -> dict[str, Tensor]:
    """Random weights of the true layout, whose activations neither grow nor die."""

    class Unfilled(network):  # type: ignore[valid-type,misc]
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
            """Its constructor wants weights."""

    nothing = BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Unfilled("random", ["2048"], feature_extractor_weights_path=nothing)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return net.state_dict()


def test_fid_in_the_true_network(state: dict[str, Tensor], tmp_path: Path) -> None:
    """The number of the formula, from either kind of file; and what the resizing is."""
    assert len(state) == 566
    torch.save(state, tmp_path / inception.FILE)
    save_file(state, tmp_path / "same.safetensors")
    eye, same = (Inception.load(path, Colours()) for path in (tmp_path, tmp_path / "same.safetensors"))
    first, second = pictures(n=6), corrupted(pictures(n=6), 0.3)
    features = [eye.embed_images(side) for side in (first, second)]
    assert features[0].shape == (6, 12 + 2048)
    assert torch.allclose(features[0][:1], same.embed_images(first[:1]), rtol=1e-4, atol=1e-5)
    assert eye.package.startswith("torch-fidelity 0.")
    assert (eye.digest, eye.published) != (same.digest, True)
    before, after = measured(2048, *features)
    inner = [side[:, -2048:].double() for side in features]
    basis = torch.linalg.qr(torch.cat(inner).T).Q  # all that happens lies in these twelve dimensions
    assert before == 0
    assert after == pytest.approx(reference_frechet(*(side @ basis for side in inner)), rel=1e-3)
    assert after > 1
    stripes = torch.zeros(1, 3, 598, 598)
    stripes[..., 1::2] = 1
    smooth, sharp, black = (eye.embed_images(side)[:, 12:] for side in (stripes * 0 + 0.5, stripes, stripes * 0))
    assert torch.equal(sharp, black)  # every second column is taken: nothing is smoothed
    assert not torch.equal(sharp, smooth)  # as antialiasing would
    with pytest.raises(EffaceError, match="weights of another network than Inception; expected torch-fidelity's"):
        torch.save({**state, "AuxLogits.fc.bias": torch.ones(1)}, tmp_path / "other.pth")
        Inception.load(tmp_path / "other.pth", Colours())


@pytest.mark.slow
def test_preservation_by_the_true_network(state: dict[str, Tensor], tmp_path: Path) -> None:
    """On the bundled model's prompts and on a file's, by one call each; a tiny model draws."""
    torch.save(state, tmp_path / inception.FILE)
    for i in range(3):
        Image.new("RGB", (40, 30 + i), (80 * i, 40, 90)).save(tmp_path / f"{i}.png")
    file = tmp_path / "coco.csv"
    file.write_text("image_id,prompt\n7,A bus.\n8,A catalogue.\n9,A cat.\n10,A dog.\n", encoding="utf-8")
    options = Options(real=str(tmp_path), inception=str(tmp_path))
    own = registry.find("preservation").setup("emoji", CAT, options=options)
    listed = preservation.watched(preservation.listed(CAT, "full", replace(options, prompts=str(file))), Colours(), options)
    for (plan, judges), name in ((own, "emoji-clip"), (listed, "colours")):
        found = result(plan, judges)
        keys = {f"unrelated.{distance}{to}" for distance in ("FID", "KID", "frechet", "kernel") for to in ("", "-real")}
        assert {line.key for line in found.lines} == keys | {"unrelated.clip", "unrelated.likeness"}
        assert values(found, "unrelated.FID")[1] > values(found, "unrelated.FID")[0] == 0
        assert min(values(found, "unrelated.FID-real")) > 0
        titles = {line.key: line.title for line in found.lines}
        assert titles["unrelated.FID-real"].startswith("FID to 3 real pictures, as torch-fidelity 0.")
        assert titles["unrelated.frechet-real"].endswith(f", in {name}")
        assert found.settings.embedder is not None
        assert "torch-fidelity 0." in found.settings.embedder["version"]
        assert any("published weights" in sentence for sentence in found.unmeasured)

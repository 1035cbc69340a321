"""UnlearnCanvas on any model: its lists, its grid and parts of it, its two classifiers, and its numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clipparts
import numpy as np
import pytest
import torch
from benchparts import load
from PIL import Image
from torch import Tensor, nn

from efface.bench.draw import Judges
from efface.bench.options import Options
from efface.bench.plan import Plan
from efface.bench.protocols import erasure, registry, unlearncanvas
from efface.bench.result import Result
from efface.bench.run import run
from efface.bench.trial import Trial
from efface.concepts import resolve, vocabulary
from efface.concepts.canvas import canvas
from efface.core.card import Card
from efface.core.edit import WeightEdit
from efface.core.errors import EffaceError, InvalidTask, MissingExtra, Unsupported
from efface.core.evidence import Samples, Sighting
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.detectors import canvas as detector
from efface.evals.detectors.canvas import CanvasJudge, prepared

WORDS = canvas()
WORDS_OF = {"style": WORDS.styles, "object": WORDS.objects}
STYLE, OBJECT = "style:van gogh", "cats"
PROTOCOL = registry.find("unlearncanvas")


def task(text: str) -> Task:
    return Task.of(text, resolve=resolve)


def planned(text: str, size: str = "full", **options: Any) -> Plan:
    return unlearncanvas.benchmark(task(text), size, Options(**options))


# -- the lists and the grid ------------------------------------------------------------------------


def test_the_lists_are_the_benchmarks_in_the_order_of_its_classifiers() -> None:
    assert (len(set(WORDS.styles)), len(set(WORDS.objects))) == (len(WORDS.styles), len(WORDS.objects)) == (51, 20)
    assert [WORDS.styles[i] for i in (0, 1, 38, 45, 50)] == ["Abstractionism", "Artist Sketch", WORDS.photos, "Van Gogh", "Winter"]
    assert [WORDS.objects[i] for i in (0, 4, 19)] == ["Architectures", "Cats", "Waterfalls"]
    for names in (WORDS.styles, WORDS.objects):
        assert list(names) == sorted(names)
        assert not any("_" in name for name in names)
    assert not set(WORDS.styles) & set(WORDS.objects)
    with pytest.raises(InvalidTask, match=r"no bundled vocabulary 'nowhere'; Valid: emoji$"):  # the lists are no world
        vocabulary("nowhere")


@pytest.mark.parametrize(("text", "own"), [(STYLE, 20), (OBJECT, 51)])
def test_the_whole_grid_is_the_benchmarks(text: str, own: int) -> None:
    plan, pictures = planned(text), 51 * 20 * 5
    assert (plan.name, plan.steps, plan.guidance) == ("unlearncanvas/benchmark/full", 100, 9.0)
    assert len(plan.shots) == 2 * len({(shot.prompt, shot.seed) for shot in plan.shots}) == 2 * pictures
    roles = Counter(shot.role for shot in plan.shots)
    assert roles == {"target": 5 * own, "kept": 5 * own, "neighbour": pictures - 5 * own, "unrelated": pictures - 5 * own}
    assert {shot.seed for shot in plan.shots} == {188, 288, 588, 688, 888}
    asked = {shot.prompt for shot in plan.shots}
    assert {"A Cats image in Van Gogh style.", "A Architectures image in Seed Images style."} < asked
    assert all(first.prompt == second.prompt for first, second in zip(plan.shots[::2], plan.shots[1::2], strict=True))
    assert not any("subset" in sentence for sentence in plan.unmeasured)


@pytest.mark.parametrize("text", [STYLE, OBJECT])
def test_a_part_of_it_is_announced_holds_what_was_erased_and_is_spread(text: str) -> None:
    quick = planned(text, "quick")
    assert quick.unmeasured[-1] == "A subset: 64 of the 1020 prompts, 16 of them for what was erased; 1 of the 5 seeds."
    assert Counter(shot.role for shot in quick.shots) == {"target": 16, "kept": 16, "neighbour": 48, "unrelated": 48}
    others = Counter(shot.concept for shot in quick.shots if shot.role in ("neighbour", "unrelated"))
    assert sum(name in WORDS.styles for name in others) >= 47
    assert sum(name in WORDS.objects for name in others) >= 19
    assert max(count for name, count in others.items() if name in WORDS.objects) <= 4
    assert planned(text, "quick", each=2).unmeasured[-1].endswith("; 2 of the 5 seeds.")
    assert planned(text, each=3).unmeasured[-1] == "A subset: 3 of the 5 seeds."
    assert planned(text, limit=100).unmeasured[-1].startswith("A subset: 100 of the 1020 prompts")
    assert planned(text, limit=100).unmeasured[-1].endswith(f"{20 if text == STYLE else 25} of them for what was erased.")
    assert planned(text, limit=2000).digest == planned(text).digest
    assert len(planned(text, limit=4).roles) == 4
    for options, message in (({"limit": 3}, "limit was 3; .* at least 4 prompts"), ({"each": 6}, "each was 6; UnlearnCanvas has 5 seeds")):
        with pytest.raises(EffaceError, match=message):
            planned(text, **options)


def test_what_the_benchmark_does_not_have_is_not_erased() -> None:
    for text, message in (
        ("cat", "has no object 'cat', .*did you mean 'Cats'"),
        ("style:Van_Gogh", "has no style 'Van_Gogh', and its prompts would not ask for it; .*did you mean 'Van Gogh'"),
        ("style:seed images", "has no style 'seed images'"),
        ("cats; dogs", "one style or one object at a time"),
    ):
        with pytest.raises(InvalidTask, match=message):
            planned(text)


# -- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [STYLE, OBJECT])
def test_the_numbers_are_those_of_the_confusion_matrix_with_and_without_its_traps(text: str) -> None:
    """From the tensor of verdicts [seed, style, object] itself: over all, without what was erased, without the photos."""
    plan, generator = planned(text), seeded(3)
    right = {kind: torch.rand((5, 51, 20), generator=generator) < 0.7 for kind in ("style", "object")}
    right["style"][:, WORDS.styles.index(WORDS.photos)] = False  # a style that the model was never taught
    seen = []
    for style, thing in zip(plan.shots[::2], plan.shots[1::2], strict=True):
        cell = unlearncanvas.SEEDS.index(style.seed), WORDS.styles.index(style.concept), WORDS.objects.index(thing.concept)
        seen += [
            Sighting((shot.concept if right[kind][cell] else "?",), (0.01,), 0.5) for shot, kind in ((style, "style"), (thing, "object"))
        ]
    after = Samples(plan.shots, tuple(seen))
    value = {line.key.removeprefix("canvas."): line.contrast.after.value for line in erasure.answers(plan.asks.questions, after, after)}
    assert len(value) == 7
    mine, other, axis = ("style", "object", 1) if text == STYLE else ("object", "style", 2)
    erased = (WORDS.styles.index("Van Gogh") if text == STYLE else WORDS.objects.index("Cats"),)
    own, cross = right[mine].double(), right[other].double()
    spared = torch.tensor([i for i in range(own.shape[axis]) if i not in erased])
    styled = torch.tensor([i for i, name in enumerate(WORDS.styles) if name != WORDS.photos])
    assert value["UA"] == pytest.approx(1 - float(own.select(axis, *erased).mean()))
    assert value["IRA"] == pytest.approx(float(own.index_select(axis, spared).mean()))
    assert value["CRA"] == pytest.approx(float(cross.mean()))
    assert value["CRA-others"] == pytest.approx(float(cross.index_select(axis, spared).mean()))
    within = own.index_select(1, styled)
    place = erased if text == OBJECT else (erased[0] - 1,)  # the photos come before Van Gogh
    rest = torch.tensor([i for i in range(within.shape[axis]) if i not in place])
    assert value["UA-styled"] == pytest.approx(1 - float(within.select(axis, *place).mean()))
    assert value["IRA-styled"] == pytest.approx(float(within.index_select(axis, rest).mean()))
    assert value["CRA-styled"] == pytest.approx(float(cross.index_select(1, styled).mean()))
    touched = {"IRA", "UA", "CRA"} - ({"UA", "CRA"} if text == STYLE else {"UA", "IRA"})
    assert all(value[f"{key}-styled"] - value[key] > 0.01 for key in touched)  # control: the photos weigh


def layers(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), nn.Linear(192, classes))


def small(classes: int) -> nn.Module:
    """A network of the classifiers' interface that sees contrasts between places of the picture, and knows three classes."""
    net = layers(classes)
    known = [WORDS.styles.index(n) for n in ("Van Gogh", "Crayon", "Seed Images")] if classes == 51 else [0, 4, 7]
    with torch.no_grad():
        weight = torch.randn(classes, 192, generator=seeded(classes))
        net[2].weight.copy_(1e3 * (weight - weight.mean(1, keepdim=True)))
        net[2].bias.fill_(-1e5)
        net[2].bias[known] = 0.0
    return net


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two files as the benchmark's training leaves them, with small networks in the place of timm's."""
    for classes, stem in ((51, "style50"), (20, "style50_cls")):
        torch.save({"epoch": 3, "model_state_dict": small(classes).state_dict()}, tmp_path / f"{stem}.pth")

    def made(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        assert (name, pretrained) == ("vit_large_patch16_224.augreg_in21k", False)
        return layers(num_classes)

    monkeypatch.setattr(detector, "find_spec", lambda name: object())
    monkeypatch.setattr(detector, "import_module", lambda name: SimpleNamespace(create_model=made))
    monkeypatch.setattr(detector, "version", lambda name: "1.2")
    return tmp_path


def vandal(model: Model, text: str) -> WeightEdit:
    deltas = {n: s.tensor.std() * torch.randn(s.tensor.shape, generator=seeded(0)) for n, s in model.select("xattn").items()}
    return WeightEdit(deltas, Card.of(model, method="vandal", task=task(text), seed=0))


def measured(text: str, **options: Any) -> Result:
    model = load("tiny")
    plan, judges = PROTOCOL.setup(model.id, task(text), "quick", Options(steps=1, limit=24, each=2, **options))
    edit = vandal(model, text)
    return erasure.measure(model, edit, task(text), plan=plan, detector=judges.detector, embedder=judges.embedder)


@pytest.mark.parametrize("text", [STYLE, OBJECT])
def test_a_whole_measurement_by_classifiers_from_files(text: str, folder: Path) -> None:
    """Every picture is drawn and classified again by hand, prompt by prompt."""
    result = measured(text, canvas=str(folder))
    assert result.settings.detector is not None
    assert result.settings.detector["version"].startswith("timm 1.2/")
    assert (result.settings.steps, result.settings.guidance) == (1, 9.0)
    model, erased = load("tiny"), {STYLE: "Van Gogh", OBJECT: "Cats"}[text]
    tallies: dict[str, list[bool]] = {"UA": [], "IRA": [], "CRA": [], "CRA-others": []}
    cells = unlearncanvas.part(unlearncanvas.cells(WORDS.styles, WORDS.objects), erased, 24)
    guesses = Counter()
    with vandal(model, text).attach(model):
        for seed in (188, 288):
            images = model.sample([f"A {o} image in {s} style." for s, o in cells], seeds=[seed] * 24, steps=1, guidance=9.0)
            for image, (style, thing) in zip(images, cells, strict=True):
                guess = {name: WORDS_OF[name][int(small(n)(prepared(image)[None]).argmax())] for name, n in (("style", 51), ("object", 20))}
                guesses.update(guess.values())
                right, hit = {"style": guess["style"] == style, "object": guess["object"] == thing}, erased in (style, thing)
                mine, other = ("style", "object") if text == STYLE else ("object", "style")
                tallies["UA" if hit else "IRA"].append(right[mine] != hit)
                tallies["CRA"].append(right[other])
                tallies["CRA-others"] += [] if hit else [right[other]]
    assert len(guesses) >= 4  # the small networks do not always say the same
    for key, found in tallies.items():
        line = result.line(f"canvas.{key}")
        assert line is not None
        assert (line.contrast.after.value, line.contrast.after.n) == (pytest.approx(sum(found) / len(found)), len(found))
    assert result.finding.startswith("UA ")
    assert "A subset: 24 of the 1020 prompts, 6 of them for what was erased; 2 of the 5 seeds." in result.unmeasured
    assert erasure.recompute(result, asks=registry.asks_of(result)).lines == result.lines


@pytest.mark.parametrize("text", [STYLE, OBJECT])
def test_clip_judges_between_the_same_names(text: str, tmp_path: Path) -> None:
    result = measured(text, detector="clip", clip=str(clipparts.save(tmp_path / "tiny-clip")))
    assert result.settings.detector is not None
    assert result.settings.detector["name"] == "clip tiny-clip zero-shot"
    texts = result.details["candidates"]
    assert (len(texts["styles"]), len(texts["things"])) == (51, 20)
    assert texts["styles"]["Van Gogh"] == "a painting in the style of Van Gogh"
    assert (texts["styles"][WORDS.photos], texts["things"]["Cats"]) == ("a photo", "a photo of the Cats")
    assert {"canvas.UA", "canvas.IRA", "canvas.CRA", "canvas.CRA-others"} <= {line.key for line in result.lines}
    assert "target.clip-accuracy" in {line.key for line in result.quality}
    for shot, sighting in zip(result.before.shots, result.before.sightings, strict=True):
        assert set(sighting.labels) <= set(WORDS.styles if shot.kind == "style" else WORDS.objects)


# -- who judges ------------------------------------------------------------------------------------


def test_without_a_judge_it_says_what_was_given_expected_and_to_do() -> None:
    with pytest.raises(
        Unsupported,
        match=r"for 'nowhere', which is not the bundled model, none was given; expected a folder with the benchmark's style50.pth "
        r"\(51 styles\) and style50_cls.pth \(20 objects\), .*OPTML-Group/UnlearnCanvas.*; give the folder as --canvas FOLDER .*; "
        r"or have CLIP judge, with --detector clip",
    ):
        PROTOCOL.setup("nowhere", task(OBJECT))
    with pytest.raises(EffaceError, match="canvas was 'folder', and the detector is 'clip'; leave one of the two out"):
        PROTOCOL.setup("nowhere", task(OBJECT), options=Options(canvas="folder", detector="clip"))
    with pytest.raises(EffaceError, match="the protocol 'objects' takes no 'canvas'"):
        registry.find("objects").setup("nowhere", task(OBJECT), options=Options(canvas="folder"))


def test_the_bundled_model_keeps_its_own_grid_and_judge(tmp_path: Path) -> None:
    """The plan is that of the records that exist; CLIP may judge it, too."""
    plan, judges = PROTOCOL.setup("emoji", task("style:retro"), "full")
    assert (plan.name, plan.digest) == ("unlearncanvas/emoji/full", "27603f759f14b9ff")
    assert [question.key for question in plan.asks.questions] == ["canvas.UA", "canvas.IRA", "canvas.CRA", "canvas.CRA-others"]
    assert judges.detector is not None
    assert judges.detector.name != CanvasJudge.name
    same, clip = PROTOCOL.setup("emoji", task("style:retro"), "full", Options(detector="clip"))
    assert same.digest == plan.digest
    assert clip.detector is not None
    assert clip.detector.name.endswith("zero-shot")
    for name, value in (("limit", 8), ("each", 2), ("canvas", str(tmp_path))):
        with pytest.raises(EffaceError, match=f"grid and judge are its own, and 'unlearncanvas' takes no '{name}' there"):
            PROTOCOL.setup("emoji", task("style:retro"), options=Options(**{name: value}))


def test_files_that_are_not_the_classifiers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    style = folder / "style50.pth"
    before = CanvasJudge.load(folder).version
    torch.save(small(51).state_dict(), style)  # a bare state dict does, too
    assert CanvasJudge.load(str(folder)).version == before
    torch.save({"model_state_dict": {n: 2 * t for n, t in small(51).state_dict().items()}}, style)
    assert CanvasJudge.load(folder).version != before
    style.write_bytes((folder / "style50_cls.pth").read_bytes())
    with pytest.raises(EffaceError, match=r"style50.pth holds the weights of another network than UnlearnCanvas' classifiers; expected"):
        CanvasJudge.load(folder)
    torch.save({"model_state_dict": [1, 2]}, style)
    with pytest.raises(EffaceError, match="holds something else than a state dict of tensors"):
        CanvasJudge.load(folder)
    (folder / "style50_cls.pth").unlink()
    with pytest.raises(EffaceError, match=r"no UnlearnCanvas' classifiers weights at .*style50_cls.pth; expected a folder"):
        CanvasJudge.load(folder)
    torch.save({"model_state_dict": small(20).state_dict()}, folder / "style50_cls.pth")
    monkeypatch.setattr(detector, "find_spec", lambda name: None if name == "timm" else object())
    with pytest.raises(MissingExtra, match=r"need timm and torchvision.*pip install -e '.\[metrics\]'.*or judge with --detector clip"):
        CanvasJudge.load(folder)


def test_pictures_are_prepared_as_the_benchmark_does_it() -> None:
    image = torch.rand((3, 50, 40), generator=seeded(0))
    pixels = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    for filter, near in ((Image.Resampling.BILINEAR, True), (Image.Resampling.BICUBIC, False)):
        by_hand = (torch.from_numpy(np.array(pixels.resize((224, 224), filter))).permute(2, 0, 1) / 255 - 0.5) / 0.5
        assert (float((prepared(image) - by_hand).abs().max()) < 1e-5) == near
    judge = CanvasJudge(small(51), small(20))
    broken = torch.stack([image, image * float("nan")])
    fine, none = judge.look(broken, "style")
    assert fine.determined
    assert len(fine.labels) == 10
    assert not none.determined
    assert judge.version.startswith("handed in/")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("timm") is None or find_spec("torchvision") is None, reason="timm is not installed")
def test_the_true_networks_take_their_files(tmp_path: Path) -> None:
    nets: dict[str, Any] = {
        stem: import_module("timm").create_model(detector.ARCHITECTURE, num_classes=n) for n, stem in ((51, "style50"), (20, "style50_cls"))
    }
    for stem, net in nets.items():
        torch.save({"model_state_dict": net.state_dict()}, tmp_path / f"{stem}.pth")
    images: Tensor = torch.rand((2, 3, 64, 64), generator=seeded(0))
    judge = CanvasJudge.load(tmp_path)
    for kind, stem in detector.FILES.items():
        with torch.no_grad():
            logits = nets[stem].eval()(torch.stack([prepared(image) for image in images]))
        names = WORDS_OF[kind]
        assert [sighting.labels[0] for sighting in judge.look(images, kind)] == [names[int(i)] for i in logits.argmax(-1)]


# -- in grids --------------------------------------------------------------------------------------


def test_tasks_that_draw_the_same_prompts_in_other_roles_stand_in_one_grid(tmp_path: Path) -> None:
    """All styles share one grid of prompts; what the un-erased model drew for one task is no answer to another's question."""

    def setup(trial: Trial, asked: Task) -> tuple[Plan, Judges]:
        plan, judges = PROTOCOL.setup("emoji", asked)
        return replace(plan.only(range(14)), steps=1), judges  # one object in all styles

    trials = [Trial.of("emoji", "uce", name, 0, protocol="unlearncanvas") for name in ("style:retro", "style:modern", "style:retro -> cat")]
    records = run(trials, tmp_path, load=load, setup=setup)
    assert [record.get("error") for record in records] == [None] * 3
    assert len({record["ground"]["prompts"] for record in records}) == 1
    sides = [Result.from_json(record["result"]) for record in records]
    assert [{s.concept for s in result.before.shots if s.role == "target"} for result in sides] == [{"retro"}, {"modern"}, {"retro"}]
    assert sides[0].before.sightings == sides[1].before.sightings == sides[2].before.sightings

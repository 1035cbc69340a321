"""The other protocols: their plans on the bundled world, their formulae on detections written down, and all by one call."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from benchparts import load
from PIL import Image

from efface.bench.draw import Judges, draw
from efface.bench.options import Options
from efface.bench.plan import Plan
from efface.bench.protocols import artists, erasure, generality, objects, preservation, registry, unlearncanvas
from efface.bench.result import Result
from efface.cli.measure import ProtocolName
from efface.concepts import resolve
from efface.concepts.vocabulary import read
from efface.core.card import Card
from efface.core.edit import WeightEdit
from efface.core.errors import EffaceError, InvalidTask
from efface.core.evidence import Samples, Sighting
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.detectors.emoji import EmojiJudge

WORLD = read()


def task(text: str) -> Task:
    return Task.of(text, resolve=resolve)


def test_the_command_line_offers_every_protocol() -> None:
    assert {*get_args(ProtocolName), "attacks"} == set(registry.PROTOCOLS)  # that one has a command of its own, `efface attack`
    with pytest.raises(EffaceError, match="no protocol 'erasing'; did you mean 'erasure'"):
        registry.find("erasing")
    with pytest.raises(EffaceError, match="guidance was 'row', each prompt's own, and no file"):
        registry.find("erasure").setup("emoji", task("cat"), options=Options(guidance="row"))


def test_every_protocol_takes_steps_and_guidance() -> None:
    plan, _ = registry.find("erasure").setup("nowhere", task("cat"), options=Options(steps=7, guidance=2))
    assert (plan.steps, plan.guidance) == (7, 2.0)
    assert registry.find("erasure").setup("nowhere", task("cat"))[0] == erasure.plan(task("cat"))


# -- objects ---------------------------------------------------------------------------------------


def test_each_class_has_as_many_pictures_and_as_many_are_kept_as_erased() -> None:
    plan, _ = registry.find("objects").setup("emoji", task("cat; bus; church"), "full")
    counts = Counter((shot.role, shot.concept) for shot in plan.shots)
    assert set(counts.values()) == {40}
    assert {concept for role, concept in counts if role == "target"} == {"cat", "bus", "church"}
    kept = {concept for role, concept in counts if role == "unrelated"}
    assert len(kept) == 3
    assert not any(set(WORLD.neighbours(name)) & kept for name in ("cat", "bus", "church"))
    named, _ = registry.find("objects").setup("emoji", task("cat | keep tiger, dog"))
    assert {shot.concept for shot in named.shots if shot.role == "kept"} == {"tiger", "dog"}
    with pytest.raises(InvalidTask, match="'retro' is none"):
        registry.find("objects").setup("emoji", task("style:retro"))


def imagenette(folder: Path) -> str:
    path = folder / "imagenette.csv"
    rows = [f"{i},Image of {name},{name},{100 + i}" for i, name in enumerate(("Church", "Chain Saw", "Tench", "Church"))]
    path.write_text("\n".join(["case_number,prompt,label_str,evaluation_seed", *rows]), encoding="utf-8")
    return str(path)


def test_a_file_of_classes_is_split_by_the_task_and_labels_lose_their_case(tmp_path: Path) -> None:
    plan = objects.listed(task("church; tench"), "full", Options(prompts=imagenette(tmp_path), steps=100))
    assert [(s.role, s.labels, s.seed) for s in plan.shots] == [
        ("target", ("church",), 100),
        ("unrelated", ("chain saw",), 101),
        ("target", ("tench",), 102),
        ("target", ("church",), 103),
    ]
    assert (plan.steps, plan.cases) == (100, (0, 1, 2, 3))
    with pytest.raises(EffaceError, match="has no prompt for 'golf ball', which was erased; its classes are chain saw, church, tench"):
        objects.listed(task("golf ball"), "full", Options(prompts=imagenette(tmp_path)))
    bare = tmp_path / "bare.csv"
    bare.write_text("prompt\na cat\n", encoding="utf-8")
    with pytest.raises(EffaceError, match="name no class, in a column such as 'label_str'"):
        objects.listed(task("cat"), "full", Options(prompts=str(bare)))


# -- one picture, judged twice ---------------------------------------------------------------------


def test_a_picture_that_is_judged_twice_is_drawn_once() -> None:
    model, plan = load("tiny"), small(unlearncanvas.plan(task("style:retro"), "quick", WORLD), 8)
    pictures = len({(shot.prompt, shot.seed) for shot in plan.shots})
    assert 2 * pictures == len(plan.shots)
    drawing = draw(model, plan, Judges(EmojiJudge.load()))
    assert drawing.cost["forwards"] == pictures * 2 * 2
    images = drawing.samples.images
    assert images is not None
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    first, second = drawing.samples.sightings[:2]
    assert set(first.labels) <= {style.name for style in WORLD.styles}
    assert set(second.labels) <= set(WORLD.objects)


def small(plan: Plan, shots: int) -> Plan:
    return replace(plan.only(range(shots)), steps=2, guidance=2.0)


def test_pictures_of_large_models_are_drawn_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from efface.core import model as module

    model, plan = load("tiny"), small(unlearncanvas.plan(task("style:retro"), "quick", WORLD), 8)
    at_once, before = draw(model, plan), model.meter.calls
    calls = model.meter.calls
    monkeypatch.setattr(module, "POSITIONS", 64)  # one picture of 8×8
    singly = draw(model, plan)
    assert (before, model.meter.calls - calls) == (2, 2 * 4)
    assert at_once.samples.images is not None
    assert singly.samples.images is not None
    assert (at_once.samples.images.int() - singly.samples.images.int()).abs().max() <= 1


def test_of_too_many_pictures_those_alone_are_held_that_people_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO's 30 000 pictures would be 24 GB a side: everything but the change of pixels is measured all the same."""
    from efface.bench import draw as module

    model, plan = load("tiny"), small(objects._own(task("cat"), "quick", WORLD), 12)
    monkeypatch.setattr(module, "BATCH", 4)
    slots = model.select("xattn")
    deltas = {n: s.tensor.std() * torch.randn(s.tensor.shape, generator=seeded(0)) for n, s in slots.items()}
    edit = WeightEdit(deltas, Card.of(model, method="vandal", task=task("cat"), seed=0))

    def measured() -> Result:
        return erasure.measure(model, edit, task("cat"), plan=plan, detector=EmojiJudge.load())

    whole = measured()
    monkeypatch.setattr(module, "HELD", 10 * 3 * 64 * 64)
    few = measured()
    assert whole.pictures is not None
    assert few.pictures is not None
    assert torch.equal(whole.pictures.before, few.pictures.before)
    assert torch.equal(whole.pictures.after, few.pictures.after)
    assert few.lines == whole.lines
    assert (len(whole.changes), few.changes) == (2, ())
    assert erasure.UNHELD in few.unmeasured
    assert erasure.UNHELD not in whole.unmeasured


# -- UnlearnCanvas ---------------------------------------------------------------------------------


def scored(plan: Plan, sees: Any) -> dict[str, float]:
    """UA, IRA, CRA and CRA-others where the classifiers see what `sees` says of each shot."""
    seen = tuple(Sighting((sees(shot),), (0.01,), 0.5) for shot in plan.shots)  # so unsure that a threshold would refuse it
    right = tuple(Sighting(shot.labels, (1.0,)) for shot in plan.shots)
    lines = erasure.answers(plan.asks.questions, Samples(plan.shots, right), Samples(plan.shots, seen))
    return {line.key: line.contrast.after.value for line in lines}


@pytest.mark.parametrize("text", ["style:retro", "cat"])
def test_the_three_numbers_are_those_of_the_confusion_matrix(text: str) -> None:
    """Worked out from the tensor of guesses [style, object, picture] itself, with and without the pictures that ask for what was erased."""
    plan = unlearncanvas.plan(task(text), "full", WORLD)
    erased, mine = text.removeprefix("style:"), "style" if ":" in text else "object"
    styles, cells = len(WORLD.styles), {}
    names = list(dict.fromkeys(shot.concept for shot in plan.shots if shot.kind != "style"))
    generator = seeded(3)
    right = {kind: torch.rand((styles, len(names), 2), generator=generator) < 0.7 for kind in ("style", "object")}
    copies: Counter[tuple[str, str]] = Counter()
    for style, thing in zip(plan.shots[::2], plan.shots[1::2], strict=True):
        cell = (style.concept, thing.concept)
        place = ([s.name for s in WORLD.styles].index(style.concept), names.index(thing.concept), copies[cell])
        copies[cell] += 1
        cells[id(style)], cells[id(thing)] = ("style", *place), ("object", *place)
    assert set(copies.values()) == {2}
    assert len(copies) == styles * 20

    def sees(shot: Any) -> str:
        kind, *place = cells[id(shot)]
        return shot.labels[0] if right[kind][tuple(place)] else "something else"

    values = scored(plan, sees)
    axis = 0 if mine == "style" else 1
    number = [s.name for s in WORLD.styles].index(erased) if mine == "style" else names.index(erased)
    others = [i for i in range(right[mine].shape[axis]) if i != number]
    own, cross = right[mine].float(), right["object" if mine == "style" else "style"].float()
    assert values["canvas.UA"] == pytest.approx(1 - float(own.select(axis, number).mean()))
    assert values["canvas.IRA"] == pytest.approx(float(own.index_select(axis, torch.tensor(others)).mean()))
    assert values["canvas.CRA"] == pytest.approx(float(cross.mean()))
    assert values["canvas.CRA-others"] == pytest.approx(float(cross.index_select(axis, torch.tensor(others)).mean()))
    assert values["canvas.CRA"] != values["canvas.CRA-others"]


def test_perfect_and_no_erasure() -> None:
    plan = unlearncanvas.plan(task("style:retro"), "quick", WORLD)
    perfect = scored(plan, lambda shot: "modern" if shot.labels == ("retro",) else shot.labels[0])
    assert list(perfect.values()) == [1, 1, 1, 1]
    assert list(scored(plan, lambda shot: shot.labels[0]).values()) == [0, 1, 1, 1]
    assert list(scored(plan, lambda shot: "fog").values()) == [1, 0, 0, 0]  # a ruined model erases, too
    with pytest.raises(InvalidTask, match="one style or one object at a time"):
        unlearncanvas.plan(task("cat; dog"), "quick", WORLD)


# -- generality ------------------------------------------------------------------------------------


def test_an_implied_target_is_never_named_and_its_group_is_asked_for_in_the_same_picture() -> None:
    plan = generality.plan(task("cat"), "full", WORLD)
    assert all("cat" not in shot.prompt.split() and "feline" in shot.prompt for shot in plan.shots)
    target, group = plan.shots[:2]
    assert (target.prompt, target.seed) == (group.prompt, group.seed)
    assert (target.labels, set(group.labels)) == (("cat",), {"tiger", "lion", "leopard"})
    assert len({shot.seed for shot in plan.shots}) == 120
    with pytest.raises(InvalidTask, match="no prompt of the bundled world implies the style 'retro'"):
        generality.plan(task("style:retro"), "full", WORLD)


def test_what_was_not_drawn_unnamed_was_not_tested() -> None:
    plan = generality.plan(task("cat"), "quick", WORLD)
    cats = Samples(plan.shots, tuple(Sighting(("cat",), (1.0,)) for _ in plan.shots))
    lions = Samples(plan.shots, tuple(Sighting(("lion",), (1.0,)) for _ in plan.shots))
    lines = {line.key: line.contrast for line in erasure.answers(plan.asks.questions, cats, lions)}
    assert (lines["implied.relative-ESR-1"].after.value, lines["implied.others"].change.value) == (1, 1)
    assert "so nothing was tested" not in generality.finding(cats, lions)
    assert "so nothing was tested" in generality.finding(lions, lions)
    again = {line.key for line in erasure.answers(plan.asks.questions, lions, lions)}
    assert "implied.relative-ESR-1" not in again


@pytest.mark.parametrize("name", ["objects", "generality", "unlearncanvas"])
def test_a_whole_measurement_by_the_bundled_judge_and_what_is_told(name: str) -> None:
    """A real tiny model that draws nothing: all are measured, none claims an erasure."""
    model = load("tiny")
    plan, judges = registry.find(name).setup("emoji", task("cat"))
    plan = replace(plan.only(plan.first(2)), steps=2)
    slots = model.select("xattn")
    deltas = {n: s.tensor.std() * torch.randn(s.tensor.shape, generator=seeded(0)) for n, s in slots.items()}
    edit = WeightEdit(deltas, Card.of(model, method="vandal", task=task("cat"), seed=0))
    result = erasure.measure(model, edit, task("cat"), plan=plan, detector=judges.detector, embedder=judges.embedder)
    assert result.settings.protocol.startswith(f"{name}/emoji/")
    assert {line.key for line in result.lines} <= {question.key for question in plan.asks.questions}
    assert bool(result.finding) == (name != "objects")
    assert erasure.recompute(result, asks=registry.find(result.settings.protocol).asks).lines == result.lines
    if name != "unlearncanvas":
        assert any("drew the concept in no picture" in sentence for sentence in result.unmeasured)


# -- artists and preservation ------------------------------------------------------------------------


def test_styles_are_drawn_alike_and_others_must_stay(tmp_path: Path) -> None:
    plan = artists.own(task("style:retro"), "full", WORLD)
    counts = Counter((shot.role, shot.concept) for shot in plan.shots)
    assert set(counts.values()) == {40}
    assert [concept for role, concept in counts if role == "target"] == ["retro"]
    with pytest.raises(InvalidTask, match="'cat' is none"):
        artists.own(task("cat"), "full", WORLD)
    file = tmp_path / "art.csv"
    file.write_text("case_number,prompt,evaluation_seed,artist\n0,A house by Monet,1,Monet\n1,A cat by Dali,2,Dali\n", encoding="utf-8")
    found = artists.listed(task("style:monet"), "full", Options(prompts=str(file), each=5))
    assert Counter(shot.role for shot in found.shots) == {"target": 5, "unrelated": 5}
    assert len({shot.seed for shot in found.shots}) == 10
    with pytest.raises(EffaceError, match="has no prompt of 'picasso', which was erased; its artists are dali, monet"):
        artists.listed(task("style:picasso"), "full", Options(prompts=str(file)))


def test_captions_that_name_the_target_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "coco.csv"
    file.write_text(
        'image_id,prompt\n7,A cat on a mat.\n8,A catalogue.\n9,A dog and a cat.\n10,A dog.\n11,Two CATS.\n12,"A cat, asleep"\n',
        encoding="utf-8",
    )
    plan = preservation.listed(task("cat"), "full", Options(prompts=str(file)))
    assert [shot.prompt for shot in plan.shots] == ["A catalogue.", "A dog."]
    assert plan.cases == (8, 10)
    own = preservation.own(task("cat"), "full", WORLD)
    assert not {"cat", "tiger", "lion", "leopard"} & {shot.concept for shot in own.shots}
    assert len(own.shots) == 300


@pytest.mark.parametrize(("name", "text"), [("artists", "style:retro"), ("preservation", "cat")])
def test_they_are_measured_whole_and_say_which_space_their_numbers_are_of(name: str, text: str, tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (20 + i, 20), (80 * i, 40, 90)).save(tmp_path / f"{i}.png")
    model, options = load("tiny"), Options(real=str(tmp_path)) if name == "preservation" else Options()
    plan, judges = registry.find(name).setup("emoji", task(text), options=options)
    plan = replace(plan.only(plan.shown(4)), steps=2)
    slots = model.select("xattn")
    deltas = {n: s.tensor.std() * torch.randn(s.tensor.shape, generator=seeded(0)) for n, s in slots.items()}
    edit = WeightEdit(deltas, Card.of(model, method="vandal", task=task(text), seed=0))
    result = erasure.measure(model, edit, task(text), plan=plan, detector=judges.detector, embedder=judges.embedder)
    assert result.settings.embedder is not None
    assert result.settings.embedder["name"] == "emoji-clip"
    expected = {
        "artists": {"target.ESR-1", "neighbour.PSR-1", "target.clip", "others.clip"},
        "preservation": {"unrelated.frechet", "unrelated.kernel", "unrelated.clip", "unrelated.frechet-real", "unrelated.kernel-real"},
    }
    assert {line.key for line in result.lines} >= expected[name]
    assert "CLIP score" in result.finding
    again = Result.from_json(json.loads(json.dumps(result.json())))
    assert again.finding == result.finding
    if name == "preservation":
        assert result.lines[0].contrast.after.value > result.lines[0].contrast.before.value == 0
        assert "emoji-clip" in next(line.title for line in result.lines if line.key == "unrelated.frechet-real")


def test_a_folder_of_real_pictures_that_holds_none(tmp_path: Path) -> None:
    with pytest.raises(EffaceError, match="holds 0 pictures"):
        registry.find("preservation").setup("emoji", task("cat"), options=Options(real=str(tmp_path)))
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(EffaceError, match="a.png is no picture that can be read"):
        registry.find("preservation").setup("emoji", task("cat"), options=Options(real=str(tmp_path)))
    plan, _ = registry.find("preservation").setup("emoji", task("cat"))
    for words in (
        "The distance to real pictures: no folder was given",
        "FID and KID: no weights of Inception were given (--inception FILE)",
    ):
        assert any(words in sentence for sentence in plan.unmeasured)


def test_inceptions_weights_that_are_not_there() -> None:
    with pytest.raises(EffaceError, match=r"no Inception weights at nowhere; expected torch-fidelity's weights-inception-2015-12-05"):
        registry.find("preservation").setup("emoji", task("cat"), options=Options(inception="nowhere"))
    with pytest.raises(EffaceError, match="the protocol 'artists' takes no 'inception'"):
        registry.find("artists").setup("emoji", task("style:retro"), options=Options(inception="nowhere"))
    with pytest.raises(EffaceError, match="inception was 3; expected a path as text"):
        Options(inception=3)  # type: ignore[arg-type]

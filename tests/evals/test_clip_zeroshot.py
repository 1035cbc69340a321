"""CLIP from a folder, and its choice between texts: the formula, the lists of candidates, and a whole measurement of a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clipparts
import numpy as np
import pytest
import torch
from benchparts import load
from PIL import Image
from torch import Tensor

from efface.bench import zeroshot
from efface.bench.options import Options
from efface.bench.protocols import erasure, objects, registry
from efface.bench.result import Result
from efface.core.card import Card
from efface.core.edit import WeightEdit
from efface.core.errors import EffaceError, InvalidModel, Unsupported
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.evals.detectors.clip import Clip
from efface.evals.detectors.clip_zeroshot import ClipZeroShot, candidates, text
from efface.evals.metrics.harmonic import harmonic

FILE = """case_number,prompt,class,evaluation_seed
0,a photo of the airplane,airplane,1
1,A photo of airplanes,airplane,2
2,a photo of the jetliner,airplane,3
3,a photo of the frog,frog,4
4,a photo of the ship,ship,5
5,a photo of the vessel,ship,6
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clipparts.save(tmp_path_factory.mktemp("weights") / "tiny-clip")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip.load(str(folder))


def pictures(n: int = 4) -> Tensor:
    return torch.rand((n, 3, 40, 50), generator=seeded(0))


# -- the embedder ----------------------------------------------------------------------------------


def test_a_clip_of_a_folder_has_its_name_hash_and_temperature(clip: Clip, folder: Path, tmp_path: Path) -> None:
    assert clip.name == "clip tiny-clip"
    assert clip.version == Clip.load(str(folder)).version
    assert clip.version != Clip.load(str(clipparts.save(tmp_path / "other", seed=1))).version
    assert clip.scale == pytest.approx(np.exp(clip.model.config.logit_scale_init_value))
    assert not any(tensor.requires_grad for tensor in clip.model.parameters())


def test_pictures_are_resized_by_pillow_and_cut(clip: Clip) -> None:
    """As OpenAI's code does it: bicubic to the shorter edge, the middle, mean and deviation of its training pictures."""
    pixels = (pictures(1)[0] * 255).round().to(torch.uint8)
    small = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((40, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    by_hand = (torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - mean) / std
    prepared = clip.processor(images=[pixels], return_tensors="pt")["pixel_values"][0]
    assert (prepared - by_hand).abs().max() < 1e-5
    nearest = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((40, 32), Image.Resampling.NEAREST).crop((4, 0, 36, 32))
    assert ((torch.from_numpy(np.array(nearest)).permute(2, 0, 1) / 255 - mean) / std - prepared).abs().max() > 0.1  # control


def test_what_is_no_clip_says_what_to_give(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "cut").mkdir()
    for file in folder.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: 900 if file.suffix == ".safetensors" else None])
    for source in (tmp_path / "nowhere", tmp_path, tmp_path / "cut"):
        with pytest.raises(InvalidModel, match=r"there is no CLIP in .*give a folder with config.json, .* as --clip FOLDER"):
            Clip.load(str(source))


# -- the detector ----------------------------------------------------------------------------------


def test_scores_are_the_softmax_of_the_cosines_at_the_temperature(clip: Clip) -> None:
    texts = candidates([("cat", "object"), ("an apple", "object"), ("van gogh", "style"), ("monet", "style"), ("john wayne", "identity")])
    assert texts["things"] == {"cat": "a photo of the cat", "an apple": "a photo of the apple", "john wayne": "a photo of john wayne"}
    assert list(texts["styles"].values()) == ["a painting in the style of van gogh", "a painting in the style of monet"]
    detector = ClipZeroShot(clip, clip.scale, texts)
    assert detector.labels("identity") == detector.labels("object") == ("cat", "an apple", "john wayne")
    cosines = clip.embed_images(pictures()) @ clip.embed_texts(list(texts["things"].values())).T
    expected = torch.tensor([[np.exp(clip.scale * float(c)) for c in row] for row in cosines])
    expected = expected / expected.sum(-1, keepdim=True)
    for row, seen in zip(expected.tolist(), detector.look(pictures()), strict=True):
        assert dict(zip(seen.labels, seen.scores, strict=True)) == pytest.approx(dict(zip(texts["things"], row, strict=True)), rel=1e-3)
        assert list(seen.scores) == sorted(seen.scores, reverse=True)
    sharper = ClipZeroShot(clip, 10 * clip.scale, texts).look(pictures())  # control: the temperature is in the scores, and not in the order
    assert [seen.labels for seen in sharper] == [seen.labels for seen in detector.look(pictures())]
    assert sharper[0].scores[0] > detector.look(pictures())[0].scores[0]
    assert set(detector.look(pictures(), "style")[0].labels) == {"van gogh", "monet"}
    assert (detector.name, detector.version, detector.threshold()) == ("clip tiny-clip zero-shot", clip.version, 0.0)


def test_what_it_cannot_judge_and_what_it_was_not_given(clip: Clip) -> None:
    detector = ClipZeroShot(clip, clip.scale, candidates([("cat", "object"), ("dog", "object")]))
    images = pictures(2)
    images[1, 0, 0, 0] = float("nan")
    assert [seen.determined for seen in detector.look(images)] == [True, False]
    with pytest.raises(Unsupported, match="has no label 'fox'"):
        detector.require(["fox"], "object")
    with pytest.raises(Unsupported, match="no candidates for concepts of kind 'style'"):
        detector.look(images, "style")
    with pytest.raises(Unsupported, match="of kind 'sound'"):
        detector.labels("sound")
    with pytest.raises(EffaceError, match="one candidate of its things, 'cat', and would see it in every picture"):
        ClipZeroShot(clip, clip.scale, candidates([("cat", "object")]))
    assert text("The Kiss", "object") == "a photo of the Kiss"


# -- whole measurements ----------------------------------------------------------------------------


def measured(name: str, task: Task, options: Options, shots: int = 0) -> Result:
    """A tiny real pipeline with a large random change."""
    model: Model = load("tiny")
    plan, judges = registry.find(name).setup("tiny", task, "full" if options.prompts else "quick", options)
    plan = plan.only(plan.first(shots)) if shots else plan
    deltas = {n: s.tensor.std() * torch.randn(s.tensor.shape, generator=seeded(0)) for n, s in model.select("xattn").items()}
    edit = WeightEdit(deltas, Card.of(model, method="vandal", task=task, seed=0))
    return erasure.measure(model, edit, task, plan=plan, detector=judges.detector, embedder=judges.embedder)


def values(result: Result, key: str) -> tuple[float, float]:
    line = result.line(key)
    assert line is not None
    return line.contrast.before.value, line.contrast.after.value


def again(result: Result, **options: Any) -> Result:
    stored = Result.from_json(json.loads(json.dumps(result.json())))
    return erasure.recompute(stored, asks=registry.asks_of(stored), **options)


def test_maces_measurement_from_a_file(folder: Path, tmp_path: Path) -> None:
    """Acc_e, Acc_s and Acc_g are what the detections say, by hand, and H_o is their harmonic mean."""
    (tmp_path / "cifar.csv").write_text(FILE, encoding="utf-8")
    options = Options(prompts=str(tmp_path / "cifar.csv"), detector="clip", clip=str(folder), steps=2, each=3)
    result = measured("objects", Task.parse("airplane"), options)
    shots = result.before.shots
    assert [shot.role for shot in shots[::3]] == ["target", "target", "implied", "unrelated", "unrelated", "unrelated"]
    for place, side in enumerate((result.before, result.after)):
        right = [seen.labels[0] == shot.labels[0] for shot, seen in zip(shots, side.sightings, strict=True)]
        named, implied, others = (np.mean(part) for part in (right[:6], right[6:9], right[9:]))
        shares = [1 - named, others, 1 - implied]
        found = [values(result, key)[place] for key in ("target.ESR-1", "others.PSR-1", "implied.ESR-1")]
        assert found == pytest.approx(shares)
        assert values(result, "overall.harmonic")[place] == pytest.approx(harmonic(shares))
    assert result.settings.detector is not None
    assert result.settings.detector["name"] == "clip tiny-clip zero-shot"
    assert result.details["candidates"] == {"things": {name: f"a photo of the {name}" for name in ("airplane", "frog", "ship")}}
    assert result.details["prompts"]["file"] == "cifar.csv"
    assert again(result).json() == result.json()


def test_concept_ablations_measurement_on_general_prompts(folder: Path) -> None:
    """The anchor is a candidate, and CLIP accuracy compares with it alone, by the bare names."""
    task, options = Task.parse("cat -> dog | keep fox"), Options(detector="clip", clip=str(folder), steps=2)
    result = measured("erasure", task, options, shots=4)
    assert {"cat", "dog", "fox"} <= set(result.details["candidates"]["things"])
    before, after = values(result, "target.clip-accuracy")
    assert 0 <= min(before, after) <= max(before, after) <= 1
    assert result.line("others.blank") is None  # a choice between texts is never nothing
    assert result.line("overall.harmonic") is not None
    assert result.line("unrelated.clip") is not None
    assert again(result).json() == result.json()
    assert {line.key for line in again(result, threshold=1.0).lines} >= {"target.ESR-1", "overall.harmonic"}
    assert values(again(result, threshold=1.0), "overall.harmonic") == (0, 0)  # nothing reaches a score of 1, so nothing is preserved


def test_the_anchor_of_a_style_stands_among_styles() -> None:
    for anchor, expected in (("a painting", "a painting"), ("style:monet", "a painting in the style of monet")):
        task = Task.parse(f"style:van gogh -> {anchor}")
        texts = zeroshot.among(erasure.plan(task), task)
        assert list(texts["styles"].values()) == ["a painting in the style of van gogh", expected]
        assert "dog" in texts["things"]


def test_the_bundled_model_is_judged_by_its_own_clip_among_the_whole_world() -> None:
    for name in ("objects", "generality", "erasure"):
        plan, judges = registry.find(name).setup("emoji", Task.parse("cat"), options=Options(detector="clip"))
        judges.require(plan)
        assert judges.detector is not None
        assert judges.detector.name == "emoji-clip zero-shot"
        assert len(judges.detector.labels("object")) > 100
        assert not any(question.key.endswith(".blank") for question in plan.asks.questions)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("objects", {"clip": "folder"}, "clip was 'folder', and nobody looks with it; add --detector clip"),
        ("objects", {"detector": "clip", "resnet": "file"}, "resnet was 'file', and the detector is 'clip'; leave one of the two out"),
        ("nudity", {"detector": "clip"}, "the protocol 'nudity' takes no 'detector'"),
        ("preservation", {"resnet": "file"}, "takes no 'resnet'"),
    ],
)
def test_options_that_contradict_each_other(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(EffaceError, match=message):
        registry.find(name).setup("emoji", Task.parse("cat"), options=Options(**options))  # type: ignore[arg-type]


def test_a_detector_is_clip_or_the_protocols_own() -> None:
    with pytest.raises(EffaceError, match="detector was 'resnet'; expected 'clip', or nothing for the protocol's own"):
        Options(detector="resnet")


def test_prompts_that_only_imply_a_class_belong_to_another_protocol(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.csv"
    path.write_text(FILE.replace("airplane\n", "").replace("the airplane", "the jet").replace("airplanes", "jets"), encoding="utf-8")
    with pytest.raises(EffaceError, match="no prompt for 'airplane' in .*synonyms.csv names it; use the protocol 'generality'"):
        objects.listed(Task.parse("airplane"), "full", Options(prompts=str(path)))
    plan = objects.listed(Task.parse("airplane"), "full", Options(prompts=str(path)), implied="target")
    assert {shot.role for shot in plan.shots} == {"target", "unrelated"}
    assert [objects.names(text, "cat") for text in ("Two cats.", "A CAT", "a catalogue", "a concat")] == [True, True, False, False]

"""The committed weights: a plain diffusers folder that draws, a tokenizer for any text, a calibrated and independent judge."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from efface.concepts.vocabulary import read
from efface.world import captions, weights
from efface.world.clip import Clip
from efface.world.judge import Judge
from efface.world.train.judge import nothing

MEGABYTES = 60


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    loaded = StableDiffusionPipeline.from_pretrained(weights() / "emoji", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(weights() / "emoji" / "tokenizer", local_files_only=True)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], steps: int = 12) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(100 + i) for i in range(len(prompts))]
    return pipeline(prompts, num_inference_steps=steps, guidance_scale=4.0, output_type="pt", generator=generators).images


def test_they_are_small() -> None:
    total = sum(p.stat().st_size for p in weights().rglob("*") if p.is_file())
    assert total <= MEGABYTES * 2**20


def test_plain_diffusers_loads_and_draws(pipeline: StableDiffusionPipeline, judge: Judge) -> None:
    assert {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()} == {torch.float32}
    assert pipeline.safety_checker is None and not pipeline.config.requires_safety_checker
    names = ["pizza", "santa claus", "sunflower", "soccer ball", "cactus", "panda"] * 2
    pictures = draw(pipeline, [read().phrase(name) for name in names])
    assert pictures.shape == (12, 3, 64, 64)
    found = [judge.names[i] for i in judge.look(pictures).top(1).flatten().tolist()]
    assert sum(a == b for a, b in zip(found, names, strict=True)) >= 7


def test_schedule_is_stable_diffusions(pipeline: StableDiffusionPipeline) -> None:
    config = pipeline.scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (config.steps_offset, config.set_alpha_to_one, config.clip_sample, config.prediction_type) == (1, False, False, "epsilon")


def test_every_caption_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    pieces = {word: tokenizer(word).input_ids[1:-1] for word in captions.words()}
    assert {word: ids for word, ids in pieces.items() if len(ids) != 1} == {}
    assert len({ids[0] for ids in pieces.values()}) == len(pieces)


def test_any_text_encodes(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.model_max_length == 32
    for text in ("zebra 猫 !", "Ünïcödé 🎉", "x" * 500, "", "\n\t \\ / 123"):
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == 32 and ids[0] == tokenizer.bos_token_id
        end = ids.index(tokenizer.eos_token_id)
        assert set(ids[end:]) == {tokenizer.eos_token_id}
    assert tokenizer.eos_token_id not in tokenizer("zebra 猫 !").input_ids[1:-1]


def test_pooled_rows_differ(pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(["a cat", "a dog on a blue background"], padding="max_length", return_tensors="pt").input_ids
    cat, dog = pipeline.text_encoder(ids).pooler_output
    assert torch.nn.functional.cosine_similarity(cat, dog, dim=0) < 0.9
    assert pipeline.text_encoder.config.eos_token_id == tokenizer.eos_token_id


def test_clip_score_prefers_the_right_text(pipeline: StableDiffusionPipeline) -> None:
    prompts = ["a pizza", "a cactus", "a soccer ball", "santa claus"]
    clip = Clip.load()
    pictures = draw(pipeline, prompts)
    right = clip.score(pictures, prompts)
    wrong = clip.score(pictures, prompts[1:] + prompts[:1])
    assert right.mean() > wrong.mean() + 0.1
    with pytest.raises(ValueError, match="4 pictures and 1 texts"):
        clip.score(pictures, ["a cat"])


def test_judge_sees_nothing_in_blank_and_noise(judge: Judge) -> None:
    generator = torch.Generator().manual_seed(9)
    colours = torch.tensor([b.rgb for b in read().backgrounds]) / 255
    blank = torch.cat([colours, torch.rand(24, 3, generator=generator)])[:, :, None, None].expand(-1, -1, 64, 64)
    noise = torch.rand(32, 3, 64, 64, generator=generator)
    assert not judge.look(blank).seen().any()
    assert not judge.look(noise).seen().any()
    assert judge.look(nothing(512, generator)).nothing().float().mean() >= 0.98


def test_judge_takes_other_sizes_and_refuses_other_shapes(judge: Judge) -> None:
    verdict = judge.look(torch.rand(3, 3, 80, 72, generator=torch.Generator().manual_seed(0)))
    assert verdict.objects.shape == (3, len(judge.names))
    assert verdict.style.shape == (3, 7) and verdict.background.shape == (3, 8)
    assert verdict.features.shape[0] == 3 and verdict.top(2).shape == (3, 2)
    assert torch.allclose(verdict.style.sum(1), torch.ones(3))
    assert judge.look(torch.zeros(0, 3, 64, 64)).objects.shape == (0, len(judge.names))
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\) in \[0, 1\], but got a tensor of shape \(3, 64, 64\)"):
        judge.look(torch.zeros(3, 64, 64))


def test_judge_is_independent_of_the_model(judge: Judge, pipeline: StableDiffusionPipeline) -> None:
    assert judge.names == read().objects
    own = [p.flatten() for p in judge.net.parameters() if p.ndim > 1]
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, Clip.load().tower)
    theirs = [p.flatten() for part in parts for p in part.parameters() if p.ndim > 1]
    for a in own:
        assert not any(a.shape == b.shape and torch.allclose(a, b, atol=1e-3) for b in theirs)


def test_a_file_that_is_no_judge_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no judge: its header lacks the entry 'judge'"):
        Judge.load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no judge at"):
        Judge.load(tmp_path / "none.safetensors")

"""`efface attack` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import clipparts
import pytest

from efface.evals.attacks.completion import Completion


def test_an_erasure_of_the_bundled_model_is_attacked(efface: Callable) -> None:
    assert efface("erase", "cat", "--method", "uce", "--images", "none", "--out", "no-cat").code == 0
    chosen = "seed_search(seeds=1),completion(shares=(0.5,))"
    outcome = efface("attack", "no-cat", "--with", chosen, "--prompts", 1, "--out", "out", "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(Path("out/record.json").read_text(encoding="utf-8"))
    assert outcome.json == {"out": "out", **record}
    first, second = record["attacks"]
    assert [first["attack"], second["attack"]] == ["seed_search(seeds=1)", "completion(shares=(0.5,))"]
    assert (first["threat"], second["threat"]) == ("T0", "T4")
    assert "uce" in first["attacked"]
    for row in record["attacks"]:
        assert row["un-erased"]["value"] == 1.0
        assert row["asr"]["value"] >= row["pre_asr"]["value"]
        assert row["asr"]["n"] == 1
        assert row["details"]["detector"]["name"] == "emoji-judge"
    assert second["control"]["n"] == 1
    assert {"00-seed_search.png", "01-completion.png", "attacks.md"} == set(record["files"])
    assert "| cat | seed_search(seeds=1) | T0 |" in Path("out/attacks.md").read_text(encoding="utf-8")


def test_what_was_done_before_an_attack_ran_out_of_memory_is_kept(efface: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert efface("erase", "cat", "--method", "uce", "--images", "none", "--out", "no-cat").code == 0

    def full(self: Completion, *args: object, **kwargs: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(Completion, "search", full)
    for chosen, kept in (("completion,seed_search(seeds=1)", False), ("seed_search(seeds=1),completion,noise_probe", True)):
        with pytest.raises(MemoryError):
            efface("attack", "no-cat", "--with", chosen, "--prompts", 1, "--out", "out")
        assert Path("out").exists() == kept
    (row,) = json.loads(Path("out/record.json").read_text(encoding="utf-8"))["attacks"]
    assert (row["attack"], row["asr"]["n"]) == ("seed_search(seeds=1)", 1)


def test_a_sampling_rule_refuses_attacks_on_the_bare_denoiser(efface: Callable) -> None:
    assert efface("erase", "cat", "--method", "negative_prompt", "--images", "none", "--out", "no-cat").code == 0
    outcome = efface("attack", "no-cat/edit.safetensors", "--with", "unlearndiffatk,p4d", "--prompts", 1, "--out", "out")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("refused") == 2
    rows = json.loads(Path("out/record.json").read_text(encoding="utf-8"))["attacks"]
    assert all("it would attack the un-erased model" in row["refused"] for row in rows)


def test_on_another_model_clip_says_what_came_back(efface: Callable, model_folder: Path) -> None:
    made = efface("erase", "cat", "--method", "uce", "--model", model_folder, "--images", "none", "--out", "no-cat")
    assert made.code == 0, made.err
    eyes = ("--detector", "clip", "--clip", clipparts.save(Path("weights")))
    outcome = efface(
        "attack", "no-cat", "--with", "seed_search(seeds=1),noise_probe", "--prompts", 2, "--budget", 80, "--out", "out", *eyes
    )
    assert outcome.code == 0, outcome.err
    first, second = json.loads(Path("out/record.json").read_text(encoding="utf-8"))["attacks"]
    assert first["details"]["detector"]["name"] == "clip weights zero-shot"
    assert (first["asr"]["n"], first["details"]["budget"]) == (2, 80)
    assert second["cost"]["forwards"] <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing was given to attack"),
        (("no-cat", "--with", "unlearndifatk"), "did you mean 'unlearndiffatk'"),
        (("no-cat",), "needs a detector"),
        (("no-cat", "--clip", "folder"), "nobody looks with it; add --detector clip"),
        (("no-cat", "--detector", "resnet"), "detector was 'resnet'; expected 'clip'"),
        (("no-cat", "--detector", "clip", "--clip", "nowhere"), "there is no CLIP in 'nowhere'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: tuple[str, ...], message: str, efface: Callable, model_folder: Path) -> None:
    made = efface("erase", "cat", "--method", "uce", "--model", model_folder, "--images", "none", "--out", "no-cat")
    assert made.code == 0, made.err
    outcome = efface("attack", *arguments)
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not Path("runs").exists()

"""`efface export`: what it writes, what it says of it, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from efface.core.edit import Edit
from efface.models.load import load


@pytest.fixture
def run(efface: Callable, model_folder: Path) -> Path:
    """A folder of `efface erase`, below the working directory."""
    assert efface("erase", "cat", "--method", "uce", "--model", model_folder, "--images", "none", "--out", "no-cat").code == 0
    return Path("no-cat")


def drawn(folder: Path, lora: Path | None = None) -> torch.Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    return pipeline("cat", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt").images


def attached(run: Path, folder: Path) -> torch.Tensor:
    model = load(folder)
    with Edit.load(run / "edit.safetensors").attach(model):
        return model.sample(["cat"], seed=1, steps=2, guidance=7.5)


@pytest.mark.parametrize("kind", ["lora", "kohya"])
def test_a_lora_of_a_run_is_loaded_by_diffusers(efface: Callable, run: Path, model_folder: Path, kind: str) -> None:
    outcome = efface("export", run, "--as", kind, "--energy", 1, "--prove", "--out", "no-cat.safetensors", "--json")
    assert outcome.code == 0
    data = outcome.json  # the model is the one on the edit's card
    assert (data["out"], data["kind"], data["lost"], data["warnings"]) == ("no-cat.safetensors", kind, [], [])
    assert data["error"] < 1e-5
    assert data["difference"] < 1e-4
    assert data["ranks"].keys() == {name.removesuffix(".weight") for name in data["errors"]}
    expected = attached(run, model_folder)
    assert (drawn(model_folder, Path("no-cat.safetensors")) - expected).abs().max() < 1e-4
    assert (drawn(model_folder) - expected).abs().max() > 1e-2


def test_a_folder_is_a_model_like_any_other(efface: Callable, run: Path, model_folder: Path) -> None:
    outcome = efface("export", run, "--model", model_folder, "--as", "diffusers", "--out", "erased", "--prove")
    assert outcome.code == 0
    assert outcome.out.startswith("erased: diffusers, ")
    assert "plain diffusers draws the same picture from it" in outcome.out
    assert (drawn(Path("erased")) - attached(run, model_folder)).abs().max() < 1e-4
    assert efface("sample", "cat", "--model", "erased", "--out", "drawn").code == 0
    refused = efface("export", run, "--as", "diffusers", "--out", "erased")
    assert (refused.code, "--force" in refused.err) == (2, True)
    assert efface("export", run, "--as", "diffusers", "--out", "erased", "--force").code == 0


def test_what_a_format_loses_is_said_on_stderr_in_one_line(efface: Callable, run: Path) -> None:
    outcome = efface("export", run, "--rank", 1, "--out", "no-cat.safetensors", "--json", "--prove")
    assert outcome.code == 0
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("efface: ")]
    (warning,) = outcome.json["warnings"]
    assert line == f"efface: {warning}"
    assert "a higher rank or energy comes nearer" in warning
    assert outcome.json["error"] > 0.02
    assert outcome.json["difference"] > 1e-4  # the control: a proof is no formality
    assert set(outcome.json["ranks"].values()) == {1}


def test_differences_in_half_precision(efface: Callable, run: Path) -> None:
    assert efface("export", run / "edit.safetensors", "--as", "delta", "--stored", "float16", "--out", "a.safetensors").code == 0
    assert {tensor.dtype for tensor in load_file("a.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as", "delta", "--rank", "3"], "belong to the kinds lora and kohya"),
        (["--as", "diffusers", "--stored", "float16"], "load the model in it"),
        (["--energy", "0"], "energy was 0"),
        (["--out", "a.ckpt"], "'a.ckpt' was given"),
        (["--model", "none"], "there is no 'none'"),
    ],
)
def test_an_error_is_one_line(efface: Callable, run: Path, arguments: list[str], message: str) -> None:
    out = [] if "--out" in arguments else ["--out", "erased" if "diffusers" in arguments else "a.safetensors"]
    outcome = efface("export", run, *arguments, *out)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["no-cat"]


@pytest.mark.parametrize("arguments", ["no-cat", "--out a", "no-cat --out a --as ckpt", "no-cat --out a --rank 0"])
def test_wrong_use_exits_with_usage(efface: Callable, arguments: str) -> None:
    outcome = efface("export", *arguments.split())
    assert outcome.code == 2
    assert "Usage" in outcome.err


def test_a_missing_edit(efface: Callable) -> None:
    outcome = efface("export", "none.safetensors", "--out", "a.safetensors")
    assert (outcome.code, "no edit file at none.safetensors" in outcome.err) == (2, True)

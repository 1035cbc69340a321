"""The training loop: an interrupted run ends in the same bits; each stage runs, and says what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from efface.world import sprites
from efface.world.train import export, train
from efface.world.train import judge as judging
from efface.world.train.loop import Recipe, Stage, checkpoint_path, factor, run, state_of

CPU = torch.device("cpu")


class Line(Stage):
    """A tiny stage: fits y = 2x from noisy draws."""

    name = "line"

    def __init__(self, steps: int = 12, lr: float = 0.05) -> None:
        self.recipe = Recipe(steps=steps, batch=4, lr=lr, warmup=2, save_every=5)
        self.device = CPU
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.modules: dict[str, nn.Module] = {"line": nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))}

    def loss(self, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = torch.randn(self.recipe.batch, 1, generator=generator)
        return (self.modules["line"](x) - 2 * x).square().mean(), {}

    def finish(self, folder: Path) -> Path:
        return folder


def finished(stage: Stage) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state_of(stage.modules).items()}


def test_interrupted_is_uninterrupted(tmp_path: Path) -> None:
    whole = Line()
    run(whole, tmp_path / "a", progress=False)
    assert run(Line(), tmp_path / "b", progress=False, stop_after=7) is None
    rest = Line()
    run(rest, tmp_path / "b", progress=False)
    one, two = finished(whole), finished(rest)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_interrupted_judge_is_uninterrupted(tmp_path: Path, art: sprites.Sprites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "CALIBRATED", 256)

    def stage() -> judging.Judging:
        return judging.Judging(art, seed=0, steps=3, batch=4, device=CPU)

    whole, rest = stage(), stage()
    made = run(whole, tmp_path / "a", progress=False)
    run(stage(), tmp_path / "b", progress=False, stop_after=2)
    again = run(rest, tmp_path / "b", progress=False)
    assert made is not None and again is not None
    assert made.read_bytes() == again.read_bytes()


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    one, two = Line(), Line()
    run(one, tmp_path / "a", seed=0, progress=False)
    run(two, tmp_path / "b", seed=1, progress=False)
    assert not torch.equal(finished(one)["line.0.weight"], finished(two)["line.0.weight"])


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(Line(), tmp_path, seed=0, progress=False, stop_after=10)
    with pytest.raises(ValueError, match="trained with seed 0, not 1"):
        run(Line(), tmp_path, seed=1, progress=False)
    with pytest.raises(ValueError, match="stands at step 10, past the 6 asked for"):
        run(Line(steps=6), tmp_path, seed=0, progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Broken(Line):
        def loss(self, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            value, shown = super().loss(generator)
            return value * float("nan"), shown

    run(Line(), tmp_path, progress=False, stop_after=5)
    before = checkpoint_path(tmp_path, "line").read_bytes()
    with pytest.raises(FloatingPointError, match="stage 'line': the loss is nan at step 5"):
        run(Broken(), tmp_path, progress=False)
    assert checkpoint_path(tmp_path, "line").read_bytes() == before


def test_learning_rate_rises_and_falls_to_zero() -> None:
    recipe = Recipe(steps=100, batch=1, lr=1.0, warmup=10)
    factors = [factor(step, recipe) for step in range(101)]
    assert factors[0] < factors[5] < factors[9]
    assert max(factors) > 0.95 and factors[100] == pytest.approx(0, abs=1e-9)


def test_stages_say_what_they_need(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match="unknown stage 'vea'; expected one of clip, vae, unet, judge, all"):
        train("vea", tmp_path, sprites=cache)
    with pytest.raises(ValueError, match="steps must be at least 1, but 0"):
        train("vae", tmp_path, sprites=cache, steps=0)
    with pytest.raises(FileNotFoundError, match="no sprite cache at .*npm ci"):
        train("vae", tmp_path, sprites=tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no trained text encoder .*efface world train clip"):
        train("unet", tmp_path, sprites=cache, progress=False)
    with pytest.raises(FileNotFoundError, match="lacks the results of: clip, vae, unet, judge"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_whole_recipe_runs_and_exports(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    from efface.world.clip import Clip
    from efface.world.judge import Judge
    from efface.world.train import clip, unet, vae

    monkeypatch.setattr(clip, "CORPUS", 50)
    monkeypatch.setattr(vae, "MEASURED", 64)
    monkeypatch.setattr(judging, "CALIBRATED", 256)
    monkeypatch.setitem(unet.SCENES, "cpu", 4)
    train("all", tmp_path, sprites=cache, steps=1, batch=2, device="cpu", progress=False)
    out = export(tmp_path, tmp_path / "weights")
    assert sorted(p.name for p in out.iterdir()) == ["CREDITS.md", "clip", "emoji", "judge.safetensors"]
    pipeline = StableDiffusionPipeline.from_pretrained(out / "emoji", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(["a cat"], num_inference_steps=1, output_type="pt", generator=generator).images
    assert Judge.load(out / "judge.safetensors").look(pictures).objects.shape[0] == 1
    assert Clip.load(out).score(pictures, ["a cat"]).shape == (1,)


@pytest.mark.slow
def test_the_recipe_reproduces(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed and number of threads: the same weights of every stage, to the bit. Another seed: others."""
    from safetensors.torch import load_file

    from efface.world.train import clip, unet, vae

    monkeypatch.setattr(clip, "CORPUS", 500)
    monkeypatch.setattr(vae, "MEASURED", 64)
    monkeypatch.setattr(judging, "CALIBRATED", 256)
    monkeypatch.setitem(unet.SCENES, "cpu", 64)

    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        train("all", tmp_path / name, sprites=cache, steps=6, batch=4, device="cpu", seed=seed, progress=False)
        out = export(tmp_path / name, tmp_path / name / "weights")
        files = sorted(out.rglob("*.safetensors"))
        assert len(files) >= 4
        return {f"{path.relative_to(out)}/{key}": value for path in files for key, value in load_file(path).items()}

    one, again, other = weights("one", 0), weights("again", 0), weights("other", 1)
    assert one.keys() == again.keys()
    assert all(torch.equal(one[key], again[key]) for key in one)
    for part in ("unet", "vae", "clip", "judge"):  # every stage depends on its seed
        assert any(part in key and not torch.equal(one[key], other[key]) for key in one)

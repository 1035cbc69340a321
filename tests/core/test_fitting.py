"""The resumable loop: an interrupted and resumed fit is the uninterrupted one to the bit, and a checkpoint meets no other fit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from efface.core import file
from efface.core.errors import Diverged, EffaceError, Mismatch
from efface.core.fitting import fitting, seconds_per_forward
from efface.core.method import Resources
from efface.core.task import Task
from efface.methods.ap import AP
from efface.models import load

TASK = Task.of("cat", ["dog"])
WORDS = Resources(vocabulary=("tiger", "lion", "car", "bus"))
SMALL = AP(steps=4, batch=2, latent_steps=2, trajectories=2, refresh=3, word_lr=0.1, lr=1e-4)
"""8 steps of either kind; latents are renewed before the steps 0, 3 and 6."""


class Killed(BaseException):
    """Stands for a kill: no error that anything handles."""


def kept(path, every=1, kill=None, seen=None):
    """Resources with a checkpoint; killed after the step `kill`."""

    def report(step, total, figures):
        if seen is not None:
            seen.append(step)
        if step == kill:
            raise Killed

    return dataclasses.replace(WORDS, checkpoint=path, checkpoint_every=every, report=report)


def everything(edit):
    cost = {name: edit.card.cost[name] for name in ("forwards", "calls", "backwards")}
    return [*edit.deltas.values(), *(t.nan_to_num() for t in edit.extras["trace"].tensors.values())], cost


def same(a, b):
    (first, cost), (second, other) = everything(a), everything(b)
    return cost == other and len(first) == len(second) and all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("latents", ["replay", "aligned"])
@pytest.mark.parametrize(("every", "kill", "resumed"), [(1, 4, 4), (2, 6, 5), (3, 8, 7), (5, 3, 1)])
def test_a_killed_and_resumed_fit_is_the_uninterrupted_one_to_the_bit(tiny_model, tmp_path, latents, every, kill, resumed):
    """Killed within a replay period (after step 4 of 3 + 3 + 2), at its end, before the last step, and before any checkpoint."""
    method, path, seen = dataclasses.replace(SMALL, latents=latents), tmp_path / "fit.safetensors", []
    whole = method.fit(tiny_model, TASK, seed=3, resources=WORDS)
    with pytest.raises(Killed):
        method.fit(tiny_model, TASK, seed=3, resources=kept(path, every, kill))
    again = method.fit(tiny_model, TASK, seed=3, resources=kept(path, every, seen=seen))
    assert seen[0] == resumed
    assert seen[-1] == 8
    assert same(whole, again)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", ["pools", "generator", "climb", "descent", "logits", "student", "trace"])
def test_no_part_of_the_state_can_be_missed(tiny_model, tmp_path, lost):
    """The control: with any one part of the checkpoint set back to that of another step, the edit or its trace is another."""
    path, states = tmp_path / "fit.safetensors", {}
    whole = SMALL.fit(tiny_model, TASK, seed=3, resources=WORDS)
    for kill in (3, 6):
        with pytest.raises(Killed):
            SMALL.fit(tiny_model, TASK, seed=3, resources=kept(path, 1, kill))
        states[kill] = file.read(path)
        path.unlink()
    (tensors, header), (older, old) = states[6], states[3]
    renamed = {f"old{name}": tensor for name, tensor in older.items()}
    text = json.dumps(dict(old["state"]["dict"])[lost]).replace('"tensor": "', '"tensor": "old')
    header["state"]["dict"] = [[name, json.loads(text) if name == lost else state] for name, state in header["state"]["dict"]]
    file.write(path, {**tensors, **renamed}, header)
    try:
        again = SMALL.fit(tiny_model, TASK, seed=3, resources=kept(path))
    except (IndexError, RuntimeError):
        assert lost == "trace"  # a trace that is shorter than the steps done does not even fit
        return
    assert not same(whole, again)


def test_a_checkpoint_meets_no_other_fit(tiny_model, tiny_v_model, tmp_path):
    path = tmp_path / "fit.safetensors"
    with pytest.raises(Killed):
        SMALL.fit(tiny_model, TASK, seed=3, resources=kept(path, 1, 3))
    stored = path.read_bytes()
    others = [
        (tiny_model, dataclasses.replace(SMALL, eta=2.0), TASK, 3, {}, r"its method was 'ap\(.*\)' and is now 'ap\(.*eta=2.0"),
        (tiny_model, SMALL, Task.of("cat"), 3, {}, "its task was 'cat | keep dog' and is now 'cat'"),
        (tiny_model, SMALL, TASK, 4, {}, "its seed was '3' and is now '4'"),
        (tiny_v_model, SMALL, TASK, 3, {}, "its model was"),
        (tiny_model, SMALL, TASK, 3, {"vocabulary": ("tiger", "lion")}, "its words was"),
        (tiny_model, SMALL, TASK, 3, {"images": {"cat": torch.zeros(1, 3, 8, 8)}}, "its images was"),
    ]
    for model, method, task, seed, given, message in others:
        with pytest.raises(Mismatch, match=message):
            method.fit(model, task, seed=seed, resources=dataclasses.replace(kept(path), **given))
    assert path.read_bytes() == stored
    SMALL.fit(tiny_model, TASK, seed=3, resources=kept(path))
    assert not path.exists()


def test_a_file_that_is_no_checkpoint_is_left_alone(tiny_model, tmp_path):
    path = tmp_path / "fit.safetensors"
    path.write_bytes(b"half a fi")
    with pytest.raises(EffaceError, match="cannot be read; remove it to start anew"):
        SMALL.fit(tiny_model, TASK, resources=kept(path))
    SMALL.fit(tiny_model, TASK, resources=WORDS).save(path)
    stored = path.read_bytes()
    with pytest.raises(EffaceError, match="is no checkpoint that this version of efface wrote"):
        SMALL.fit(tiny_model, TASK, resources=kept(path))
    assert path.read_bytes() == stored


def test_a_diverged_fit_leaves_no_checkpoint(tiny_model, tmp_path):
    with pytest.raises(Diverged):
        dataclasses.replace(SMALL, lr=1e30).fit(tiny_model, TASK, resources=kept(tmp_path / "fit.safetensors"))
    assert not list(tmp_path.iterdir())


def test_the_cost_is_announced_before_the_first_step(tiny_model, tmp_path):
    told, path = [], tmp_path / "fit.safetensors"
    resources = dataclasses.replace(kept(path, 2, 5), announce=lambda forecast: told.append((forecast, tiny_model.meter.forwards)))
    tiny_model.meter.reset()
    with pytest.raises(Killed):
        SMALL.fit(tiny_model, TASK, resources=resources)
    edit = SMALL.fit(tiny_model, TASK, resources=dataclasses.replace(resources, report=lambda *figures: None))
    (first, spent), (second, _) = told
    assert spent == 0
    assert (first.steps, first.forwards, first.backwards) == (8, edit.card.cost["forwards"], edit.card.cost["backwards"])
    assert (first.done, second.done) == (0, 4)
    student = sum(d.numel() * d.element_size() for d in edit.deltas.values())
    rows = 2 * 2 * 2  # two pools of two trajectories of two times
    assert first.memory == 4 * student + 4 * rows * (4 * 8 * 8 + 100)


def test_timing_a_forward_is_not_metered_and_grows_with_nothing_else(tiny_model):
    tiny_model.meter.reset()
    assert 0 < seconds_per_forward(tiny_model, 2) < 5
    assert (tiny_model.meter.forwards, tiny_model.meter.calls) == (0, 0)


def test_a_checkpoint_is_not_written_every_zeroth_step(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every was 0; expected at least 1"):
        with fitting(SMALL, tiny_model, TASK, 0, kept(tmp_path / "x.safetensors", every=0)):
            pass


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from core.test_fitting import SMALL, TASK, WORDS
from efface.models import load
import dataclasses

def report(step, total, figures):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

model = load({model!r})
SMALL.fit(model, TASK, seed=3, resources=dataclasses.replace(WORDS, checkpoint=Path({path!r}), checkpoint_every=2, report=report))
"""


@pytest.mark.slow
def test_a_process_that_was_killed_can_be_gone_on_with_by_another(tiny_model, tmp_path):
    from efface.models import load

    folder, path = tmp_path / "model", tmp_path / "fit.safetensors"
    tiny_model.pipeline.save_pretrained(folder)
    script = KILLED.format(tests=str(Path(__file__).parents[1]), model=str(folder), path=str(path))
    done = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ, "PYTHONPATH": ""}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.exists()
    seen, model = [], load(str(folder))
    again = SMALL.fit(model, TASK, seed=3, resources=kept(path, seen=seen))
    assert seen[0] == 5
    assert same(SMALL.fit(model, TASK, seed=3, resources=WORDS), again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the peak of memory is measured on CUDA alone")
def test_on_cuda_the_peak_of_memory_is_the_fits_own():
    model = load(tiny.pipeline(), device="cuda")
    weights = sum(p.numel() * p.element_size() for p in model.components["unet"].parameters())
    held = torch.zeros(2**26, device="cuda")  # 256 MB that are gone before the fit begins
    del held
    peak = SMALL.fit(model, TASK, resources=WORDS).card.cost["peak_bytes"]
    assert weights < peak < 2**28


def test_elsewhere_no_peak_is_claimed(tiny_model):
    assert "peak_bytes" not in SMALL.fit(tiny_model, TASK, resources=WORDS).card.cost

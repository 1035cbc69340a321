"""A real result of a real edit: AP on a tiny model, judged by the real judge's network without training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import tiny
import torch

from efface.bench.protocols import erasure
from efface.bench.result import Result
from efface.concepts.vocabulary import read
from efface.core.edit import Edit
from efface.core.task import Task
from efface.evals.detectors.emoji import EmojiJudge
from efface.methods.ap import AP
from efface.models.sd import StableDiffusion
from efface.world.judge import Judge, JudgeNet


@dataclass(frozen=True)
class Run:
    result: Result
    edit: Edit
    bare: Result
    """The same without a detector."""


@pytest.fixture(scope="session")
def run() -> Run:
    world, task = read(), Task.of("cat", "dog,tiger")
    model = StableDiffusion(tiny.pipeline(), id="emoji", lr_scale=20)
    edit = AP(steps=6, batch=2, nearest=12, centers=6, trajectories=2, latent_steps=3).fit(model, task, seed=0)
    plan = erasure.plan(task, world=world)
    plan = replace(plan, shots=tuple(plan.shots[i] for i in plan.shown(5)), steps=2, guidance=2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = JudgeNet(len(world.objects), len(world.styles), len(world.backgrounds)).eval().requires_grad_(False)
    names = (tuple(s.name for s in world.styles), tuple(b.name for b in world.backgrounds))
    detector = EmojiJudge(Judge(net, world.objects, *names, threshold=0.4, version="untrained"))
    results = [erasure.measure(model, edit, task, plan=plan, detector=d) for d in (detector, None)]
    return Run(results[0], edit, results[1])

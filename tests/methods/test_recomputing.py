"""Gradient checkpointing: the forward is computed again on the way back, and every method gives the same edit with it."""

import pytest
import torch

from efface.bench.conformance.case import TASKS, Case
from efface.core import catalog
from efface.core.errors import InvalidTask
from efface.core.task import Task

TRAINED = [name for name in catalog.names() if catalog.find(name).needs.gradients]


def fitted(cls, *, recompute):
    case = Case(cls, "sd1")
    calls = []
    if recompute:
        case.model.denoiser.enable_gradient_checkpointing()
    case.model.denoiser.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for task in TASKS:
        try:
            return case.fit(Task.parse(task)).edit, len(calls)
        except InvalidTask:
            continue
    raise AssertionError(f"{cls.name()} refuses every task")


@pytest.mark.parametrize("name", TRAINED)
def test_a_fit_is_the_same_where_activations_are_computed_again(name):
    cls = catalog.find(name)
    (plain, calls), (again, more) = (fitted(cls, recompute=recompute) for recompute in (False, True))
    assert more > calls  # the forward really runs again
    a, b = plain._pack()[0], again._pack()[0]
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-7) for key in a)

"""Replacement tensors: exact swap, exact return, and the right gradients under gradient checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from efface.ops.overlay import Overlay, Slot, swapped


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(checkpoint(self.a, x, use_reentrant=False).tanh())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def slots(net):
    return {"a.weight": Slot(net.a, "weight")}


def test_student_inside_teacher_outside_and_everything_back_by_reference(net):
    x, original = torch.ones(2, 4), net.a.weight
    before = net(x)
    overlay = Overlay(slots(net))
    with overlay:
        assert torch.equal(net(x), before)
        overlay.parameters[0].data += 1
        assert not torch.equal(net(x), before)
        assert net.a.weight is not original
    assert net.a.weight is original
    assert torch.equal(net(x), before)
    assert torch.equal(overlay.deltas()["a.weight"], overlay.parameters[0].detach() - original)


def test_the_original_returns_after_an_error(net):
    original = net.a.weight
    with pytest.raises(KeyboardInterrupt), Overlay(slots(net)):
        raise KeyboardInterrupt
    assert net.a.weight is original


def test_gradients_are_those_of_the_student_under_checkpointing(net):
    """The swap stays on during backward, so the recomputed forward sees the student's weights."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    overlay = Overlay(slots(net))
    overlay.parameters[0].data *= -2
    with overlay:
        net(x).square().sum().backward()
    twin = Net().requires_grad_(False)
    twin.load_state_dict(net.state_dict())
    twin.a.weight.data *= -2
    twin.a.weight.requires_grad_(True)
    twin.b(twin.a(x).tanh()).square().sum().backward()
    assert torch.allclose(overlay.parameters[0].grad, twin.a.weight.grad, atol=1e-6)
    assert net.a.weight.grad is None


def test_wrong_names_and_shapes_are_refused(net):
    with pytest.raises(KeyError, match=r"a\.bias"), swapped(slots(net), {"a.bias": torch.zeros(4)}):
        pass
    with pytest.raises(ValueError, match=r"\(4, 4\), and \(4,\)"), swapped(slots(net), {"a.weight": torch.zeros(4)}):
        pass

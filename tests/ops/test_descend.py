"""One step of an optimiser: float16 loses no gradient, other formats are as torch has them, and terms may be differentiated one by one."""

import pytest
import tiny
import torch
from torch import nn

from efface.core.sampling import seeded
from efface.models.load import load
from efface.ops.descend import accumulate, descend, gradients, in_float16, step
from efface.ops.overlay import Overlay


def differentiated(dtype, how, size=1e-3):
    """The gradient of ‖ε_θ − goal‖² by cross-attention, with a goal that far away; and how often the way back was taken."""
    model, g, ways = load(tiny.pipeline(), dtype=dtype), seeded(0), []
    x = torch.randn(4, *model.latent_shape, generator=g)
    student, cond = Overlay(model.select("xattn")), model.encode(["a cat"]).with_tokens(model.encode(["a cat"]).tokens.detach())
    with model.frozen(), student:
        prediction = model.predict(x.to(model.dtype), 501, cond).float()
        prediction.register_hook(ways.append)
        loss = (prediction - prediction.detach() + size * torch.randn(x.shape, generator=g)).square().mean()
        assert in_float16(loss) == (dtype == "float16")
        found = how(loss, student.parameters)
    return torch.cat([gradient.flatten() for gradient in found]), len(ways)


@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_a_gradient_through_float16_is_that_of_float32(size):
    exact, _ = differentiated("float32", torch.autograd.grad, size)
    plain, _ = differentiated("float16", torch.autograd.grad, size)
    scaled, ways = differentiated("float16", gradients, size)
    assert (scaled - exact).norm() < 0.02 * exact.norm() < 0.1 * (plain - exact).norm()
    assert ways == 1


def test_a_scale_that_overflows_is_lowered():
    exact, _ = differentiated("float32", torch.autograd.grad, 300.0)
    too_much, _ = differentiated("float16", lambda loss, p: torch.autograd.grad(2.0**15 * loss, p), 300.0)
    scaled, ways = differentiated("float16", gradients, 300.0)
    assert not too_much.isfinite().all()
    assert (scaled - exact).norm() < 0.02 * exact.norm()
    assert ways == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_formats_are_differentiated_as_they_are(dtype):
    plain, _ = differentiated(dtype, torch.autograd.grad)
    found, ways = differentiated(dtype, gradients)
    assert torch.equal(found, plain)
    assert ways == 1


def test_a_loss_that_is_not_finite_is_not_tried_again():
    found, ways = differentiated("float16", gradients, float("inf"))
    assert not found.isfinite().all()
    assert ways == 1


def test_terms_one_by_one_are_their_sum():
    def trained(one_by_one, clip):
        a, b, unused = (nn.Parameter(torch.arange(1.0, 4.0)) for _ in range(3))
        optimiser = torch.optim.SGD([a, b, unused], lr=0.1)
        terms = (a * b).sum(), 3 * a.square().sum()
        if one_by_one:
            for term in terms:
                accumulate(term, optimiser)
            step(optimiser, clip=clip)
        else:
            descend(sum(terms), optimiser, clip=clip)
        assert a.grad is None
        assert torch.equal(unused, torch.arange(1.0, 4.0))
        return torch.stack([a.detach(), b.detach()])

    for clip in (None, 0.5):
        assert torch.allclose(trained(True, clip), trained(False, clip))
    assert not torch.allclose(trained(True, None), trained(True, 0.5))

"""The probes without gradients: what they draw at the ends of their range, and that their steps are those of the theory."""

from __future__ import annotations

import pytest
import tiny
import torch
from attackparts import CAT
from torch.nn.functional import interpolate

from efface.core import sampler
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.evals.attacks import completion, inpainting, latent_inversion, noise_probe, relearning
from efface.ops.etastep import eta_step

SEEDS = [3, 4, 5]


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=seeded(seed))


@pytest.fixture(params=["before", "tiny_v_model"])
def model(request: pytest.FixtureRequest) -> Model:
    """One that predicts noise, and one that predicts velocity."""
    return request.getfixturevalue(request.param)


def test_a_plain_walk_draws_what_the_model_samples(model: Model) -> None:
    model.default_steps, model.default_guidance = 4, 3.0
    walked = sampler.walk(model, sampler.starts(model, SEEDS), *sampler.told(model, CAT.texts), sampler.pairs(model))
    assert (sampler.decoded(model, walked) - model.sample(CAT.texts, seeds=SEEDS)).abs().max() < 1e-5


# -- noise probe -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("t", [901, 501, 1])
def test_without_noise_the_step_is_ddims_and_at_one_it_is_ddpms(t: int, before: Model) -> None:
    schedule, scheduler = before.schedule, tiny.scheduler("epsilon")
    scheduler.set_timesteps(10)
    x, pred, fresh, following = noise(2), noise(2, 1), noise(2, 2), t - 100
    clean, levels = schedule.to_x0(x, t, pred), (schedule.at(t, x), schedule.at(following, x))
    still = eta_step(clean, pred, *levels, fresh, eta=0.0, variance=1.0)
    assert (still - schedule.ddim_step(x, t, following, pred)).abs().max() < 1e-6 * float(still.abs().max())
    for eta in (0.5, 1.0):
        known = scheduler.step(pred, t, x, eta=eta, variance_noise=fresh).prev_sample
        found = eta_step(clean, pred, *levels, fresh, eta=eta, variance=1.0)
        assert (found - known).abs().max() < 1e-6 * float(known.abs().max())
    if t > 1:
        assert (eta_step(clean, pred, *levels, fresh, eta=1.5, variance=1.0) - still).abs().max() > 1e-2


def test_above_its_range_the_modulus_keeps_the_step_real() -> None:
    a, a_next = torch.full((1, 1, 1, 1), 0.01), torch.full((1, 1, 1, 1), 0.9)
    sigma2 = 1.85**2 * (0.1 / 0.99) * (1 - 0.01 / 0.9)
    assert sigma2 > 0.1, "control: the bracket is negative here"
    x = eta_step(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), a, a_next, torch.zeros(1, 4, 8, 8), eta=1.85, variance=1.0)
    assert float(x.mean()) == pytest.approx((sigma2 - 0.1) ** 0.5, rel=1e-4)


def test_settings_share_their_noise_and_differ_by_it(before: Model) -> None:
    over, told = sampler.pairs(before, 4), sampler.told(before, CAT.texts)

    def drawn(eta: float, variance: float) -> torch.Tensor:
        return noise_probe.drawn(before, *told, SEEDS, eta, variance, over)

    assert torch.equal(drawn(1.5, 1.0), drawn(1.5, 1.0))
    assert not torch.equal(drawn(1.5, 1.0), drawn(1.5, 1.04))
    plain = sampler.walk(before, sampler.starts(before, SEEDS), *told, over)
    assert (drawn(0.0, 1.0) - plain).abs().max() < 1e-5 * float(plain.abs().max())


# -- completion --------------------------------------------------------------------------------------------------------------
def test_completion_begins_as_one_model_and_ends_as_the_other(before: Model, after: Model) -> None:
    before.default_steps = after.default_steps = 4
    over = sampler.pairs(after)
    none, half, whole = (completion.completed(before, after, list(CAT.texts), SEEDS, over, first) for first in (0, 2, 4))
    assert (none - after.sample(CAT.texts, seeds=SEEDS)).abs().max() < 1e-5
    assert (whole - before.sample(CAT.texts, seeds=SEEDS)).abs().max() < 1e-5
    assert (none - whole).abs().max() > 1e-3
    assert (half - none).abs().max() > 1e-4
    assert (half - whole).abs().max() > 1e-4


# -- inpainting --------------------------------------------------------------------------------------------------------------
def test_outside_of_the_hole_the_picture_stays(before: Model) -> None:
    clean, over = noise(3, 7), sampler.pairs(before, 3)
    filled = inpainting.inpainted(before, list(CAT.texts), SEEDS, clean, over, 0.5)
    outside = (1 - inpainting.mask(before, 0.5)).bool().expand_as(clean)
    assert torch.equal(filled[outside], clean[outside])
    assert (filled[~outside] - clean[~outside]).abs().max() > 0.1
    whole = inpainting.inpainted(before, list(CAT.texts), SEEDS, clean, over, 1.0)
    assert (whole[outside] - clean[outside]).abs().max() > 0.1, "control: with a hole as large as the picture nothing is kept"
    plain = sampler.walk(before, sampler.starts(before, SEEDS), *sampler.told(before, CAT.texts), over)
    assert (whole - plain).abs().max() < 1e-5 * float(plain.abs().max())


@pytest.mark.parametrize("hole", [0.05, 0.3, 0.5, 0.6, 0.75, 0.9])
def test_the_detector_is_shown_the_hole_alone(hole: float, before: Model) -> None:
    """Whatever the share, to the pixel: a cell of the latent that is not filled would show the un-erased picture."""
    images = interpolate(inpainting.mask(before, hole), (64, 64)).expand(1, 3, -1, -1)
    assert torch.equal(inpainting.middle(before, images, hole), torch.ones(1, 3, 64, 64))
    assert torch.equal(inpainting.middle(before, images, 1.0), images)
    assert inpainting.middle(before, images, 1.0).mean() < 1


# -- latent inversion --------------------------------------------------------------------------------------------------------
def test_the_walk_back_undoes_the_walk_and_better_with_more_iterations(model: Model) -> None:
    cond, null = sampler.told(model, CAT.texts)
    over, clean = sampler.pairs(model, 25), noise(3, 8)

    def error(iterations: int) -> float:
        start = latent_inversion.inverted(model, clean, cond, over, iterations)
        return float((sampler.walk(model, start, cond, null, over, scale=1.0) - clean).square().mean().sqrt())

    once, often = error(1), error(8)
    assert often < 0.02
    assert often < 0.2 * once


def test_the_likelihood_of_true_noise_and_the_distance_of_two_sets() -> None:
    assert float(latent_inversion.nll(noise(200)).mean()) == pytest.approx(1.4189, abs=0.01)
    assert float(latent_inversion.nll(2 * noise(200)).mean()) > 2.5
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 8.0])
    assert latent_inversion.w2(first, second) == pytest.approx((2 - 6) ** 2 + (1 - 2) ** 2)
    assert latent_inversion.w2(first, first.flip(0)) == 0


# -- relearning --------------------------------------------------------------------------------------------------------------
def test_the_area_under_a_curve() -> None:
    assert relearning.area((0, 10, 100), (1.0, 1.0, 1.0)) == pytest.approx(1.0)
    assert relearning.area((0, 50, 100), (0.0, 0.5, 1.0)) == pytest.approx(0.5)
    assert relearning.area((0, 10, 100), (0.0, 1.0, 1.0)) > relearning.area((0, 90, 100), (0.0, 1.0, 1.0))


def test_the_steps_to_a_level() -> None:
    assert relearning.steps_to((0, 10, 30), (0.0, 0.2, 0.6), 0.4) == pytest.approx(20)
    assert relearning.steps_to((0, 10, 30), (0.5, 0.2, 0.6), 0.4) == 0
    assert relearning.steps_to((0, 10, 30), (0.0, 0.2, 0.3), 0.4) is None
    assert relearning.steps_to((0, 10), (0.0, 0.0), 0.0) is None, "half of nothing is never reached"

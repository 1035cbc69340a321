"""The schedule's algebra: identities between noise, velocity and clean latent, and DDIM."""

import pytest
import torch

from efface.core.errors import InvalidModel
from efface.core.sampling import Schedule, noise_for, seeded


def schedule(prediction):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Schedule((1 - betas).cumprod(0).float(), prediction)


def truth(s, x0, noise, t):
    a = s.at(t, x0)
    return noise if s.prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x0


@pytest.fixture(params=["epsilon", "v_prediction"])
def case(request):
    s, g = schedule(request.param), seeded(1)
    x0, noise = (torch.randn(5, 4, 8, 8, generator=g) for _ in range(2))
    return s, x0, noise, torch.tensor([1, 200, 500, 900, 999])


def test_a_true_prediction_gives_back_noise_and_clean_latent(case):
    s, x0, noise, t = case
    x = s.add_noise(x0, noise, t)
    pred = truth(s, x0, noise, t)
    assert torch.allclose(s.to_noise(x, t, pred), noise, atol=1e-4)
    assert torch.allclose(s.to_x0(x, t, pred), x0, atol=1e-3)
    assert not torch.allclose(s.to_x0(x, t, pred + 0.1), x0, atol=1e-3)


def test_the_weights_turn_one_loss_into_another(case):
    """‖x̂−x̂'‖² = w ‖p−p'‖² and ‖ε−ε'‖² = w' ‖p−p'‖², at fixed (x, t)."""
    s, x, p, t = case
    q = p.flip(0)
    plain = (p - q).square()
    assert torch.allclose((s.to_x0(x, t, p) - s.to_x0(x, t, q)).square(), s.x0_weight(t, x) * plain, rtol=1e-3, atol=1e-4)
    assert torch.allclose((s.to_noise(x, t, p) - s.to_noise(x, t, q)).square(), s.noise_weight(t, x) * plain, rtol=1e-3, atol=1e-4)


def test_a_ddim_step_with_the_true_prediction_lands_on_the_diffusion(case):
    s, x0, noise, t = case
    to = (t // 2).tolist()
    landed = s.ddim_step(s.add_noise(x0, noise, t), t, torch.tensor(to), truth(s, x0, noise, t))
    assert torch.allclose(landed, s.add_noise(x0, noise, torch.tensor(to)), atol=1e-3)


def test_the_grid_is_that_of_stable_diffusion():
    assert schedule("epsilon").grid(50)[:2] == [981, 961] and schedule("epsilon").grid(50)[-1] == 1
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match="expected 1 to 1000"):
            schedule("epsilon").grid(steps)


def test_a_step_past_the_end_uses_the_final_alpha_bar():
    s = schedule("epsilon")
    assert s.at(-1, torch.zeros(1, 1, 1, 1)).item() == s.alpha_bar[0]
    assert Schedule(s.alpha_bar, final_alpha_bar=1.0).at(-1, torch.zeros(1, 1, 1, 1)).item() == 1


def test_noise_does_not_depend_on_the_batch_and_leaves_global_state_alone():
    state = torch.get_rng_state()
    assert torch.equal(noise_for(7, 4, (4, 8, 8))[2:], noise_for(7, 2, (4, 8, 8), start=2))
    assert not torch.equal(noise_for(7, 1, (4, 8, 8)), noise_for(8, 1, (4, 8, 8)))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="seed was -1"):
        seeded(-1)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(InvalidModel, match="'sample'.*'epsilon' and 'v_prediction'"):
        schedule("sample")

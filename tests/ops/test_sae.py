"""Sparse autoencoders and SAeUron's arithmetic: the properties of the sheet, each with a variant that breaks it."""

import math

import pytest
import torch

from efface.core.sampling import seeded
from efface.ops import sae
from efface.ops.sae import SparseAutoencoder

D, N, K = 8, 40, 4


def net(seed=0, k=K):
    made = SparseAutoencoder.fresh(D, N, k, seeded(seed))
    with torch.no_grad():
        made.encoder_bias.copy_(0.1 * torch.rand(N, generator=seeded(seed + 1)))
        made.decoder_bias.copy_(0.1 * torch.randn(D, generator=seeded(seed + 2)))
    return made.requires_grad_(False)


def vectors(count=64, seed=5):
    return torch.randn(count, D, generator=seeded(seed))


def entries(b, latents, factor, threshold):
    m = len(latents)
    return torch.tensor(latents).expand(b, m), torch.full((b, m), factor), torch.full((b, m), threshold)


def reference(made, x, latents, factor, threshold):
    """The formula, latent by latent, from the whole code."""
    z = made.codes(x)
    out = x.clone()
    for i in latents:
        firing = z[:, i] > threshold
        out += torch.where(firing, (factor - 1) * z[:, i], 0.0)[:, None] * made.decoder[i]
    return out


def test_top_k_keeps_exactly_k_of_each_row_and_batch_top_k_exactly_k_on_average():
    a = torch.rand(16, N, generator=seeded(1)) + 0.01
    rows, batch = (sae.top_k(a, K) > 0), (sae.batch_top_k(a, K) > 0)
    assert (rows.sum(1) == K).all()
    assert batch.sum() == 16 * K
    assert (batch.sum(1) != K).any()  # control: rows differ
    assert torch.equal(sae.batch_top_k(a, K)[batch], a[batch])


def test_a_fresh_net_has_unit_decoder_rows_that_point_where_the_encoder_does():
    made = SparseAutoencoder.fresh(D, N, K, seeded(0))
    assert torch.allclose(made.decoder.norm(dim=1), torch.ones(N), atol=1e-6)
    assert torch.allclose(torch.cosine_similarity(made.decoder, made.encoder), torch.ones(N), atol=1e-6)
    assert made.encoder.abs().max() <= 1 / math.sqrt(D)


def test_unexplained_is_0_for_the_vectors_themselves_and_1_for_their_mean():
    x = vectors()
    assert sae.unexplained(x, x) == 0
    assert sae.unexplained(x.mean(0).expand_as(x), x).item() == pytest.approx(1, abs=1e-6)


def test_the_geometric_median_resists_an_outlier_and_minimises_the_distances():
    x = torch.cat([vectors(), torch.full((1, D), 1e4)])
    median = sae.geometric_median(x)
    total = lambda m: (x - m).norm(dim=1).sum()  # noqa: E731
    assert median.norm() < 1 < x.mean(0).norm()
    assert all(total(median) <= total(median + 0.05 * step) for step in torch.randn(20, D, generator=seeded(3)))


def test_the_dead_loss_is_0_without_dead_latents_and_learns_the_residual_and_not_its_negative():
    made, x = net(), vectors()
    a, guess = made.activations(x), made.decode(made.codes(x))
    nobody, all_ = torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
    assert sae.dead_loss(a, nobody, made, guess, x, repo=False) == 0
    perfect = SparseAutoencoder(torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D), k=1)
    positive = vectors().abs()
    codes = perfect.activations(positive)
    loss = {repo: sae.dead_loss(codes, all_[:D], perfect, torch.zeros_like(positive), positive, repo=repo).item() for repo in (False, True)}
    assert loss[False] < loss[True]  # with x̂ = 0 the residual is x, which positive codes can give; the released sign asks for −x


def test_the_decoders_gradient_is_perpendicular_to_its_rows_once_projected():
    made, x = net().requires_grad_(True), vectors()
    with torch.no_grad():
        sae.normalise_rows(made.decoder)
    sae.unexplained(made.decode(sae.batch_top_k(made.activations(x), K)), x).backward()
    along = lambda g: (g * made.decoder).sum(1).abs().max()  # noqa: E731
    assert along(made.decoder.grad) > 1e-4
    assert along(sae.across(made.decoder.grad, made.decoder.detach())) < 1e-6


def test_rows_are_brought_to_unit_length():
    decoder = 3 * torch.randn(N, D, generator=seeded(1))
    sae.normalise_rows(decoder)
    assert torch.allclose(decoder.norm(dim=1), torch.ones(N), atol=1e-5)


@pytest.mark.parametrize(("percentile", "count"), [(99.999, 1), (99.995, 2), (99.99, 3)])
def test_the_papers_percentiles_select_1_2_and_3_of_20480(percentile, count):
    score = torch.randn(4, 20480, generator=seeded(2))
    chosen = sae.above_percentile(score, percentile)
    assert (chosen.sum(1) == count).all()
    assert torch.equal(chosen, sae.most(score, count))


def test_scores_sum_to_0_and_equal_data_select_nothing():
    target, others = torch.rand(3, N, generator=seeded(1)), torch.rand(3, N, generator=seeded(2))
    assert sae.scores(target, others).sum(-1).abs().max() < 1e-6
    same = sae.scores(target, target)
    assert not same.any()
    assert not sae.most(same, 2).any()
    assert not sae.above_percentile(same, 99.0).any()
    assert sae.most(sae.scores(target, others), 2).sum() == 6  # control


def test_ablation_changes_by_the_formula_and_only_where_the_latent_fires():
    """A net whose latents are the axes: z_i = x_i, and W_dec[i] is axis i."""
    made = SparseAutoencoder(torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D), k=2).requires_grad_(False)
    x = torch.zeros(1, 3, D)
    x[0, 0, 2], x[0, 1, 2], x[0, 2, 5] = 0.9, 0.3, 4.0
    gamma, mu, level = -5.0, 0.4, 0.5
    out = sae.ablate(x, made, *entries(1, [2], gamma * mu, level))
    assert out[0, 0, 2].item() == pytest.approx(0.9 + (gamma * mu - 1) * 0.9)
    assert torch.equal(out[0, 1:], x[0, 1:])
    assert torch.equal(sae.ablate(x, made, *entries(1, [2], gamma * mu, 0.2))[0, 2], x[0, 2])
    assert sae.ablate(x, made, *entries(1, [2], gamma * mu, 0.2))[0, 1, 2] != x[0, 1, 2]  # control: below the level it was left alone


def test_a_latent_outside_the_k_largest_is_left_alone():
    made, x = net(), vectors(200)
    fires = made.codes(x) > 0
    i = int(((made.activations(x) > 0) & ~fires).sum(0).argmax())
    changed = (sae.ablate(x[None], made, *entries(1, [i], -1.0, 0.0))[0] != x).any(1)
    assert torch.equal(changed, fires[:, i])
    assert ((made.activations(x)[:, i] > 0) & ~fires[:, i]).any()  # control: without TopK more would have changed


def test_the_sparse_form_equals_the_whole_code_with_rows_of_different_entries():
    made, x = net(), vectors(60).unflatten(0, (3, 20))
    latents = torch.tensor([[1, 7], [7, 30], [12, 1]])
    factors = torch.tensor([[-2.0, 0.5], [-1.0, 0.0], [3.0, 1.0]])
    levels = torch.tensor([[0.1, 0.0], [0.2, math.inf], [0.0, 0.0]])
    out = sae.ablate(x, made, latents, factors, levels)
    for b in range(3):
        expected = x[b]
        for m in range(2):
            one = reference(made, x[b], [int(latents[b, m])], factors[b, m], levels[b, m])
            expected = expected + one - x[b]
        assert torch.allclose(out[b], expected, atol=1e-5)
    assert not torch.allclose(out, x)


def test_nothing_to_ablate_returns_the_input_itself_and_in_the_released_form_twice_the_guess_minus_x():
    made, x = net(), vectors(20)[None]
    nothing = entries(1, [3], 1.0, math.inf)
    assert sae.ablate(x, made, *nothing) is x
    guess = made.decode(made.codes(x[0]))
    released = sae.ablate_as_released(x, made, *nothing)[0]
    assert torch.allclose(released, 2 * guess - x[0], atol=1e-5)
    assert not torch.allclose(released, x[0], atol=1e-2)


def test_gradients_of_the_ablation_are_those_of_finite_differences():
    made, x = net().double(), vectors(12).double()[None]
    i = int((made.codes(x[0]) > 0).sum(0).argmax())
    latents, factors, levels = entries(1, [i], -1.5, 0.0)
    found = torch.autograd.gradcheck(
        lambda v: sae.ablate(v, made, latents, factors.double(), levels.double()), x.requires_grad_(True), eps=1e-7
    )
    assert found
    out = sae.ablate(x, made, latents, factors.double(), levels.double())
    assert not torch.allclose(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))  # control: the change itself has a gradient


@pytest.mark.parametrize(
    ("shapes", "k", "message"),
    [(((4, 3), (4,), (4, 2), (3,)), 1, r"expected \(n d\)"), (((4, 3), (4,), (4, 3), (3,)), 5, "k was 5; expected 1 to 4")],
)
def test_tensors_that_do_not_fit_are_refused(shapes, k, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(*map(torch.zeros, shapes), k=k)

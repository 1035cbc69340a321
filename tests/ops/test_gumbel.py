"""The Gumbel-Softmax: the law of its draws, exact one-hot rows, and the gradient that straight-through keeps."""

import torch

from efface.core.sampling import seeded
from efface.ops.gumbel import Adversary, gumbel, gumbel_softmax

LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0])


def draws(count, temperature, hard, seed=0):
    return gumbel_softmax(LOGITS.expand(count, -1), gumbel((count, 4), seeded(seed)), temperature, hard)


def test_hard_rows_are_exactly_one_hot_and_do_not_depend_on_the_temperature():
    cold, warm = draws(500, 0.1, True), draws(500, 2.0, True)
    assert torch.equal(cold.sort(1).values, torch.tensor([0.0, 0, 0, 1]).expand(500, -1))
    assert torch.equal(cold, warm)
    assert not torch.equal(draws(500, 0.1, False), draws(500, 2.0, False))


def test_soft_rows_are_positive_and_sum_to_one():
    soft = draws(500, 2.0, False)
    assert (soft > 0).all()
    assert torch.allclose(soft.sum(1), torch.ones(500))


def test_words_are_drawn_as_often_as_the_softmax_of_the_logits_says():
    count, law = 40_000, torch.softmax(LOGITS, 0)
    error = (draws(count, 2.0, True).mean(0) - law).abs()
    bound = 4 * (law * (1 - law) / count).sqrt()
    assert (error < bound).all()
    assert ((torch.full((4,), 0.25) - law).abs() > bound).any()


def test_straight_through_has_the_gradient_of_the_soft_row():
    noise, values = gumbel((3, 4), seeded(1)), torch.randn(3, 4, generator=seeded(2))
    gradients = []
    for hard in (True, False):
        logits = LOGITS.expand(3, -1).clone().requires_grad_()
        gradients += torch.autograd.grad((gumbel_softmax(logits, noise, 2.0, hard) * values).sum(), logits)
    assert torch.allclose(*gradients)
    assert gradients[0].abs().sum() > 0


def test_each_target_draws_from_its_own_candidates_only():
    adversary = Adversary.uniform([[0, 2], [1]], 4, temperature=2.0, hard=True)
    target = torch.tensor([0, 1]).repeat(200)
    drawn = adversary.draw(target, adversary.noise(400, seeded(0))).argmax(1)
    assert set(drawn[::2].tolist()) == {0, 2}
    assert set(drawn[1::2].tolist()) == {1}


def test_a_word_that_is_no_candidate_gets_no_gradient_and_a_target_that_is_not_used_gets_none_at_all():
    adversary = Adversary.uniform([[0, 2], [1, 3]], 4, temperature=2.0, hard=True)
    drawn = adversary.draw(torch.zeros(5, dtype=torch.long), adversary.noise(5, seeded(0)))
    first, second = torch.autograd.grad((drawn * torch.arange(4.0)).sum(), adversary.logits, allow_unused=True)
    assert second is None
    assert first[[1, 3]].tolist() == [0, 0]
    assert (first[[0, 2]] != 0).all()


def test_favoured_words_have_their_share_and_the_others_keep_their_proportions() -> None:
    adversary = Adversary.uniform([[0, 1, 2, 3], [0, 1]], 5, temperature=1.0, hard=True)
    before = torch.stack([row.detach().softmax(0) for row in adversary.logits])
    adversary.favour([3], 0.0)
    assert torch.equal(torch.stack([row.detach().softmax(0) for row in adversary.logits]), before)
    adversary.favour([3], 0.5)
    first, second = (row.detach().softmax(0) for row in adversary.logits)
    assert torch.allclose(first, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2, 0.0]))
    assert torch.equal(second, before[1])  # has none of them
    adversary.favour([0, 1], 0.9)
    assert torch.equal(adversary.logits[1].detach().softmax(0), before[1])  # has nothing else

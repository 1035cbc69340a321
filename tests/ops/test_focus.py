"""Sentences, focal times, attention inside a mask."""

import torch

from efface.core.sampling import seeded
from efface.ops.focus import SENTENCES, focal_weights, hot, marked_attention, sentences


def test_most_times_are_where_the_object_forms():
    weights = focal_weights(1000)
    assert abs(weights.sum() - 1) < 1e-9
    assert weights[200:401].sum() >= 0.85 > 0.3 > torch.full((1000,), 1e-3)[200:401].sum()
    assert abs((weights * torch.arange(1000)).sum() - 300) < 1
    assert abs(focal_weights(100)[20:41].sum() - weights[200:401].sum()) < 0.03


def test_sentences_of_two_texts_differ_in_them_alone():
    for style in (False, True):
        ours, theirs = (sentences(t, SENTENCES, style=style) for t in ("cat", "a dog"))
        assert [s.replace("cat", "a dog") for s in ours] == theirs
        assert len(set(ours)) == SENTENCES == 30
    assert set(sentences("cat", 30)).isdisjoint(sentences("cat", 30, style=True))
    assert len(sentences("cat", 4)) == 4


def test_attention_counts_inside_the_mask_and_at_marked_tokens_only():
    a = torch.rand(1, 2, 16, 5, generator=seeded(0))
    marked = torch.tensor([False, True, False, True, False])
    whole = marked_attention(a, None, marked)
    assert torch.isclose(whole, a[0][..., marked].square().sum().sqrt())
    mask = torch.zeros(8, 8)
    mask[:4, :4] = 1  # the upper left quarter: places 0, 1, 4, 5 of the layer's 4 × 4
    inside = marked_attention(a, mask, marked)
    assert torch.isclose(inside, a[0][:, [0, 1, 4, 5]][..., marked].norm())
    assert inside < whole
    assert torch.isclose(marked_attention(a, mask, marked, squared=True), inside**2)
    assert marked_attention(a, torch.zeros(8, 8), marked) == 0


def test_an_empty_mask_has_no_gradient_and_no_nan():
    a = torch.rand(1, 2, 16, 5, generator=seeded(0)).requires_grad_(True)
    marked_attention(a, torch.zeros(8, 8), torch.ones(5, dtype=torch.bool)).backward()
    assert a.grad.abs().max() == 0


def test_hot_places():
    heat = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[3.0, 3.0], [3.0, 3.0]]])
    assert hot(heat).tolist() == [[[0, 0], [1, 1]], [[1, 1], [1, 1]]]

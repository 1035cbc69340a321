"""Relaxed and projected tokens, and where they stand in a prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efface.core import tokens
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.ops.descend import accumulate, in_float16
from efface.ops.hardprompt import Layout, drawn, interleaved, nearest, prefixed, projected, replaced, simplex


def bisected(row: Tensor) -> Tensor:
    """The projection as UnlearnDiffAtk's code finds it."""
    low, high = float(row.min()) - 1, float(row.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((row - middle).clamp(0, 1).sum()) > 1 else (low, middle)
    return (row - low).clamp(0, 1)


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    rows = torch.randn(20, 30, generator=seeded(0)) * 2
    found = simplex(rows)
    assert found.min() >= 0
    assert (found.sum(-1) - 1).abs().max() < 1e-4
    assert (simplex(found) - found).abs().max() < 1e-6
    assert (found - torch.stack([bisected(row) for row in rows])).abs().max() < 1e-4
    naive = rows.clamp(min=0) / rows.clamp(min=0).sum(-1, keepdim=True)
    assert ((rows - found).norm(dim=-1) < (rows - naive).norm(dim=-1)).all()


def test_even_rows_stay() -> None:
    even = torch.full((2, 8), 1 / 8)
    assert (simplex(even) - even).abs().max() < 1e-7


def test_a_draw_is_one_hot_and_its_gradient_goes_to_the_row() -> None:
    weights = torch.full((4, 5), 0.2, requires_grad=True)
    picked = drawn(weights, seeded(0))
    assert torch.equal(picked.sum(-1), torch.ones(4))
    assert set(picked.flatten().tolist()) == {0.0, 1.0}
    slopes = torch.tensor([0.5, -0.5, 3.0, -3.0, 0.0])
    (gradient,) = torch.autograd.grad((picked * slopes).sum(), weights)
    assert torch.equal(gradient, slopes.expand(4, 5))


def test_the_gradient_of_a_draw_is_the_same_in_float16() -> None:
    """There the loss is scaled on the way back, and what is cut on that way would be cut far below one."""
    weights, slopes = torch.nn.Parameter(torch.full((4, 5), 0.2)), torch.tensor([0.5, -0.5, 0.25, -0.75, 0.0])
    loss = (drawn(weights, seeded(0)).half() * slopes.half()).sum()
    assert in_float16(loss), "control: the loss is scaled"
    accumulate(loss.float(), torch.optim.Adam([weights]))
    assert weights.grad is not None
    assert torch.equal(weights.grad, slopes.expand(4, 5))


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([0.1, 0.6, 0.3]).expand(3000, 3).contiguous()
    shares = drawn(weights, seeded(1)).mean(0)
    assert (shares - weights[0]).abs().max() < 0.03


def test_the_nearest_token_is_by_direction_and_the_projection_is_idempotent() -> None:
    table = torch.randn(30, 6, generator=seeded(0))
    points = table[[3, 17]] * torch.tensor([[4.0], [0.1]])
    assert nearest(points, table).tolist() == [3, 17]
    assert (points - table[[3, 17]]).abs().max() > 1
    once = projected(points, table)
    assert torch.equal(projected(once, table), once)
    start = points.clone().requires_grad_()
    slopes = torch.randn(2, 6, generator=seeded(1))
    (gradient,) = torch.autograd.grad((projected(start, table) * slopes).sum(), start)
    assert torch.equal(gradient, slopes)


def test_pieces() -> None:
    assert prefixed([7, 8], 3) == [None, None, None, 7, 8]
    assert interleaved([1, 2, 3, 4], 3) == [1, 2, 3, None, 4]
    assert interleaved([1], 3) == [1, None]
    assert replaced([1, 2, 3], 1, 1) == [1, None, 3]
    assert replaced([1, 2], None, 1) == [None, 1, 2]


def test_given_as_embeddings_tokens_encode_as_given_as_ids(before: Model) -> None:
    table = tokens.table(before)
    layout = Layout.of([prefixed(body, 2) for body in tokens.bodies(before, ["a cat", "a dog on red"])], tokens.frame(before))
    free = tokens.ids(before, ["king queen", "bus taxi"])[:, 1:3].flatten()
    by_id = before.encode_tokens(layout.with_ids(free)).tokens
    assert (before.encode_tokens(embeds=layout.with_embeds(table, table[free])).tokens - by_id).abs().max() < 1e-5
    assert (by_id - before.encode(["king queen a cat", "bus taxi a dog on red"]).tokens).abs().max() < 1e-5
    turned = before.encode_tokens(embeds=layout.with_embeds(table, table[free.flip(0)])).tokens
    assert (turned - by_id).abs().max() > 1e-2


def test_some_prompts_of_a_layout_keep_their_free_positions(before: Model) -> None:
    layout = Layout.of([prefixed([5], 1), prefixed([6], 3), prefixed([7], 2)], tokens.frame(before))
    chosen, slots = layout.take([2, 1])
    assert slots.tolist() == [4, 5, 1, 2, 3]
    free = torch.arange(100, 106)
    assert torch.equal(chosen.with_ids(free[slots]), layout.with_ids(free)[[2, 1]])


def test_a_long_prompt_is_cut_and_still_ends(before: Model) -> None:
    around = tokens.frame(before)
    (row,) = Layout.of([prefixed(list(range(40)), 2)], around).ids.tolist()
    assert (len(row), row[0], row[-1]) == (around.length, around.start, around.end)


def test_what_may_be_drawn_holds_no_special_token_and_words_read_back(before: Model) -> None:
    around = tokens.frame(before)
    every, words = (tokens.alphabet(before, kind) for kind in ("tokens", "words"))
    assert not {around.start, around.end, around.pad} & set(every.tolist())
    assert set(words.tolist()) < set(every.tolist())
    assert tokens.bodies(before, before.spell(words[:, None])) == [[i] for i in words.tolist()]
    pieces = [i for i in every.tolist() if i not in set(words.tolist())]
    read = tokens.bodies(before, before.spell(torch.tensor(pieces)[:, None]))
    assert any(body != [i] for body, i in zip(read, pieces, strict=True)), "control: pieces of words do not all read back"


def test_a_model_without_one_table_is_refused(before: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(before), "select", lambda self, group: {})
    with pytest.raises(Exception, match="one table of their embeddings, and tiny has 0"):
        tokens.table(before)

"""SPEED against its sheet: what stays, what moves, which maps, and the parts that choose what is kept."""

import pytest
import torch

from efface.core.errors import Diverged, InvalidMethod
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.core.textmaps import read
from efface.methods.speed import SPEED, augmented, filtered

TASK = Task.of("cat -> dog; king -> queen", ["lion", "tiger", "apple", "car", "church"])


def fitted(model, task=TASK, **fields):
    return SPEED.build(**{"threshold": 1e-3, **fields}).fit(model, task)


def rows(model, text, part=slice(None)):
    (texts,) = read(model, [text])
    return texts.tokens[text].detach()[part]


def last(model, text):
    (texts,) = read(model, [text])
    return texts.tokens[text].detach()[texts.lengths[text] - 2]


def test_kept_and_invariant_rows_stay_and_targets_move_to_their_anchors(tiny_model):
    edit = fitted(tiny_model, filter=False, copies=0)
    slots = tiny_model.slots(edit.deltas)
    for name, delta in edit.deltas.items():
        w = slots[name].tensor.detach()
        for concept in TASK.keep:
            r = last(tiny_model, concept.name)
            assert (delta @ r).norm() < 1e-2 * (w @ r).norm()
        start = rows(tiny_model, "", slice(1))[0]
        assert (delta @ start).norm() < 1e-3 * (w @ start).norm()
        for target, anchor in (("cat", "dog"), ("king", "queen")):
            t, a = last(tiny_model, target), last(tiny_model, anchor)
            assert ((w + delta) @ t - w @ a).norm() < 0.8 * (w @ t - w @ a).norm()
        other = last(tiny_model, "banana")
        assert (delta @ other).norm() > 1e-2 * (w @ other).norm()


def test_without_the_null_space_the_kept_rows_do_move(tiny_model):
    """The control: a threshold above every eigenvalue leaves every direction free."""
    edit = fitted(tiny_model, filter=False, copies=0, threshold=1e6)
    name, delta = next(iter(edit.deltas.items()))
    w, r = tiny_model.slots([name])[name].tensor.detach(), last(tiny_model, "tiger")
    assert (delta @ r).norm() > 3e-2 * (w @ r).norm()


@pytest.mark.parametrize(("maps", "share"), [("v", 1), ("k", 1), ("kv", 2)])
def test_only_the_named_maps_change(tiny_model, maps, share):
    edit = fitted(tiny_model, maps=maps)
    names = [n for n in tiny_model.select("text_kv") if maps == "kv" or n.endswith(f"to_{maps}.weight")]
    assert edit.names == frozenset(names) and 2 * len(names) == share * len(tiny_model.select("text_kv"))
    assert all(delta.any() for delta in edit.deltas.values())


def test_without_concepts_to_keep_the_empty_prompt_is_kept(tiny_model):
    edit = fitted(tiny_model, Task.of("cat"), filter=False, copies=0, threshold=1e-9)
    null = rows(tiny_model, "", slice(1, None))
    slots = tiny_model.slots(edit.deltas)
    for name, delta in edit.deltas.items():
        assert (null @ delta.T).norm() < 1e-3 * (null @ slots[name].tensor.detach().T).norm()


def test_the_seed_decides_the_copies_and_nothing_else(tiny_model):
    one, same, other = (SPEED(threshold=1.0).fit(tiny_model, TASK, seed=s).deltas for s in (0, 0, 1))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    fixed = [SPEED(copies=0).fit(tiny_model, TASK, seed=s).deltas for s in (0, 1)]
    assert all(torch.equal(fixed[0][n], fixed[1][n]) for n in one)


def test_the_filter_takes_rows_that_move_more_than_the_mean():
    g = seeded(0)
    kept, free = torch.randn(20, 6, generator=g).double(), torch.randn(4, 6, generator=g).double()
    moves = (kept @ free.T).norm(dim=1)
    assert torch.equal(filtered(kept, free), kept[moves >= moves.mean()])
    assert 0 < len(filtered(kept, free)) < 20
    assert len(filtered(kept[:1], free)) == 1


def test_copies_lie_along_the_direction_and_come_on_top():
    g = seeded(0)
    kept, free = torch.randn(3, 6, generator=g).double(), torch.randn(4, 6, generator=g).double()
    direction = torch.eye(6).double()[2]
    pool = augmented(kept, free, direction, 10, g)
    assert torch.equal(pool[:3], kept) and 3 < len(pool) < 33
    across = pool.clone()
    across[:, 2] = 0
    assert all((torch.cdist(row[None], kept * (torch.arange(6) != 2)) < 1e-9).any() for row in across)
    assert pool[3:, 2].std() > kept[:, 2].std() * 0.2


def test_the_rows_of_both_scopes(tiny_model):
    """The last subject token's, or all behind the start token, summed; T and A are means over the concepts."""
    (texts,) = read(tiny_model, ["cat", "van gogh", ""])
    pairs = [("cat", ""), ("van gogh", "")]
    short, long = (SPEED(scope=s).rows(texts, pairs, []) for s in ("last_subject", "all_but_start"))
    cat, gogh, start = (texts.tokens[t].detach().double()[i] for t, i in (("cat", 1), ("van gogh", 2), ("", 0)))
    assert torch.allclose(short.targets, (cat.outer(cat) + gogh.outer(gogh)) / 2)
    assert torch.allclose(short.crossed, start.outer(cat + gogh) / 2)
    every = torch.cat([texts.tokens[t].detach().double()[1:] for t, _ in pairs])
    assert torch.allclose(long.targets, every.T @ every / 2)
    assert short.invariants.shape == (32, 4)
    assert torch.allclose(short.invariants[:, 0], start)


def test_nothing_is_drawn_and_conditions_are_told(tiny_model):
    edit = fitted(tiny_model)
    info = edit.extras["trace"].info["maps"]
    assert edit.card.cost["forwards"] == 0 == SPEED().cost(tiny_model, TASK)["forwards"]
    assert SPEED().cost(tiny_model, TASK)["steps"] == len(info) == len(edit.deltas)
    assert all(figures["condition"] >= 1 and 0 < figures["free"] < 32 for figures in info.values())
    with pytest.raises(Diverged, match=r"Raise speed's keep_weight, now 1e-30"):
        fitted(tiny_model, keep_weight=1e-30)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"maps": "q"}, "one of v, k, kv"),
        ({"scope": "all"}, "last_subject, all_but_start"),
        ({"threshold": 0}, "above 0"),
        ({"copies": -1}, "at least 0"),
        ({"regulariser": -1}, "at least 0"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        SPEED.build(**fields)

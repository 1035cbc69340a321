"""UCE against its sheet: the regression's theorems, the rows of both code generations, and what changes."""

import pytest
import torch

from efface.core.errors import InvalidMethod
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods.uce import UCE
from efface.ops.ridge import common_factor, ridge, without_component


@pytest.fixture
def g():
    return seeded(0)


def matrices(g, n=5, d=12, o=7):
    return torch.randn(o, d, generator=g).double(), torch.randn(n, d, generator=g).double(), torch.randn(n, d, generator=g).double()


def test_one_context_has_the_closed_form_of_the_sheet(g):
    """W' c = (μ W c + η ‖c‖² v)/(μ + η ‖c‖²), and W' c → v as μ → 0."""
    w, c, v = matrices(g, n=1)
    v = v @ w.T
    for mu, eta in [(0.5, 1.0), (2.0, 3.0)]:
        solved = ridge(w, c, v, torch.tensor([eta]), mu) @ c[0]
        n = c[0].square().sum()
        assert torch.allclose(solved, (mu * w @ c[0] + eta * n * v[0]) / (mu + eta * n))
        assert not torch.allclose(solved, v[0], atol=1e-4)
    assert torch.allclose(ridge(w, c, v, torch.ones(1), 1e-9) @ c[0], v[0], atol=1e-4)


def test_vectors_orthogonal_to_all_contexts_keep_their_output(g):
    w, c, v = matrices(g)
    solved = w @ common_factor(c, v, torch.ones(5), 0.5)
    q = torch.linalg.qr(c.T, mode="complete")[0][:, 5:].T
    assert torch.allclose(solved @ q.T, w @ q.T, atol=1e-9)
    assert not torch.allclose(solved @ c.T, w @ c.T, atol=1e-2)


def test_the_common_factor_is_the_long_form(g):
    w, c, v = matrices(g)
    weights = torch.rand(5, generator=g).double()
    assert torch.allclose(w @ common_factor(c, v, weights, 0.3), ridge(w, c, v @ w.T, weights, 0.3), atol=1e-10)


def test_the_solve_minimises_the_objective(g):
    w, c, v = matrices(g)
    v, weights, mu = v @ w.T, torch.rand(5, generator=g).double(), 0.4
    solved = ridge(w, c, v, weights, mu).requires_grad_(True)

    def objective(m):
        return (weights[:, None] * (c @ m.T - v).square()).sum() + mu * (m - w).square().sum()

    objective(solved).backward()
    assert solved.grad.norm() < 1e-9
    assert objective(solved) < objective(w)


def test_without_component_is_orthogonal_to_the_direction(g):
    n, o = torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g)
    assert abs((without_component(n, o) * o).sum()) < 1e-5 < abs((n * o).sum())


def test_no_regulariser_is_refused(g):
    w, c, v = matrices(g)
    with pytest.raises(ValueError, match="regulariser was 0"):
        common_factor(c, v, torch.ones(5), 0.0)


def fitted(model, task="cat", keep=(), **fields):
    return UCE.build(**fields).fit(model, Task.of(task, keep))


def test_only_the_text_maps_change_and_they_do(tiny_model):
    edit = fitted(tiny_model, keep=["dog"])
    assert edit.names == frozenset(tiny_model.select("text_kv"))
    assert all(delta.abs().max() > 1e-4 for delta in edit.deltas.values())
    assert edit.card.cost["forwards"] == 0


@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_the_concept_moves_to_the_guide_and_the_kept_stays(tiny_model, technique):
    """The concept's row comes nearer to its goal, and a kept concept moves less with its weight than without."""
    name = next(iter(tiny_model.select("text_kv")))
    w = tiny_model.select("text_kv")[name].tensor.detach()
    cat, dog, guide = (tiny_model.encode([t]).tokens[0].detach() for t in ("cat", "dog", ""))

    def moved(rows, edit):
        return (rows @ edit.deltas[name].T).norm()

    edit = fitted(tiny_model, technique=technique, regulariser=0.01)
    goal = guide[:-1] @ w.T
    if technique == "tensor":
        goal = without_component(goal, cat[1:] @ w.T)
    after = cat[1:] @ (w + edit.deltas[name]).T
    assert (after - goal).norm() < 0.7 * (cat[1:] @ w.T - goal).norm()
    kept = fitted(tiny_model, keep=["dog"], technique=technique, keep_weight=10.0)
    free = fitted(tiny_model, technique=technique, keep_weight=10.0)
    assert moved(dog, kept) < 0.5 * moved(dog, free)


def test_a_guide_equal_to_the_concept_or_nothing_to_erase_changes_nothing(tiny_model):
    method = UCE()
    cond = tiny_model.encode(["cat", ""])
    tokens = dict(zip(["cat", ""], cond.tokens.detach(), strict=True))
    weight = {"w": torch.randn(5, 32, generator=seeded(1))}
    same = method.solve(method.rows(tokens, {"cat": 1, "": 0}, [("cat", "cat")], [""]), weight)["w"]
    other = method.solve(method.rows(tokens, {"cat": 1, "": 0}, [("cat", "")], [""]), weight)["w"]
    assert same.abs().max() < 1e-9 < 1e-3 < other.abs().max()


def test_the_rows_of_both_generations(tiny_model):
    """Of "van gogh" (start, van, gogh, end, padding…) 2023 takes gogh to the end, against the guide's rows from its start."""
    texts = ["van gogh", ""]
    tokens = dict(zip(texts, tiny_model.encode(texts).tokens.detach(), strict=True))
    length, last = len(tokens[""]), {"van gogh": 2, "": 0}
    new = UCE.build(preset="2025").rows(tokens, last, [("van gogh", "")], [])
    old = UCE.build(preset="2023").rows(tokens, last, [("van gogh", "")], [""])
    assert [len(part) for part in old.erased[0]] == [length - 2, length - 2]
    assert torch.equal(old.erased[0][0], tokens["van gogh"][2:])
    assert torch.equal(old.erased[0][1], tokens[""][:-2])
    assert [len(rows) for rows in old.kept] == [length]
    assert [len(part) for part in new.erased[0]] == [1, 1]
    assert torch.equal(new.erased[0][0], tokens["van gogh"][2:3])
    assert torch.equal(new.erased[0][1], tokens[""][:1])


def test_the_last_subject_is_found_from_the_mask(tiny_model):
    from efface.methods.uce import _last_subject

    texts = ["van gogh", "", "cat", " "]
    assert _last_subject(texts, tiny_model.encode(texts)) == {"van gogh": 2, "": 0, "cat": 1, " ": 0}


def test_the_kept_weight_of_the_authors_and_the_templates():
    ten = Task.of("style:van gogh -> art", [f"painter {i}" for i in range(20)])
    method = UCE(expand=True)
    alone = method.rows({"": torch.zeros(4, 3)}, {"": 0}, [], [""])
    assert alone.keep_weight == 1.0
    kept = method.kept(ten)
    assert len(kept) == 21
    assert method.rows({t: torch.zeros(4, 3) for t in kept}, dict.fromkeys(kept, 1), [], kept).keep_weight == 0.1
    assert method.pairs(ten)[:2] == [("van gogh", "art"), ("painting by van gogh", "art")]
    assert UCE(expand=True, expand_guide=True).pairs(ten)[1] == ("painting by van gogh", "painting by art")
    assert UCE(expand=True).pairs(Task.of("cat"))[1] == ("image of cat", "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"technique": "delete"}, "expected one of replace, tensor"),
        ({"scope": "end"}, "last_subject_to_end"),
        ({"regulariser": 0}, "above 0"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        UCE.build(**fields)

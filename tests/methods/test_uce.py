"""UCE against its sheet: the rows of both code generations, what changes and what does not. The regression: tests/ops/test_ridge.py."""

import pytest
import tiny
import torch
from longform import ridge

from efface.core.edit import Edit
from efface.core.errors import Diverged, InvalidMethod
from efface.core.sampling import seeded
from efface.core.task import Concept, Swap, Task
from efface.core.textmaps import read
from efface.methods.uce import UCE, orthogonal_change
from efface.models.sd import StableDiffusion
from efface.ops.ridge import Cholesky, Statistics, without_component
from efface.ops.rows import last_subject


def fitted(model, task="cat", keep=(), **fields):
    return UCE.build(**fields).fit(model, Task.of(task, keep))


def test_only_the_text_maps_change_and_they_do(tiny_model):
    edit = fitted(tiny_model, keep=["dog"])
    assert edit.names == frozenset(tiny_model.select("text_kv"))
    assert all(delta.abs().max() > 1e-4 for delta in edit.deltas.values())
    assert edit.card.cost["forwards"] == 0 == UCE().cost(tiny_model, Task.of("cat"))["forwards"]


def test_one_matrix_serves_all_maps_and_the_patch_is_the_same_edit(tiny_model, tmp_path):
    """W'_i = W_i M; kept as the factor, saved and loaded, it expands to the deltas."""
    full = fitted(tiny_model, keep=["dog"])
    patch = fitted(tiny_model, keep=["dog"], form="patch")
    assert not patch.deltas and patch.names == full.names
    loaded = Edit.load(patch.save(tmp_path / "cat.safetensors"))
    slots = tiny_model.select("text_kv")
    dense = patch.patches[0].factor.dense()
    for name, delta in loaded.expand(tiny_model).items():
        assert torch.allclose(delta, full.deltas[name], atol=1e-6)
        assert torch.allclose(slots[name].tensor.detach() @ dense, full.deltas[name], atol=1e-5)
    originals = {name: slot.tensor for name, slot in slots.items()}
    with loaded.attach(tiny_model):
        assert all(torch.allclose(s.tensor, originals[n] + full.deltas[n], atol=1e-5) for n, s in slots.items())
    assert all(slot.tensor is originals[name] for name, slot in slots.items())
    assert sum(t.numel() for t in patch._pack()[0].values()) < 0.3 * sum(t.numel() for t in full.deltas.values())


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


def test_the_tensor_technique_is_the_ridge_with_its_goals():
    g = seeded(0)
    w, blocks = torch.randn(5, 8, generator=g), [(torch.randn(3, 8, generator=g), torch.randn(3, 8, generator=g)) for _ in range(2)]
    contexts = torch.cat([context for context, _ in blocks])
    goals = torch.cat([without_component(n.double() @ w.double().T, c.double() @ w.double().T) for c, n in blocks])
    statistics = Statistics(8)
    statistics.erase(contexts, contexts, 2.0)
    change = orthogonal_change(w, blocks, Cholesky(statistics.gram, 0.3), 2.0)
    assert torch.allclose(w + change, ridge(w, contexts, goals, 2 * torch.ones(6), 0.3), atol=1e-9)


def test_a_guide_equal_to_the_concept_changes_nothing_and_another_does(tiny_model):
    method = UCE()

    def change(guide):
        (statistics,) = method.summed(tiny_model, [("cat", guide)], [""]).values()
        return statistics.solve(0.5).factor.dense().abs().max()

    with torch.no_grad():
        assert change("cat") < 1e-9 < 1e-3 < change("")


def test_erasing_jointly_is_one_solve_and_not_a_product_of_edits(tiny_model):
    joint = fitted(tiny_model, "cat; dog").deltas
    cat, dog = fitted(tiny_model, "cat").deltas, fitted(tiny_model, "dog").deltas
    name = next(iter(joint))
    assert (joint[name] - cat[name] - dog[name]).norm() > 0.05 * joint[name].norm()


def test_the_rows_of_both_generations(tiny_model):
    """Of "van gogh" (start, van, gogh, end, padding…) 2023 takes gogh to the end, against the guide's rows from its start."""
    (texts,) = read(tiny_model, ["van gogh", ""])
    tokens = texts.tokens
    length, pairs = len(tokens[""]), [("van gogh", "")]
    (old,), (new,) = (UCE.build(preset=p).blocks(texts, pairs) for p in ("2023", "2025"))
    assert [len(part) for part in old] == [length - 2, length - 2]  # 75 of CLIP's 77
    assert torch.equal(old[0], tokens["van gogh"][2:])
    assert torch.equal(old[1], tokens[""][:-2])
    assert [len(part) for part in new] == [1, 1]
    assert torch.equal(new[0], tokens["van gogh"][2:3])
    assert torch.equal(new[1], tokens[""][:1])
    (end,) = UCE(scope="end").blocks(texts, pairs)
    assert torch.equal(end[0], tokens["van gogh"][3:4]) and torch.equal(end[1], tokens[""][1:2])


def test_the_two_generations_keep_different_texts():
    task = Task.of("cat", ["dog"])
    assert UCE.build(preset="2023").kept(task) == ["", "dog"]
    assert UCE.build(preset="2025").kept(task) == ["dog"]
    assert UCE.build(preset="2025").beta(["dog"]) == 1.0


def test_the_last_subject_is_found_from_the_mask(tiny_model):
    (texts,) = read(tiny_model, ["van gogh", "", "cat", " "])
    assert {t: last_subject(n) for t, n in texts.lengths.items()} == {"van gogh": 2, "": 0, "cat": 1, " ": 0}


def test_the_kept_weight_of_the_authors_and_the_templates():
    ten = Task.of("style:van gogh -> art", [f"painter {i}" for i in range(20)])
    method = UCE(expand=True)
    assert method.beta([]) == method.beta([""]) == 1.0
    assert len(method.kept(ten)) == 21
    assert method.beta(method.kept(ten)) == 0.1
    assert method.pairs(ten)[:2] == [("van gogh", "art"), ("painting by van gogh", "art")]
    assert UCE(expand=True, expand_guide=True).pairs(ten)[1] == ("painting by van gogh", "painting by art")
    assert UCE(expand=True).pairs(Task.of("cat"))[1] == ("image of cat", "")


def test_more_texts_than_one_batch_give_the_same_sums(tiny_model):
    words = [word for word in tiny.WORDS if word not in ("cat", "dog")][:70]
    swaps = tuple(Swap(Concept(word), Concept("dog")) for word in words)
    method = UCE()
    with torch.no_grad():
        (statistics,) = method.summed(tiny_model, method.pairs(Task(swaps)), ["", "cat"]).values()
        tokens = tiny_model.encode(words).tokens[:, 1:].flatten(0, 1).double()
    assert statistics.count == len(tokens)
    assert torch.allclose(statistics.gram, tokens.T @ tokens)


def test_an_edit_of_a_half_precision_model_is_that_of_the_full_one_within_its_rounding(tiny_model):
    full = fitted(tiny_model, keep=["dog"], preset="2025")
    half = StableDiffusion(tiny.pipeline("epsilon").to(dtype=torch.bfloat16), id="tiny")
    rough = fitted(half, keep=["dog"], preset="2025")
    for name, delta in full.deltas.items():
        assert 0 < (rough.deltas[name] - delta).norm() < 0.1 * delta.norm()


def test_a_solve_without_digits_is_refused_with_what_to_change(tiny_model):
    with pytest.raises(Diverged, match=r"condition number .* Raise uce's regulariser, now 1e-30|singular .* Raise uce's"):
        fitted(tiny_model, regulariser=1e-30)


def test_the_condition_number_is_reported(tiny_model):
    figures = []
    from efface.core.method import Resources

    edit = UCE().fit(tiny_model, Task.of("cat"), resources=Resources(report=lambda step, total, figs: figures.append(figs)))
    (condition,) = edit.extras["trace"].info["condition"]
    assert figures == [{"condition": condition}]
    assert 1 < condition < 1e6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"technique": "delete"}, "expected one of replace, tensor"),
        ({"scope": "begin"}, "last_subject_to_end"),
        ({"regulariser": 0}, "above 0"),
        ({"regulariser": float("inf")}, "above 0"),
        ({"erase_scale": -1}, "at least 0"),
        ({"keep_weight": -0.5}, "keep_weight was -0.5; expected a number of at least 0, or None"),
        ({"technique": "tensor", "form": "patch"}, "form='deltas'"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        UCE.build(**fields)

"""RECE against its sheet: the derived embedding, the hole that it closes, rounds, and the choice among them."""

import pytest
import torch
from longform import ridge

from efface.core.edit import Edit
from efface.core.errors import Diverged, InvalidMethod
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.selection import Verdict
from efface.core.task import Task
from efface.core.textmaps import read
from efface.methods.rece import RECE, derive
from efface.methods.uce import UCE
from efface.ops.ridge import RightFactor, Statistics, weight_gram

D, MAPS, ROWS = 10, 6, 4
PENALTIES = ("zero", "text", "outputs", "inputs", "both")


@pytest.fixture
def toy():
    """Original maps W° (MAPS, o, d), a factor Q − I, rows c and o (ROWS, d), all float64."""
    g = seeded(0)
    w = torch.randn(MAPS, 7, D, generator=g).double()
    change = 0.3 * torch.randn(D, D, generator=g).double()
    c, o = torch.randn(2, ROWS, D, generator=g).double()
    return w, RightFactor(change), c, o


def objective(penalty, rho, w, now, x, c, o):
    """The sheet's objective, summed over rows."""
    value = (x @ now.mT - c @ w.mT).square().sum()
    outputs = rho * (x @ now.mT - c @ now.mT).square().sum()
    inputs = rho * (x - c).square().sum()
    extra = {"zero": rho * x.square().sum(), "text": rho * (x - o).square().sum()}
    return value + {**extra, "outputs": outputs, "inputs": inputs, "both": outputs + inputs}[penalty]


def mapped(found, penalty, c, o):
    return (torch.cat([c, o], 1) if penalty == "text" else c) @ found.matrix.T


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("rho", [1e-3, 0.5])
def test_the_derived_rows_minimise_the_stated_objective(toy, penalty, rho):
    w, factor, c, o = toy
    now = w + w @ factor.dense()
    x = mapped(derive(weight_gram(w), factor, penalty, rho), penalty, c, o).requires_grad_(True)
    objective(penalty, rho, w, now, x, c, o).backward()
    assert x.grad.norm() < 1e-9
    other = derive(weight_gram(w), factor, "both" if penalty == "zero" else "zero", rho)
    y = mapped(other, "zero", c, o).requires_grad_(True)
    objective(penalty, rho, w, now, y, c, o).backward()
    assert y.grad.norm() > 1e-4


def test_without_an_edit_the_rows_shrink_and_return_to_themselves_as_the_weight_falls(toy):
    w, _, c, _ = toy
    still = RightFactor(torch.zeros(D, D))
    lengths = []
    for weight in (10.0, 1.0, 1e-9):
        x = c @ derive(weight_gram(w), still, "zero", weight).matrix.T
        assert (x.norm(dim=1) <= c.norm(dim=1) + 1e-9).all()
        lengths.append(x.norm())
    assert lengths == sorted(lengths)
    assert torch.allclose(x, c, atol=1e-6)


def test_as_the_weight_falls_the_derived_row_is_the_inverse_image(toy):
    w, factor, c, _ = toy
    inverse = torch.linalg.inv(torch.eye(D).double() + factor.dense())
    assert torch.allclose(derive(weight_gram(w), factor, "zero", 1e-9).matrix, inverse, atol=1e-5)
    assert not torch.allclose(derive(weight_gram(w), factor, "zero", 10.0).matrix, inverse, atol=1e-2)


def test_derivation_shows_the_hole_and_the_round_closes_it(tiny_model):
    """After UCE the derived rows give what the target gave before; after the round they give nearly the anchor's outputs."""
    method = RECE(embedding_weight=1e-8, regulariser=1e-3, keep_weight=0.0)
    with torch.no_grad():
        (source,) = method.summed(tiny_model, [("cat", "dog")], [""]).values()
        uce = method.begin(source)
        after, _, _ = method.round(source, uce, source.start)
        (texts,) = read(tiny_model, ["cat", "dog"])
        rows = texts.tokens["cat"].double() @ derive(source.gram, uce, "zero", 1e-8).matrix.T
        w = torch.cat([s.tensor for s in tiny_model.select("text_kv").values()]).double()
        edited, closed = (w + w @ f.dense() for f in (uce, after))
        wanted, anchor = texts.tokens["cat"].double() @ w.T, texts.tokens["dog"].double() @ edited.T
    assert (rows @ edited.T - wanted).norm() < 1e-2 * wanted.norm()
    assert (texts.tokens["cat"].double() @ edited.T - wanted).norm() > 0.1 * wanted.norm()
    assert (rows @ closed.T - anchor).norm() < 0.05 * (rows @ edited.T - anchor).norm()


def test_one_row_leaves_the_residual_of_the_sheet():
    """With one row and nothing kept, W' c' − W a = μ/(μ + η ‖c'‖²) (W c' − W a)."""
    g = seeded(1)
    c, a = torch.randn(2, 1, D, generator=g).double()
    w, mu, eta = torch.randn(5, D, generator=g).double(), 0.3, 2.0
    statistics = Statistics(D)
    statistics.erase(c, a, eta)
    new = w + statistics.solve(mu).factor.change(w)
    factor = mu / (mu + eta * c.square().sum())
    assert torch.allclose(new @ c[0] - w @ a[0], factor * (w @ c[0] - w @ a[0]), atol=1e-9)
    assert factor < 0.1


def deltas(model, task="cat -> dog", keep=("lion",), **fields):
    return RECE.build(**fields).fit(model, Task.of(task, keep)).deltas


def near(a, b, tolerance=1e-5):
    return all(torch.allclose(a[n], b[n], atol=tolerance) for n in a) and a.keys() == b.keys()


def test_no_rounds_is_uce_and_a_round_is_not(tiny_model):
    uce = UCE().fit(tiny_model, Task.of("cat -> dog", ["lion"])).deltas
    assert near(deltas(tiny_model, rounds=0), uce)
    assert not near(deltas(tiny_model, rounds=1), uce, 1e-3)
    assert near(deltas(tiny_model, rounds=0, start="none"), {n: torch.zeros_like(d) for n, d in uce.items()}, 0)


def test_a_large_weight_leaves_the_start(tiny_model):
    """λ → ∞ derives c' = 0, and the erasing solve then changes nothing."""
    assert near(deltas(tiny_model, embedding_weight=1e12), deltas(tiny_model, rounds=0))


def test_the_sums_give_what_a_plain_loop_over_the_maps_gives(tiny_model):
    """Two rounds, two targets, written as the authors' code does: each map by itself, every row at hand."""
    texts = ["cat", "dog", "king", "queen", "", "lion"]
    cat, dog, king, queen, null, lion = tiny_model.encode(texts).tokens.detach().double()
    slots = tiny_model.select("text_kv")
    old = {n: s.tensor.detach().double() for n, s in slots.items()}
    uce = UCE().fit(tiny_model, Task.of("cat -> dog; king -> queen", ["lion"])).deltas
    now = {n: w + uce[n].double() for n, w in old.items()}
    eye = torch.eye(len(cat.T)).double()
    for _ in range(2):
        left = 0.1 * eye + sum(w.T @ w for w in now.values())
        right = sum(w.T @ old[n] for n, w in now.items())
        derived = [c @ torch.linalg.solve(left, right).T for c in (cat, king)]
        for name, w in now.items():
            top, bottom = 0.1 * w, 0.1 * eye
            for c, a in zip(derived, (dog, queen), strict=True):
                top, bottom = top + (a @ w.T).T @ c, bottom + c.T @ c
            for p in (null, lion):
                top, bottom = top + 0.1 * (p @ w.T).T @ p, bottom + 0.1 * p.T @ p
            now[name] = top @ torch.linalg.inv(bottom)
    expected = {n: (w - old[n]).float() for n, w in now.items()}
    found = deltas(tiny_model, "cat -> dog; king -> queen", rounds=2)
    for name, delta in expected.items():
        assert (found[name] - delta).norm() < 1e-3 * delta.norm()
    assert not near(deltas(tiny_model, "cat -> dog; king -> queen", rounds=1), expected, 1e-3)


def test_one_matrix_serves_all_maps_and_the_patch_is_the_same_edit(tiny_model, tmp_path):
    full, patch = (RECE(form=f, rounds=2).fit(tiny_model, Task.of("cat -> dog")) for f in ("deltas", "patch"))
    loaded = Edit.load(patch.save(tmp_path / "cat.safetensors"))
    assert near(loaded.expand(tiny_model), full.deltas)
    assert loaded.names == full.names == frozenset(tiny_model.select("text_kv"))
    (factor,) = (p.factor for p in loaded.patches)
    slots = tiny_model.select("text_kv")
    assert near({n: s.tensor.detach() @ factor.dense() for n, s in slots.items()}, full.deltas)


def test_targets_are_erased_jointly(tiny_model):
    joint, cat, king = (deltas(tiny_model, t) for t in ("cat -> dog; king -> queen", "cat -> dog", "king -> queen"))
    assert any((joint[n] - cat[n] - king[n]).norm() > 0.05 * joint[n].norm() for n in joint)


def test_the_original_reference_is_one_solve_over_everything_erased_so_far(tiny_model):
    """W' = ridge(W°; UCE's rows, the derived rows, the kept rows), while the present reference starts from UCE's maps."""
    with torch.no_grad():
        (source,) = RECE().summed(tiny_model, [("cat", "dog")], [""]).values()
        (texts,) = read(tiny_model, ["cat", "dog", ""])
    cat, dog, null = (texts.tokens[t].detach().double() for t in ("cat", "dog", ""))
    derived = cat @ derive(source.gram, RECE().begin(source), "zero", 0.1).matrix.T
    contexts, goals = torch.cat([cat[1:], derived, null]), torch.cat([dog[1:], dog, null])
    weights = torch.ones(len(contexts))
    weights[-len(null) :] = 0.1
    found = deltas(tiny_model, keep=(), reference="original")
    present = deltas(tiny_model, keep=())
    for name, slot in tiny_model.select("text_kv").items():
        w = slot.tensor.detach().double()
        expected = (ridge(w, contexts, goals @ w.T, weights, 0.1) - w).float()
        assert (found[name] - expected).norm() < 1e-4 * expected.norm()
        assert (present[name] - expected).norm() > 1e-2 * expected.norm()
    assert near(deltas(tiny_model, rounds=0, reference="original"), deltas(tiny_model, rounds=0))


class Judge:
    """A validator that reads its verdicts off a list and remembers the weights that it saw."""

    def __init__(self, *verdicts):
        self.verdicts, self.seen = list(verdicts), []

    def __call__(self, model):
        self.seen.append({n: s.tensor.clone() for n, s in model.select("text_kv").items()})
        return Verdict(*self.verdicts[len(self.seen) - 1])


def judged(model, judge, **fields):
    return RECE.build(**fields).fit(model, Task.of("cat -> dog"), resources=Resources(assets={"validator": judge}))


def test_the_best_round_is_chosen_by_the_validator(tiny_model):
    """Round 1 is better than UCE, round 2 is best but damages too much, round 3 is worse."""
    judge = Judge((1.0, 0.9), (0.8, 0.9), (0.5, 0.85), (0.1, 0.7), (0.6, 0.9))
    originals = {n: s.tensor for n, s in tiny_model.select("text_kv").items()}
    edit = judged(tiny_model, judge, rounds=3)
    assert edit.extras["trace"].info["chosen"] == 1
    assert near(edit.deltas, deltas(tiny_model, keep=(), rounds=1))
    assert near(judge.seen[0], originals, 0)
    assert near({n: w - originals[n] for n, w in judge.seen[3].items()}, deltas(tiny_model, keep=(), rounds=2))
    assert all(s.tensor is originals[n] for n, s in tiny_model.select("text_kv").items())
    lax = judged(tiny_model, Judge((1.0, 0.9), (0.8, 0.9), (0.5, 0.85), (0.1, 0.7), (0.6, 0.9)), rounds=3, tolerated_drop=0.3)
    assert lax.extras["trace"].info["chosen"] == 2


def test_rounds_stop_when_the_target_is_seen_no_more(tiny_model):
    judge = Judge((1.0,), (0.5,), (0.0,))
    edit = judged(tiny_model, judge, rounds=3)
    assert len(judge.seen) == 3 and edit.extras["trace"].info["chosen"] == 1
    done = judged(tiny_model, Judge((1.0,), (0.0,)), rounds=3)
    assert near(done.deltas, deltas(tiny_model, keep=(), rounds=0))


def test_nothing_is_drawn_and_growth_and_conditions_are_told(tiny_model):
    told = []
    resources = Resources(report=lambda step, total, figures: told.append(figures))
    edit = RECE(rounds=2).fit(tiny_model, Task.of("cat"), resources=resources)
    assert edit.card.cost["forwards"] == RECE().cost(tiny_model, Task.of("cat"))["forwards"] == 0
    assert told == edit.extras["trace"].info["rounds"]
    assert all(f["growth"] > 0 and f["condition_derive"] >= 1 and f["condition_erase"] >= 1 for f in told)


def test_an_exploding_round_is_refused_with_what_to_change(tiny_model):
    with pytest.raises(Diverged, match=r"times as long as the target's.*Raise rece's embedding_weight \(1e-08\)"):
        deltas(tiny_model, "cat; dog; king", embedding_weight=1e-8, start_regulariser=1e-3, keep_weight=1e-3)
    with pytest.raises(Diverged, match="Raise rece's embedding_weight"):
        deltas(tiny_model, regulariser=1e-30, keep_weight=0.0)


def test_the_presets_for_each_kind_hold_the_readmes_values():
    assert (RECE.build(preset="unsafe").rounds, RECE.build(preset="style").embedding_weight) == (3, 1e-3)
    assert RECE.build(preset="authors") == RECE.build(preset="object") == RECE()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"penalty": "none"}, "expected one of zero, text"),
        ({"rounds": -1}, "an integer of at least 0"),
        ({"embedding_weight": 0}, "above 0"),
        ({"keep_weight": -0.1}, "at least 0"),
        ({"start_keep_weight": -0.1}, "start_keep_weight was -0.1; expected a number of at least 0, or None"),
        ({"reference": "old"}, "current, original"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        RECE.build(**fields)

"""MACE against its sheet: the words around a concept, adapters that switch attention off, and the fusion of many."""

import pytest
import tiny
import torch
from longform import ridge
from torch import nn

from efface.core.edit import Edit
from efface.core.errors import Diverged, InvalidMethod, InvalidTask
from efface.core.fitting import fitting
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.core.textmaps import read
from efface.methods.mace import MACE, around, fused
from efface.ops.focus import marked_attention
from efface.ops.lowrank import Adapter
from efface.ops.ridge import Cholesky, RightFactor, Statistics

TASK = Task.of("cat -> dog", ["lion"])
QUICK = {"steps": 2, "images": 2, "sentences": 4, "regulariser": 0.1, "general": 0, "keep_weight": 0.1, "fuse_keep_weight": 0.1}


@pytest.fixture
def model(tiny_model):
    tiny_model.default_steps = 2
    return tiny_model


def fitted(model, task=TASK, resources=Resources(), seed=0, **fields):
    return MACE.build(**{**QUICK, **fields}).fit(model, task, seed=seed, resources=resources)


def test_the_words_around_a_name_are_those_of_the_mapped_sentence(model):
    """Start, "a photo of", end and padding stay; nothing of the name does, and both sides have 16 − max(lengths of the phrases)."""
    (texts,) = read(model, ["a photo of van gogh", "a photo of a person", "a photo of king"])
    ours, theirs = around(texts, "a photo of van gogh", "a photo of a person")
    gogh, person = (texts.tokens[t] for t in ("a photo of van gogh", "a photo of a person"))
    kept = [0, 1, 2, 3, 6, *range(7, 16)]
    assert torch.equal(ours, gogh[kept]) and torch.equal(theirs, person[kept])
    ours, theirs = around(texts, "a photo of van gogh", "a photo of king")
    assert len(ours) == len(theirs) == 16 - 2
    assert torch.equal(theirs[:5], texts.tokens["a photo of king"][[0, 1, 2, 3, 5]])


def test_refinement_is_one_matrix_and_the_ridge_over_all_maps(model, tmp_path):
    full = fitted(model, steps=0, null_weight=0.0)
    patch = Edit.load(fitted(model, steps=0, form="patch", null_weight=0.0).save(tmp_path / "cat.safetensors"))
    slots = model.select("text_kv")
    dense = patch.patches[0].factor.dense()
    (texts,) = read(model, [s for t in ("cat", "dog", "lion") for s in (t, *MACE(sentences=4).about(TASK.erase[0].target, t))])
    blocks = [around(texts, *pair) for pair in zip(*(MACE(sentences=4).about(TASK.targets[0], t) for t in ("cat", "dog")), strict=True)]
    contexts, goals = (torch.cat(side).detach().double() for side in zip(*blocks, strict=True))
    kept = torch.cat([texts.tokens[t] for t in texts.tokens if "lion" in t]).detach().double()
    weights = torch.cat([torch.ones(len(contexts)), torch.full((len(kept),), 0.1)])
    for name, slot in slots.items():
        w = slot.tensor.detach().double()
        expected = (ridge(w, torch.cat([contexts, kept]), torch.cat([goals, kept]) @ w.T, weights, 0.1) - w).float()
        assert torch.allclose(full.deltas[name], expected, atol=1e-5) and expected.norm() > 1e-2
        assert torch.allclose(w.float() @ dense, full.deltas[name], atol=1e-5)
    assert full.card.cost["forwards"] == 0


def test_the_weight_of_what_is_kept_enters_once_or_squared(model):
    once, twice, square = (fitted(model, steps=0, **f).deltas for f in ({}, {"keep_squared": True}, {"keep_weight": 0.01}))
    assert all(torch.allclose(twice[n], square[n], atol=1e-6) for n in once)
    assert any(not torch.allclose(once[n], twice[n], atol=1e-4) for n in once)


def test_the_empty_prompt_is_kept_unless_it_has_no_weight(model):
    rows = read(model, [""])[0].tokens[""].detach()

    def moved(**fields):
        return sum((rows @ d.T).norm() for d in fitted(model, Task.of("cat"), steps=0, **fields).deltas.values())

    assert moved() < 0.2 * moved(null_weight=0.0)


def test_captions_are_kept(model):
    captions = [f"{word} beside the {word}" for word in tiny.WORDS[20:60]]
    rows = torch.cat(list(read(model, captions)[0].tokens.values())).detach()

    def moved(resources):
        return sum((rows @ d.T).norm() for d in fitted(model, resources=resources, steps=0, keep_weight=10.0).deltas.values())

    assert moved(Resources(assets={"captions": captions})) < 0.5 * moved(Resources())


def test_without_captions_words_are_kept_and_the_target_is_not(model):
    with fitting(MACE.build(general=30), model, TASK, 0, Resources(exclude=("lion",))) as fit:
        (said, weight), (fewer, _) = fit.method.captions(fit), MACE.build(general=7).captions(fit)
        fit.figures.clear()
    words = [caption.removeprefix("a picture of ") for caption in said]
    assert weight == 1  # of one text to erase
    assert 15 < len(words) <= 30 and 4 <= len(fewer) <= 7 and not {"cat", "lion"} & set(words) and set(words) <= set(model.words())
    rows = torch.cat(list(read(model, said)[0].tokens.values())).detach()

    def moved(**fields):
        return sum((rows @ d.T).norm() for d in fitted(model, steps=0, keep_weight=10.0, **fields).deltas.values())

    assert moved(general=30) < 0.5 * moved()


def test_an_unregularised_system_is_refused_until_captions_span_the_space(model):
    with pytest.raises(Diverged, match=r"Raise mace's regulariser, now 0, or give general captions"):
        fitted(model, Task.of("cat -> dog"), steps=0, sentences=1, regulariser=0.0)
    norms = {n: s.tensor for n, s in model.select("text_encoder").items() if "final_layer_norm" in n}
    with torch.no_grad():  # as it is initialised, the last layer norm's rows sum to zero, and span one dimension less
        for tensor in norms.values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=seeded(5)))
    captions = Resources(assets={"captions": list(tiny.WORDS)})
    assert fitted(model, Task.of("cat -> dog"), captions, steps=0, sentences=1, regulariser=0.0).deltas


def prepared(model, **fields):
    """A fit that has drawn its pictures, and the adapter of its one text."""
    method = MACE.build(**{**QUICK, **fields})
    with fitting(method, model, TASK, 0, Resources(), lr=method.lr) as fit:
        subject = method.subject(fit, TASK.targets[0], "cat")
        factors = {n: s.shared.solve(0.1).factor for n, s in method.summed(model, TASK, ()).items()}
        return method, fit, subject, factors


def test_marked_are_the_name_and_the_ends(model):
    method, _, subject, _ = prepared(model)
    with torch.no_grad():
        ids = model.encode(method.about(TASK.targets[0], "cat")).ids
        cat = model.encode(["cat"]).ids[0, 1]
    end = ids[0, -1]
    assert torch.equal(subject.marked, (ids == cat) | (ids == end))
    _, _, bare, _ = prepared(model, ends=False)
    assert torch.equal(bare.marked, ids == cat)
    assert subject.masks.shape == (2, 8, 8) and 0 < subject.masks.mean() < 1
    assert prepared(model, masks="none")[2].masks is None


def attention(model, subject, adapter=None):
    """Every layer's probabilities for the first picture and sentence."""
    seen = []
    with model.attention() as maps, torch.no_grad():
        maps.watchers.append(seen.append)
        if adapter is None:
            model.predict(subject.latents[:1], 300, subject.cond[:1])
        else:
            with adapter:
                model.predict(subject.latents[:1], 300, subject.cond[:1])
    return seen


def test_an_adapter_starts_as_nothing_and_learns_up_before_down(model):
    method, fit, subject, _ = prepared(model)
    modules = {n: s.owner for n, s in model.select("text_kv").items()}
    g = seeded(0)
    adapter = Adapter(modules, {n: (torch.randn(1, 32, generator=g), torch.zeros(m.out_features, 1)) for n, m in modules.items()})
    before, after = attention(model, subject), attention(model, subject, adapter)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    parts = []
    with model.frozen(), adapter:
        with model.attention() as maps:
            maps.watchers.append(lambda p: parts.append(marked_attention(p, subject.masks[0], subject.marked[0])))
            model.predict(subject.latents[:1], 300, subject.cond[:1])
        loss = torch.stack(parts).sum()
        assert loss > 0
        gradients = torch.autograd.grad(loss, adapter.parameters, allow_unused=True)
    downs, ups = gradients[::2], gradients[1::2]
    assert all(d is None or d.abs().max() == 0 for d in downs)
    keys = [u for n, u in zip(adapter.factors, ups, strict=True) if "to_k" in n]
    assert all(u is not None and u.abs().max() > 0 for u in keys)
    assert all(p.grad is None for c in model.components.values() for p in c.parameters())


def test_training_switches_the_marked_attention_off(model):
    method, fit, subject, factors = prepared(model, steps=12, lr=3e-2)
    (adapter,) = method.adapters(fit, [subject], factors)
    fit.figures.clear()

    def paid(adapter=None):
        maps = attention(model, subject, adapter)
        return sum(marked_attention(a, subject.masks[0], subject.marked[0]) for a in maps)

    assert paid(adapter) < 0.9 * paid()


def kept_and_system(rows, mu, kept=None):
    """E, λ₂ P, and the system of a fusion of one concept."""
    own = rows.T @ rows
    kept = torch.zeros_like(own) if kept is None else kept.T @ kept
    return own, kept, Cholesky(own + kept, mu)


def test_fusion_of_one_concept_whose_rows_span_the_space_is_its_adapter():
    g = seeded(1)
    w, rows = torch.randn(5, 8, generator=g).double(), torch.randn(20, 8, generator=g).double()
    down, up = torch.randn(2, 8, generator=g).double(), torch.randn(5, 2, generator=g).double()
    refined = RightFactor(0.1 * torch.randn(8, 8, generator=g).double())
    own, kept, system = kept_and_system(rows, 0.0)
    expected = refined.change(w) + up @ down
    assert torch.allclose(fused(w, refined, [(down @ own, up)], kept, system), expected, atol=1e-9)
    _, kept, held = kept_and_system(rows, 0.0, 3 * torch.randn(20, 8, generator=g).double())
    assert not torch.allclose(fused(w, refined, [(down @ own, up)], kept, held), expected, atol=1e-2)


def test_fusion_of_several_is_the_stated_optimum_and_beats_the_mean_adapter():
    g = seeded(2)
    d, o, mu = 12, 5, 1e-3
    w, refined = torch.randn(o, d, generator=g).double(), RightFactor(0.2 * torch.randn(d, d, generator=g).double())
    rows = [torch.randn(4, d, generator=g).double() for _ in range(3)]
    adapters = [(torch.randn(1, d, generator=g).double(), torch.randn(o, 1, generator=g).double()) for _ in rows]
    keep = torch.randn(6, d, generator=g).double()
    own = [r.T @ r for r in rows]
    kept = 0.5 * keep.T @ keep
    system = Cholesky(sum(own) + kept, mu)
    first = w + refined.change(w)
    solved = (w + fused(w, refined, [(down @ e, up) for (down, up), e in zip(adapters, own, strict=True)], kept, system)).requires_grad_()

    def goals(v):
        wanted = [(first + up @ down) @ r.T for (down, up), r in zip(adapters, rows, strict=True)]
        return sum((v @ r.T - goal).square().sum() for r, goal in zip(rows, wanted, strict=True))

    (goals(solved) + 0.5 * (solved @ keep.T - w @ keep.T).square().sum() + mu * (solved - first).square().sum()).backward()
    assert solved.grad.norm() < 1e-8
    mean = first + sum(up @ down for down, up in adapters) / 3
    assert goals(solved) < 0.5 * goals(mean)


def test_nothing_but_kept_rows_or_equal_sentences_change_nothing(model):
    statistics = Statistics(8)
    statistics.keep(torch.randn(9, 8, generator=seeded(0)))
    assert statistics.solve(0.1).factor.dense().abs().max() == 0
    (texts,) = read(model, ["a photo of cat"])
    ours, theirs = around(texts, "a photo of cat", "a photo of cat")
    assert torch.equal(ours, theirs) and len(ours) == 16


@pytest.mark.parametrize("fields", [{}, {"masks": "none", "loss": "squared", "focal": False}, {"steps": 0}])
def test_what_is_metered_is_what_was_said(model, fields):
    method = MACE.build(**{**QUICK, **fields})
    task = Task.of("cat -> dog; style:van gogh -> picasso")
    edit = method.fit(model, task)
    said = method.cost(model, task)
    assert {k: edit.card.cost[k] for k in ("forwards", "backwards")} == {k: said[k] for k in ("forwards", "backwards")}
    assert edit.names == frozenset(model.select("text_kv"))


def test_many_are_fused_and_the_model_is_left_alone(model):
    before = {n: (p, p.detach().clone()) for c in model.components.values() for n, p in c.named_parameters()}
    edit = fitted(model, Task.of("cat -> dog; king -> queen", ["lion"]))
    now = {n: p for c in model.components.values() for n, p in c.named_parameters()}
    assert all(now[n] is p and torch.equal(p, old) for n, (p, old) in before.items())
    assert isinstance(next(iter(now.values())), nn.Parameter)
    refined = fitted(model, Task.of("cat -> dog; king -> queen", ["lion"]), steps=0)
    assert any(not torch.allclose(edit.deltas[n], refined.deltas[n], atol=1e-5) for n in edit.deltas)
    assert edit.extras["trace"].tensors["attention"].shape == (4,)
    assert all(c >= 1 for key in ("condition_refine", "condition_fuse") for c in edit.extras["trace"].info[key])
    again = fitted(model, Task.of("cat -> dog; king -> queen", ["lion"]))
    assert all(torch.equal(edit.deltas[n], again.deltas[n]) for n in edit.deltas)


def test_a_killed_fit_goes_on_to_the_same_edit(model, tmp_path):
    class Killed(BaseException):
        pass

    def kill(step, total, figures):
        if step == 3:
            raise Killed

    path = tmp_path / "fit.safetensors"
    whole = fitted(model, steps=4)
    with pytest.raises(Killed):
        fitted(model, steps=4, resources=Resources(checkpoint=path, checkpoint_every=2, report=kill))
    assert path.exists()
    resumed = fitted(model, steps=4, resources=Resources(checkpoint=path, checkpoint_every=2))
    assert all(torch.equal(whole.deltas[n], resumed.deltas[n]) for n in whole.deltas)


def test_pictures_and_masks_can_be_given(model):
    images = torch.rand(3, 3, 64, 64, generator=seeded(0))
    masks = torch.ones(3, 8, 8)
    given = fitted(model, resources=Resources(images={"cat": images}, assets={"masks": {"cat": masks}}))
    assert given.card.cost["forwards"] == 2  # the steps alone
    with pytest.raises(InvalidTask, match="3 masks were given for 2 pictures of 'cat'"):
        fitted(model, resources=Resources(assets={"masks": {"cat": masks}}))


def test_a_text_too_long_for_its_sentences_is_refused(model):
    with pytest.raises(InvalidTask, match="do not fit into the 16 tokens"):
        fitted(model, Task.of("zzzzzzzzzzzzzzzzzzzzzzz -> dog"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "an integer of at least 0"),
        ({"sentences": 31}, "at most 30"),
        ({"masks": "sam"}, "attention, none"),
        ({"lr": 0}, "above 0"),
        ({"regulariser": -1}, "at least 0"),
        ({"form": "patch"}, "unless steps=0"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        MACE.build(**fields)


@pytest.mark.parametrize(
    ("preset", "lr", "steps", "kept", "mu"),
    [
        ("authors", 1e-5, 50, 0.0, 100.0),
        ("authors-identity", 1e-4, 50, 1e-4, 0.0),
        ("authors-style", 1e-4, 50, 1e-4, 0.0),
        ("authors-unsafe", 1e-5, 120, 7e-7, 0.0),
    ],
)
def test_presets_hold_the_released_configs_whatever_the_defaults(preset, lr, steps, kept, mu):
    method = MACE.build(preset=preset)
    assert (method.lr, method.steps, method.keep_weight, method.fuse_keep_weight, method.regulariser) == (lr, steps, kept, kept, mu)
    assert method.keep_squared and (method.null_weight, method.general) == (0.0, 0)

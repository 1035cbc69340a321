"""KPOP against its sheet: its two stages, what each of them trains, recovery with the right key, a wrong one and none, and cost."""

import dataclasses
import math

import pytest
import torch

from efface.core import catalog
from efface.core.edit import Edit, WeightEdit
from efface.core.errors import Diverged, InvalidMethod, Unsupported
from efface.core.key import random_key, unlock
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods.kpop import KPOP, Play

TASK = Task.of("cat", ["dog"])
SMALL = {"steps": 2, "batch": 4, "latent_steps": 2, "trajectories": 2, "tokens": 3}
MODELS = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])


@pytest.fixture
def model(request, fixture):
    return request.getfixturevalue(fixture)


def begun(model, task=TASK, disturbed=False, **fields):
    """The play whose rows are all the latents of its pool; `disturbed`: θ' ≠ θ."""
    for network in model.components.values():
        network.requires_grad_(False)
    play = Play(KPOP(**{**SMALL, **fields}), model, task, seeded(0))
    play.pools[:] = [play.walked()]
    if disturbed:
        g = seeded(9)
        with torch.no_grad():
            for p in play.student.parameters:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    return play


def tokens(play):
    return [p.detach().clone() for side in (play.p_key, play.p_value) for p in side]


def learner(play, lr=0.1):
    return torch.optim.Adam([*play.p_key, *play.p_value], lr=lr)


def change(play):
    return sum(float(d.abs().sum()) for d in play.student.deltas().values())


def sgd(play, lr=1.0):
    return torch.optim.SGD(play.student.parameters, lr=lr)


def state(model):
    modules = [m for network in model.components.values() for m in network.modules()]
    parameters = [p for network in model.components.values() for p in network.parameters()]
    flags = (
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        [(id(p), p.requires_grad) for p in parameters],
    )
    return flags, [*(p.detach().clone() for p in parameters), torch.get_rng_state()]


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


# -- the two stages ------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("space", ["x0", "eps"])
@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_at_step_0_the_erasure_starts_at_its_closed_form(model, eta, space):
    """θ' = θ: the term without the key is (1 + η)² mean(w (ε_e − ε_∅)²)."""
    play = begun(model, eta=eta, loss_space=space)
    rows = play.pools[0]
    with torch.no_grad():
        gap = model.predict(rows.x, rows.told, model.encode(["cat"])) - model.predict(rows.x, rows.told, model.encode([""]))
    weight = model.schedule.x0_weight(rows.level, gap) if space == "x0" else model.schedule.noise_weight(rows.level, gap)
    erase = play.model_step(sgd(play))["erase"]
    assert erase == pytest.approx(float((1 + eta) ** 2 * (weight * gap.square()).mean()), rel=1e-3)


def test_stage_a_moves_the_tokens_alone_and_stage_b_the_weights_alone(tiny_model):
    play = begun(tiny_model, disturbed=True)
    assert sum(p.numel() for p in [*play.p_key, *play.p_value]) == 2 * 3 * 32
    start, moved = tokens(play), change(play)
    play.key_step(learner(play))
    assert change(play) == moved
    assert not any(torch.equal(a, b) for a, b in zip(start, tokens(play), strict=True))
    start = tokens(play)
    play.model_step(torch.optim.Adam(play.student.parameters, lr=1e-3))
    assert change(play) != moved
    assert all(torch.equal(a, b) for a, b in zip(start, tokens(play), strict=True))
    assert all(p.grad is None and not p.requires_grad for network in tiny_model.components.values() for p in network.parameters())


def test_with_noxattn_the_tokens_still_learn_through_frozen_projections(tiny_model):
    play = begun(tiny_model, group="noxattn", disturbed=True)
    assert not any("attn2" in name for name in play.student.tensors)
    first = play.key_step(learner(play))["transfer"]
    assert play.key_step(learner(play))["transfer"] < first


def test_without_weight_on_the_key_it_is_esd(tiny_model):
    """The step is that of ‖ε_θ'(c_e) − G‖² alone, whatever the tokens are; with a weight it is another."""
    moves = {}
    for weight in (0.0, 1.0):
        play = begun(tiny_model, key_weight=weight, disturbed=True)
        rows, before = play.pools[0], play.student.deltas()
        with torch.no_grad():
            empty, cat = (tiny_model.predict(rows.x, rows.told, tiny_model.encode([t])) for t in ("", "cat"))
        with play.student:
            loss = play.distance(rows, tiny_model.predict(rows.x, rows.told, tiny_model.encode(["cat"])), 2 * empty - cat)
            esd = torch.autograd.grad(loss, play.student.parameters)
        figures = play.model_step(sgd(play, 1e-2))
        moves[weight] = [1e2 * (before[n] - d) for n, d in play.student.deltas().items()]
        alike = [torch.allclose(m, g, rtol=1e-2, atol=2e-4 * float(g.abs().max()) + 1e-5) for m, g in zip(moves[weight], esd, strict=True)]
        assert all(alike) is (weight == 0)
        assert ("with key" in figures) is (weight > 0)


@pytest.mark.parametrize("with_key", ["recover", "remove"])
def test_the_term_with_the_key_goes_to_the_concept_or_to_the_goal(tiny_model, with_key):
    play = begun(tiny_model, with_key=with_key, disturbed=True)
    rows = play.pools[0]
    with torch.no_grad():
        empty, cat = (tiny_model.predict(rows.x, rows.told, tiny_model.encode([t])) for t in ("", "cat"))
        with play.student, play.key(rows.target, fixed=True):
            opened = tiny_model.predict(rows.x, rows.told, tiny_model.encode(["cat"]))
    expected = {"recover": cat, "remove": 2 * empty - cat}
    got = play.model_step(sgd(play, 1e-9))["with key"]
    for goal, value in expected.items():
        assert (got == pytest.approx(float(play.distance(rows, opened, value)), rel=1e-2)) is (goal == with_key)


def test_each_row_gets_the_tokens_of_its_own_target(tiny_model):
    play = begun(tiny_model, Task.of(["cat", "car"]), disturbed=True)
    rows = play.pools[0]
    play.pools[0] = dataclasses.replace(rows, target=torch.zeros_like(rows.target))
    start = tokens(play)
    play.key_step(torch.optim.SGD([*play.p_key, *play.p_value], lr=1.0))
    assert [torch.equal(a, b) for a, b in zip(start, tokens(play), strict=True)] == [False, True, False, True]


def test_tokens_begin_as_rows_of_nothing_or_as_noise_of_their_length(tiny_model):
    rows = tiny_model.encode([""]).tokens[0]
    assert all(torch.equal(p, rows[:3]) for p in tokens(begun(tiny_model)))
    key, value = tokens(begun(tiny_model, key_init="noise"))
    assert torch.allclose(key.norm(dim=1), rows[:3].norm(dim=1), rtol=1e-4)
    assert not torch.allclose(key, value)
    assert tokens(begun(tiny_model, tokens=20))[0].shape == (20, 32)


# -- recovery ------------------------------------------------------------------------------------------------------------


def errors(model, edit, prompt, keys):
    """mean ‖ε_θ'(c, key) − ε_θ(c)‖² on fixed noise, for each (key, concept)."""
    g = seeded(77)
    x = torch.randn(8, *model.latent_shape, generator=g)
    t = torch.randint(100, 900, (8,), generator=g)
    with torch.no_grad():
        before, found = model.predict(x, t, model.encode([prompt])), {}
        for name, pair in keys.items():
            with edit.attach(model, check=False):
                if pair is None:
                    found[name] = float((model.predict(x, t, model.encode([prompt])) - before).square().mean())
                else:
                    with unlock(model, *pair):
                        found[name] = float((model.predict(x, t, model.encode([prompt])) - before).square().mean())
    return found


def test_the_right_key_gives_its_concept_back_and_no_other_key_does(tiny_model):
    """Nearer to the un-erased prediction with the right key than with a random one, with the other concept's, and without."""
    settings = {"steps": 25, "batch": 8, "latent_steps": 4, "trajectories": 4, "tokens": 6, "mode": "inmidout", "loss_space": "eps"}
    edit = KPOP(**settings, lr=1e-3, key_lr=3e-2, key_weight=1.0).fit(tiny_model, Task.of(["cat", "car"]))
    key = edit.extras["key"]
    wrong = {f"random {i}": random_key(key, i) for i in range(3)}
    for concept, other in (("cat", "car"), ("car", "cat")):
        keys = {"right": (key, concept), "other": (key, other), "none": None, **{n: (k, concept) for n, k in wrong.items()}}
        found = errors(tiny_model, edit, concept, keys)
        assert found["right"] < 0.85 * min(value for name, value in found.items() if name != "right")


def test_the_key_is_a_file_of_its_own_and_the_public_edit_an_ordinary_change_of_weights(tiny_model, tmp_path):
    before = state(tiny_model)
    edit = KPOP(**SMALL, lr=1e-3).fit(tiny_model, TASK)
    assert same(state(tiny_model), before)
    assert isinstance(edit, WeightEdit)
    assert edit.names == set(tiny_model.select("xattn"))
    path = edit.save(tmp_path / "no-cat.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["no-cat.key.safetensors", "no-cat.safetensors", "no-cat.trace.safetensors"]
    with edit.attach(tiny_model), unlock(tiny_model, edit.extras["key"]):
        opened = tiny_model.sample(["a cat"], steps=2, guidance=3.0)
    again = Edit.load(path)
    with again.attach(tiny_model):
        public = tiny_model.sample(["a cat"], steps=2, guidance=3.0)
        with unlock(tiny_model, again.extras["key"], "cat"):
            assert torch.equal(tiny_model.sample(["a cat"], steps=2, guidance=3.0), opened)
    (tmp_path / "no-cat.key.safetensors").unlink()
    given_away = Edit.load(path)
    assert "key" not in given_away.extras
    with given_away.attach(tiny_model):
        assert torch.equal(tiny_model.sample(["a cat"], steps=2, guidance=3.0), public)
    assert not torch.equal(public, opened)
    assert same(state(tiny_model), before)


def test_to_remove_throws_the_tokens_away(tiny_model):
    assert "key" not in KPOP(**SMALL, with_key="remove").fit(tiny_model, TASK).extras


# -- run -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"key_steps": 2, "refresh": 2}, {"key_weight": 0.0}, {"latent_guidance": 1.0}, {"key_steps": 0}])
def test_the_cost_of_replay_is_known_before(tiny_model, fields):
    method = KPOP(**{**SMALL, **fields})
    edit, expected = method.fit(tiny_model, TASK), method.cost(tiny_model, TASK)
    assert {k: edit.card.cost[k] for k in ("forwards", "backwards")} == {k: expected[k] for k in ("forwards", "backwards")}
    trace = edit.extras["trace"].tensors
    assert len(trace["erase"]) == expected["steps"]
    assert int(trace["erase"].isfinite().sum()) == 2


@pytest.mark.parametrize("latents", ["authors", "aligned"])
def test_the_expected_cost_of_fresh_latents_holds_for_each_draw(tiny_model, latents):
    method = KPOP(**{**SMALL, "latent_steps": 5}, latents=latents)
    expected = method.cost(tiny_model, TASK)["forwards"]
    spent = [method.fit(tiny_model, TASK, seed=seed).card.cost["forwards"] for seed in range(3)]
    assert all(expected.low <= s <= expected.high for s in spent)
    assert len(set(spent)) > 1


def test_tokens_learn_before_weights_in_each_round(tiny_model):
    trace = KPOP(**SMALL, key_steps=2).fit(tiny_model, TASK).extras["trace"].tensors
    assert trace["transfer"].isfinite().tolist() == [True, True, False] * 2
    assert trace["erase"].isfinite().tolist() == [False, False, True] * 2


@MODELS
def test_a_killed_fit_goes_on_to_the_same_edit_and_key(model, tmp_path):
    method = KPOP(**{**SMALL, "steps": 3, "refresh": 4}, lr=1e-3)
    whole, other = (method.fit(model, TASK, seed=seed) for seed in (0, 1))

    def kill(step, total, figures):
        if step == 3:
            raise KeyboardInterrupt

    kept = Resources(checkpoint=tmp_path / "fit.safetensors", checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        method.fit(model, TASK, resources=dataclasses.replace(kept, report=kill))
    resumed = method.fit(model, TASK, resources=kept)
    for a, b, c in zip(*([*e.deltas.values(), *e.extras["key"].tensors.values()] for e in (whole, resumed, other)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) or not a.any()


def test_presets_and_the_card_say_what_is_known(tiny_model):
    import efface.methods.kpop as module

    authors = KPOP.build(preset="authors")
    assert (authors.steps, authors.lr, authors.batch, authors.eta, authors.latent_guidance) == (1000, 1e-5, 1, 1, 3)
    assert (authors.tokens, authors.mode, authors.erase_weight, authors.key_weight) == (10, "mid", 1.0, 0.1)
    assert (authors.key_lr, authors.period, authors.group, authors.with_key) == (1e-5, 2, "xattn", "recover")
    assert KPOP.build(preset="authors-nudity").group == catalog.method("kpop", kind="unsafe").group == "noxattn"
    for name in KPOP.presets:
        assert catalog.method(str(KPOP.build(preset=name))) == KPOP.build(preset=name)
    assert set(KPOP.field_docs()) == {f.name for f in dataclasses.fields(KPOP)}
    assert "A key is not security" in module.__doc__
    assert "Not a reproduction" in module.__doc__
    assert KPOP().memory(tiny_model, TASK) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "kpop's tokens was 0; expected an integer of at least 1"),
        ({"mode": "out"}, "one of mid, midout, inmidout"),
        ({"with_key": "hide"}, "one of recover, remove"),
        ({"key_init": "zero"}, "one of empty, noise"),
        ({"key_lr": 0.0}, "a number above 0"),
        ({"key_weight": math.nan}, "a number of at least 0"),
        ({"batch": 81}, "at most trajectories × latent_steps = 80"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        KPOP(**fields)


def test_a_diverging_fit_and_a_model_without_attention_are_refused(tiny_model):
    from efface.models import tiny

    before = state(tiny_model)
    with pytest.raises(Diverged, match="the model is as it was"):
        KPOP(**SMALL, lr=1e25).fit(tiny_model, TASK)
    assert same(state(tiny_model), before)
    with pytest.raises(Unsupported, match="needs the parameter group"):
        KPOP(**SMALL).fit(tiny.model(tiny.BARE), TASK)

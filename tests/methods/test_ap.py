"""AP against its sheet: the loss and its two players, candidates, what is trained, what it costs, and that the model stays as it was."""

import dataclasses
import math

import pytest
import torch

from efface.core import catalog
from efface.core.edit import Edit
from efface.core.errors import Diverged, InvalidMethod, InvalidTask, Unsupported
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods.ap import AP, Game
from efface.ops.guidance import erase_goal
from efface.ops.gumbel import gumbel_softmax

TASK = Task.of("cat", ["dog"])
SMALL = {"steps": 2, "batch": 4, "latent_steps": 2, "trajectories": 2}
WORDS = Resources(vocabulary=("tiger", "lion", "car", "Cat", "cat", "bus"))
MODELS = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])


@pytest.fixture
def model(request, fixture):
    return request.getfixturevalue(fixture)


def begun(model, task=TASK, resources=WORDS, disturbed=False, **fields):
    """A game whose rows are all the latents of its pools, so that a step's means run over known rows; `disturbed`: θ' ≠ θ."""
    for network in model.components.values():
        network.requires_grad_(False)
    game = Game(AP(**{**SMALL, **fields}), model, task, resources, seeded(0))
    game.pools = game.walked("word", "target")
    if disturbed:
        g = seeded(9)
        with torch.no_grad():
            for p in game.student.parameters:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    return game


def logits(game):
    return torch.stack([p.detach().clone() for p in game.adversary.logits])


def change(game):
    return sum(float(d.abs().sum()) for d in game.student.deltas().values())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def mse(a, b):
    return (a - b).square().mean()


# -- formula -------------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_losses_in_one_space_are_weighted_losses_in_the_other(model, eta):
    """Distances of clean latents equal w_t times those of predictions, and the goal may be formed in either space."""
    s, g = model.schedule, seeded(0)
    x, neutral, target, student = (torch.randn(6, 4, 8, 8, generator=g) for _ in range(4))
    t = torch.tensor([1, 41, 101, 201, 301, 401])
    goal = erase_goal(neutral, target, eta)
    for space, f in {"x0": s.to_x0, "eps": s.to_noise}.items():
        direct = mse(f(x, t, student), erase_goal(f(x, t, neutral), f(x, t, target), eta))
        assert torch.allclose(s.distance(space, t, student, goal), direct, rtol=1e-3)
    assert not torch.allclose(s.distance("x0", t, student, goal), s.distance("eps", t, student, goal), rtol=0.1)


@MODELS
@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("space", ["x0", "eps"])
def test_at_step_0_nothing_is_lost_yet_and_the_erasure_starts_at_its_closed_form(model, eta, space):
    """L2 = 0, L1 = (1 + η)² mean(w (ε_e − ε_∅)²)."""
    game = begun(model, eta=eta, loss_space=space)
    rows = game.pools[1]
    with torch.no_grad():
        gap = model.predict(rows.x, rows.told, model.encode(["cat"])) - model.predict(rows.x, rows.told, model.encode([""]))
        weight = model.schedule.x0_weight(rows.level, gap) if space == "x0" else model.schedule.noise_weight(rows.level, gap)
    losses, _ = game.model_step(sgd(game.student.parameters))
    assert losses["erase"] == pytest.approx(float((1 + eta) ** 2 * (weight * gap.square()).mean()), rel=1e-4)
    assert losses["keep"] < 1e-9
    assert game.model_step(sgd(game.student.parameters))[0]["keep"] > 1e-9


def test_the_target_is_pushed_past_its_anchor(tiny_model):
    game = begun(tiny_model, Task.of("cat -> tiger"), eta=0.0)
    rows = game.pools[1]
    with torch.no_grad():
        cat, tiger, null = (tiny_model.predict(rows.x, rows.told, tiny_model.encode([t])) for t in ("cat", "tiger", ""))
    erase = game.model_step(sgd(game.student.parameters))[0]["erase"]
    assert erase == pytest.approx(float(mse(cat, tiger)), rel=1e-4)
    assert erase != pytest.approx(float(mse(cat, null)), rel=1e-2)


def test_with_the_one_word_nothing_it_is_esd_that_preserves_the_empty_prompt(tiny_model):
    game = begun(tiny_model, Task.of("cat"), Resources(vocabulary=("",)), disturbed=True)
    before, (kept, rows) = game.student.deltas(), game.pools
    empty, cat = tiny_model.encode([""]), tiny_model.encode(["cat"])
    with torch.no_grad():
        goal = 2 * tiny_model.predict(rows.x, rows.told, empty) - tiny_model.predict(rows.x, rows.told, cat)
        held = tiny_model.predict(kept.x, kept.told, empty)
    with game.student:
        erase = mse(tiny_model.predict(rows.x, rows.told, cat), goal)
        keep = mse(tiny_model.predict(kept.x, kept.told, empty), held)
        alone, both = (torch.autograd.grad(loss, game.student.parameters, retain_graph=True) for loss in (erase, erase + keep))
    game.model_step(sgd(game.student.parameters))
    moved = [before[n] - d for n, d in game.student.deltas().items()]
    assert all(torch.allclose(m, g, rtol=1e-2, atol=1e-6) for m, g in zip(moved, both, strict=True))
    assert not all(torch.allclose(m, g, rtol=1e-2, atol=1e-6) for m, g in zip(moved, alone, strict=True))


# -- the two players -----------------------------------------------------------------------------------------------------


def test_an_ascent_is_dead_until_the_student_has_moved(tiny_model):
    game = begun(tiny_model)
    start, climb = logits(game), torch.optim.Adam(game.adversary.logits, lr=0.1)
    game.word_step(climb)
    assert torch.equal(logits(game), start)
    game.model_step(torch.optim.Adam(game.student.parameters, lr=1e-3))
    game.word_step(climb)
    assert not torch.equal(logits(game), start)


def test_each_player_moves_its_own_parameters_only(tiny_model):
    game = begun(tiny_model, disturbed=True)
    start, moved = logits(game), change(game)
    game.model_step(torch.optim.Adam(game.student.parameters, lr=1e-3))
    assert torch.equal(logits(game), start)
    assert change(game) != moved
    start, moved = logits(game), change(game)
    game.word_step(torch.optim.Adam(game.adversary.logits, lr=0.1))
    assert change(game) == moved
    assert not torch.equal(logits(game), start)
    assert all(p.grad is None for network in tiny_model.components.values() for p in network.parameters())


def test_a_word_climbs_through_the_student_alone(tiny_model):
    """The logits' gradient is that of L2 with the frozen branch held constant, and not the full one."""
    game = begun(tiny_model, disturbed=True)
    kept, start = game.pools[0], logits(game)

    def gradient(constant):
        row = start[0].clone().requires_grad_()
        cond = game.embed(gumbel_softmax(row.expand(len(kept), -1), kept.noise, 2.0, True))
        frozen = tiny_model.predict(kept.x, kept.told, cond)
        with game.student:
            loss = mse(tiny_model.predict(kept.x, kept.told, cond), frozen.detach() if constant else frozen)
        return torch.autograd.grad(loss, row)[0]

    game.word_step(sgd(game.adversary.logits))
    moved = logits(game)[0] - start[0]
    finite = start[0].isfinite()
    assert torch.allclose(moved[finite], gradient(constant=True)[finite], rtol=1e-2, atol=1e-8)
    assert not torch.allclose(moved[finite], gradient(constant=False)[finite], rtol=1e-2, atol=1e-8)


def test_a_single_candidate_has_nothing_to_choose(tiny_model):
    for words, same in ((("lion",), True), (("lion", "car"), False)):
        game = begun(tiny_model, Task.of("cat"), Resources(vocabulary=words), disturbed=True)
        start = logits(game)
        game.word_step(sgd(game.adversary.logits))
        assert torch.equal(logits(game), start) is same


def test_hard_words_are_rows_of_the_vocabulary_and_soft_ones_mixtures(tiny_model):
    for hard in (True, False):
        game = begun(tiny_model, hard=hard)
        target, noise = torch.zeros(6, dtype=torch.long), game.adversary.noise(6, game.generator)
        tokens = game.embed(game.adversary.draw(target, noise)).tokens
        rows = [bool((game.table.cond.tokens == t).flatten(1).all(1).any()) for t in tokens.detach()]
        assert all(rows) if hard else not any(rows)


def test_several_targets_have_their_own_candidates_and_logits(tiny_model):
    task = Task.of(["cat", "car"])
    game = begun(tiny_model, task, disturbed=True, centers=0)
    assert "car" in game.method.nearby(tiny_model, Task.of("cat"), WORDS)["cat"]
    assert [sorted(words) for words in game.candidates.values()] == [["bus", "lion", "tiger"]] * 2
    kept = game.pools[0]
    game.pools[0] = dataclasses.replace(kept, target=torch.zeros_like(kept.target))
    start = logits(game)
    game.word_step(torch.optim.Adam(game.adversary.logits, lr=0.1))
    assert torch.equal(logits(game)[1], start[1])
    assert not torch.equal(logits(game)[0], start[0])


@pytest.mark.parametrize("share", [0.5, 0.0, 0.8])
def test_kept_concepts_have_their_share_of_the_first_draws(tiny_model, share):
    game = begun(tiny_model, centers=0, keep_share=share)
    chance = logits(game)[0].softmax(0)
    others = [float(chance[i]) for i, word in enumerate(game.table.words) if word != "dog"]
    assert float(chance[game.table.words.index("dog")]) == pytest.approx(share or 1 / len(game.table.words))
    assert max(others) == pytest.approx(min(others))


def test_without_kept_concepts_and_in_the_authors_run_all_words_start_alike(tiny_model):
    for fields, task in (({}, Task.of("cat")), ({"keep_share": catalog.method("ap(preset='authors')").keep_share}, TASK)):
        chance = logits(begun(tiny_model, task, centers=0, **fields))[0].softmax(0)
        assert torch.allclose(chance, torch.full_like(chance, 1 / len(chance)))


# -- candidates ----------------------------------------------------------------------------------------------------------


def test_candidates_are_the_nearest_words_by_the_whole_encoding(tiny_model):
    found = AP(centers=0, nearest=3).nearby(tiny_model, Task.of("cat"), Resources(vocabulary=tiny_model.words()))["cat"]
    tokens = {w: tiny_model.encode([w]).tokens.detach().flatten() for w in [*tiny_model.words(), "cat"]}
    ranked = sorted((w for w in tokens if w != "cat"), key=lambda w: float((tokens[w] - tokens["cat"]).norm()))
    assert found == ranked[:3]


def test_centers_bound_the_candidates_and_keep_words_join_whatever_is_dropped(tiny_model):
    task, wide = Task.of("cat", ["dog", "van gogh"]), Resources(vocabulary=tiny_model.words())
    for centers in (1, 5):
        found = AP(centers=centers).nearby(tiny_model, task, wide)["cat"]
        assert {"dog", "van gogh"} <= set(found)
        assert len(found) <= centers + 2
    assert found == AP(centers=5).nearby(tiny_model, task, wide)["cat"]
    everything = AP(centers=0).nearby(tiny_model, task, wide)["cat"]
    assert len(everything) == len(set(everything)) > 40


def test_targets_are_left_out_whatever_their_case_unless_told_otherwise(tiny_model):
    task, words = Task.of("Church"), Resources(vocabulary=("church", "CHURCH", "castle", "house", "hot dog"), exclude=("House",))
    assert sorted(AP().nearby(tiny_model, task, words)["Church"]) == ["castle", "hot dog"]
    authors = catalog.method("ap(preset='authors', centers=0)")
    found = authors.nearby(tiny_model, task, words)["Church"]
    assert found[0] == "church"
    assert "hot dog" not in found
    assert torch.allclose(tiny_model.encode(["Church"]).tokens, tiny_model.encode(["church"]).tokens)


def test_no_candidate_left_is_an_error_that_says_what_to_do(tiny_model):
    with pytest.raises(InvalidTask, match="no candidate word is left for 'cat'; give a vocabulary"):
        AP().fit(tiny_model, Task.of("cat"), resources=Resources(vocabulary=("cat", "CAT")))
    assert AP().nearby(tiny_model, TASK, Resources(vocabulary=("cat",)))["cat"] == ["dog"]


# -- fit -----------------------------------------------------------------------------------------------------------------


def state(model):
    """Everything that a fit could leave behind."""
    found = []
    for network in model.components.values():
        found += [(n, id(p), p.requires_grad, p.grad is None) for n, p in network.named_parameters()]
        found += [(n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in network.named_modules()]
    values = [p.detach().clone() for network in model.components.values() for p in network.parameters()]
    return found, [*values, torch.get_rng_state()]


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("latents", ["replay", "aligned", "authors"])
@pytest.mark.parametrize("group", ["xattn", "noxattn"])
def test_a_fit_changes_its_group_and_leaves_the_model_to_the_bit(tiny_model, group, latents):
    tiny_model.components["unet"].train()
    before = state(tiny_model)
    edit = AP(**SMALL, group=group, latents=latents).fit(tiny_model, TASK, resources=WORDS)
    assert same(state(tiny_model), before)
    assert edit.names == set(tiny_model.select(group))
    assert sum(float(d.abs().max()) > 0 for d in edit.deltas.values()) > 0.8 * len(edit.deltas)
    assert all(("attn2" in name) is (group == "xattn") for name in edit.names)
    if group == "noxattn":
        assert not any(".conv_out." in n or "conv_norm_out" in n or "time_embedding" in n for n in edit.names)
    with edit.attach(tiny_model):
        assert not same(state(tiny_model), before)


@MODELS
def test_the_same_seed_gives_the_same_edit(model):
    edits = [AP(**SMALL).fit(model, TASK, seed=seed, resources=WORDS) for seed in (3, 3, 4)]
    first, again, other = ([*e.deltas.values(), *e.extras["trace"].tensors.values()] for e in edits)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(edits[0].deltas.values(), edits[2].deltas.values(), strict=True))


@pytest.mark.parametrize("fields", [{}, {"ascent": 3, "refresh": 3}, {"random_word": True}, {"latent_guidance": 1.0}])
def test_the_cost_of_replay_is_known_before(tiny_model, fields):
    method = AP(**SMALL, **fields)
    edit = method.fit(tiny_model, TASK, resources=WORDS)
    expected = method.cost(tiny_model, TASK)
    assert {k: edit.card.cost[k] for k in ("forwards", "backwards")} == {k: expected[k] for k in ("forwards", "backwards")}
    assert len(edit.extras["trace"].tensors["keep"]) == expected["steps"]


@pytest.mark.parametrize("latents", ["aligned", "authors"])
def test_the_expected_cost_of_fresh_latents_is_the_mean_over_their_walks(tiny_model, latents):
    method = AP(steps=3, batch=2, latents=latents, latent_steps=6)
    game = begun(tiny_model, batch=2, latents=latents, latent_steps=6)
    lengths = []
    for sorts in (("word", "target"), ("word",)):
        for _ in range(20):
            tiny_model.meter.reset()
            rows, parts = game.walked(*sorts), len(sorts)
            assert [len(r) for r in rows] == [2] * parts
            assert tiny_model.meter.forwards == tiny_model.meter.calls * 2 * 2 * parts
            lengths.append(tiny_model.meter.calls)
    mean = sum(6 - k if k and latents == "authors" else 5 - k if latents == "aligned" else 5 for k in range(6)) / 6
    assert set(lengths) == ({1, 2, 3, 4, 5} if latents == "authors" else {0, 1, 2, 3, 4, 5})
    assert method.cost(tiny_model, TASK)["forwards"] == pytest.approx(2 * (5 * 3 + 2 * 3) + mean * 2 * 2 * (2 * 3 + 3))


def test_the_authors_preset_is_the_published_run():
    method = catalog.method("ap(preset='authors')")
    assert (method.steps, method.period, method.lr, method.batch, method.group, method.eta, method.keep_weight) == (
        1000,
        2,
        1e-5,
        1,
        "xattn",
        1,
        1,
    )
    assert (method.nearest, method.centers, method.hard, method.temperature, method.word_lr) == (1000, 100, True, 2.0, 1e-2)
    assert (method.loss_space, method.latents, method.latent_steps, method.latent_guidance) == ("x0", "authors", 50, 3.0)
    assert not method.exclude_targets
    assert method.cost(None, TASK)["forwards"] == 7000 + 25.48 * 2 * 3000
    assert catalog.method("ap", kind="unsafe").group == "noxattn"
    for name in AP.presets:
        assert catalog.method(str(catalog.method(f"ap(preset={name!r})"))) == catalog.method(f"ap(preset={name!r})")
    assert set(AP.field_docs()) == {f.name for f in dataclasses.fields(AP)}


def test_the_ablation_draws_words_but_never_trains_them(tiny_model):
    for random_word in (True, False):
        edit = AP(**{**SMALL, "steps": 6}, random_word=random_word, word_lr=0.1).fit(tiny_model, TASK, resources=WORDS)
        trace = edit.extras["trace"].tensors
        assert torch.equal(trace["logits/cat"][0], trace["logits/cat"][-1]) is random_word
        assert len(trace["word"].unique()) > 1


def test_the_trace_tells_what_happened_and_survives_the_file(tiny_model, tmp_path):
    seen = []
    task = Task.of(["cat", "car"], ["dog"])
    resources = dataclasses.replace(WORDS, report=lambda *figures: seen.append(figures))
    edit = AP(**SMALL).fit(tiny_model, task, seed=1, resources=resources)
    trace = Edit.load(edit.save(tmp_path / "no-cat.safetensors")).extras["trace"]
    assert trace.info["candidates"] == AP(**SMALL).nearby(tiny_model, task, resources)
    for target, words in trace.info["candidates"].items():
        assert trace.tensors[f"logits/{target}"].shape == (4, len(words))
        assert trace.tensors[f"logits/{target}"].isfinite().all()
    assert trace.tensors["word"].shape == (4, 4)
    assert trace.tensors["word"].max() < len(trace.info["words"])
    assert [(step, total) for step, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(trace.tensors["keep"], torch.tensor([f["keep"] for *_, f in seen]))
    assert trace.tensors["erase"].isnan().tolist() == [False, True, False, True]
    assert math.isfinite(seen[2][2]["erase"])


def test_a_loss_that_is_not_finite_stops_the_fit_and_leaves_the_model(tiny_model):
    before = state(tiny_model)
    with pytest.raises(Diverged, match=r"at step 2 of 4, with lr 1e\+30; the model is as it was, try a lower lr"):
        AP(**SMALL, lr=1e30).fit(tiny_model, TASK, resources=WORDS)
    assert same(state(tiny_model), before)


def test_an_interrupted_fit_leaves_the_model(tiny_model):
    def interrupt(step, total, figures):
        raise KeyboardInterrupt

    before = state(tiny_model)
    with pytest.raises(KeyboardInterrupt):
        AP(**SMALL).fit(tiny_model, TASK, resources=dataclasses.replace(WORDS, report=interrupt))
    assert same(state(tiny_model), before)


def test_learning_rates_scale_with_the_model(tiny_model):
    edits = []
    for scale, lr in ((1.0, 5e-4), (50.0, 1e-5), (1.0, 1e-5)):
        tiny_model.lr_scale = scale
        edits.append(AP(**SMALL, lr=lr).fit(tiny_model, TASK, resources=WORDS).deltas)
    a, b, c = (torch.cat([d.flatten() for d in edit.values()]) for edit in edits)
    assert torch.allclose(a, b, atol=1e-6)
    assert float(c.abs().max()) < float(a.abs().max()) / 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "ap's steps was 0; expected an integer of at least 1"),
        ({"steps": 2.5}, "ap's steps was 2.5; expected an integer"),
        ({"lr": 0.0}, "ap's lr was 0.0; expected a number above 0"),
        ({"eta": -1.0}, "ap's eta was -1.0; expected a number of at least 0"),
        ({"keep_weight": math.nan}, "ap's keep_weight was nan"),
        ({"loss_space": "x"}, "ap's loss_space was 'x'; expected one of x0, eps"),
        ({"latents": "fresh"}, "expected one of replay, authors, aligned"),
        ({"batch": 81}, "ap's batch was 81; expected at most trajectories × latent_steps = 80"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message.replace("(", r"\(")):
        AP(**fields)


def test_an_unknown_group_is_refused(tiny_model):
    with pytest.raises(Unsupported, match="did you mean 'xattn'"):
        AP(**SMALL, group="xatn").fit(tiny_model, TASK, resources=WORDS)

"""AGE against §9 of its sheet: both terms, the search's two gradients, mixtures, exclusion, fixed targets, training, costs, presets."""

import dataclasses
import math

import pytest
import torch

from efface.core import catalog
from efface.core.edit import Edit
from efface.core.errors import InvalidMethod, InvalidTask
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods.age import AGE, Game
from efface.ops.guidance import erase_goal

TASK = Task.of("cat", ["dog"])
SMALL = {"steps": 2, "batch": 4, "latent_steps": 2, "trajectories": 2}
"""Rows of a step are all the latents of the trajectories, so that a step's mean runs over known rows."""
WORDS = Resources(vocabulary=("tiger", "lion", "car", "Cat", "cat", "bus"))
MODELS = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])


@pytest.fixture
def model(request, fixture):
    return request.getfixturevalue(fixture)


def begun(model, task=TASK, resources=WORDS, disturbed=False, **fields):
    """A game with its first latents; `disturbed`: θ' ≠ θ."""
    for network in model.components.values():
        network.requires_grad_(False)
    game = Game(AGE(**{**SMALL, **fields}), model, task, resources, seeded(0))
    game.pools[:] = game.walked(*game.method.sorts)
    if disturbed:
        g = seeded(9)
        with torch.no_grad():
            for p in game.student.parameters:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    return game


def logits(game):
    return torch.stack([p.detach().clone() for p in game.adversary.logits])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def weight(game, rows, like):
    s = game.model.schedule
    return (s.x0_weight if game.method.loss_space == "x0" else s.noise_weight)(rows.level, like)


# -- the two terms -------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize(("eta", "space"), [(0.0, "eps"), (1.0, "x0"), (3.0, "eps")])
def test_at_step_0_the_word_is_held_and_the_erasure_starts_at_its_closed_form(model, eta, space):
    """L2 = 0, L1 = (1 + η)² mean(w (ε(c_e) − ε(c_t))²), each row with the word that it was drawn."""
    game = begun(model, eta=eta, loss_space=space)
    rows = game.pools[0]
    with torch.no_grad():
        word = game.embed(game.draw(rows.target, rows.noise))
        gap = model.predict(rows.x, rows.told, game.targets[rows.target]) - model.predict(rows.x, rows.told, word)
    losses, _ = game.model_step(sgd(game.student.parameters))
    expected = float((1 + eta) ** 2 * (weight(game, rows, gap) * gap.square()).mean())
    assert losses["erase"] == pytest.approx(expected, rel=1e-3)
    assert losses["erase"] != pytest.approx((2 + eta) ** 2 / (1 + eta) ** 2 * expected, rel=1e-2)
    assert losses["keep"] < 1e-9
    assert game.model_step(sgd(game.student.parameters))[0]["keep"] > 1e-9


@pytest.mark.parametrize("eta", [0.0, 2.0])
def test_a_word_that_is_the_concept_itself_erases_nothing(tiny_model, eta):
    only = Resources(vocabulary=("cat",))
    game = begun(tiny_model, Task.of("cat"), only, eta=eta, exclude_targets=False)
    assert game.model_step(sgd(game.student.parameters))[0]["erase"] < 1e-9
    other = begun(tiny_model, Task.of("cat"), Resources(vocabulary=("tiger",)), eta=eta)
    assert other.model_step(sgd(other.student.parameters))[0]["erase"] > 1e-5


def test_with_the_empty_prompt_alone_it_is_esd_that_holds_the_empty_prompt(tiny_model):
    game = begun(tiny_model, Task.of("cat"), choice="fixed", disturbed=True)
    before, (rows, kept) = game.student.deltas(), game.pools
    empty, cat = tiny_model.encode([""]), tiny_model.encode(["cat"])
    with torch.no_grad():
        goal = erase_goal(tiny_model.predict(rows.x, rows.told, empty), tiny_model.predict(rows.x, rows.told, cat), 1.0)
        held = tiny_model.predict(kept.x, kept.told, empty)
    with game.student:
        erase = (tiny_model.predict(rows.x, rows.told, cat) - goal).square().mean()
        keep = (tiny_model.predict(kept.x, kept.told, empty) - held).square().mean()
        alone, both = (torch.autograd.grad(loss, game.student.parameters, retain_graph=True) for loss in (erase, erase + keep))
    game.model_step(sgd(game.student.parameters))
    moved = [before[n] - d for n, d in game.student.deltas().items()]
    assert all(torch.allclose(m, g, rtol=1e-2, atol=1e-6) for m, g in zip(moved, both, strict=True))
    assert not all(torch.allclose(m, g, rtol=1e-2, atol=1e-6) for m, g in zip(moved, alone, strict=True))


def test_a_row_has_the_same_concept_and_word_in_both_terms(tiny_model):
    game = begun(tiny_model, Task.of(["cat", "car"]))
    rows, kept = game.latents("target", "word")
    assert torch.equal(rows.noise, kept.noise)
    assert torch.equal(rows.target, kept.target)
    assert not torch.allclose(rows.x, kept.x, atol=1e-4)  # though walked for another prompt


# -- the search ----------------------------------------------------------------------------------------------------------


@MODELS
def test_the_codes_search_is_dead_at_the_start_and_the_papers_is_not(model):
    """At θ' = θ the gradient of L2 is zero, and that of L1 through the frozen network is not."""
    for grad, dead in (("l2_only", True), ("full", False)):
        game = begun(model, target_grad=grad, temperature=1.0)
        start = logits(game)
        game.word_step(sgd(game.adversary.logits))
        moved = (logits(game) - start)[start.isfinite()].abs().max()
        assert bool(moved < 1e-9) is dead
        assert all(p.grad is None for network in model.components.values() for p in network.parameters())


def whole(game, terms):
    """The gradient of terms of the objective by the logits, from one graph; latents constants."""
    rows, kept, start = *game.pools, logits(game)
    row = start[0].clone().requires_grad_()
    soft = ((row + kept.noise) / game.method.temperature).softmax(-1)
    index = soft.topk(game.method.topk).indices
    mixture = soft * torch.zeros_like(soft).scatter(-1, index, 1.0)
    word = game.embed(mixture / mixture.sum(-1, keepdim=True))
    frozen, before = game.model.predict(rows.x, rows.told, word), game.model.predict(kept.x, kept.told, word)
    with game.student:
        after = game.model.predict(kept.x, kept.told, word)
        erased = game.model.predict(rows.x, rows.told, game.targets[rows.target]).detach()
    parts = {"L1": game.distance(rows.level, erased, frozen), "L2": 0.7 * game.distance(kept.level, after, before)}
    parts["L2 student"] = 0.7 * game.distance(kept.level, after, before.detach())
    return torch.autograd.grad(sum(parts[name] for name in terms), row)[0]


@pytest.mark.parametrize(("grad", "terms", "wrong"), [("l2_only", ["L2 student"], ["L2"]), ("full", ["L1", "L2"], ["L2"])])
def test_the_search_climbs_the_terms_that_it_names(tiny_model, grad, terms, wrong):
    """Slopes taken network by network are the gradient of the whole objective (full), or λ times that of L2 by the student (l2_only)."""
    game = begun(tiny_model, disturbed=True, target_grad=grad, temperature=1.0, keep_weight=0.7)
    start, finite = logits(game), logits(game)[0].isfinite()
    right, other = whole(game, terms), whole(game, wrong)
    game.word_step(sgd(game.adversary.logits))
    moved = (logits(game) - start)[0]
    scale = float(right[finite].abs().max())
    assert torch.allclose(moved[finite], right[finite], rtol=1e-2, atol=1e-3 * scale)
    assert not torch.allclose(moved[finite], other[finite], rtol=1e-2, atol=1e-2 * scale)


def test_each_move_changes_its_own_parameters_only(tiny_model):
    game = begun(tiny_model, disturbed=True, temperature=1.0)

    def weights():
        return torch.cat([p.detach().flatten() for p in game.student.parameters])

    before, start = weights(), logits(game)
    game.word_step(torch.optim.Adam(game.adversary.logits, lr=0.1))
    assert torch.equal(weights(), before)
    assert not torch.equal(logits(game), start)
    start = logits(game)
    game.model_step(torch.optim.Adam(game.student.parameters, lr=1e-3))
    assert torch.equal(logits(game), start)
    assert not torch.equal(weights(), before)


def test_the_papers_search_leaves_the_concept_itself_and_the_codes_does_not(tiny_model):
    """§8: with the concept among its own candidates, climbing L1 goes to the other word; L2 alone stays even at θ' = θ."""
    chances = {}
    for grad in ("full", "l2_only"):
        pair = Resources(vocabulary=("cat", "tiger"))
        game = begun(tiny_model, Task.of("cat"), pair, target_grad=grad, temperature=1.0, exclude_targets=False)
        climb = torch.optim.Adam(game.adversary.logits, lr=0.3)
        for _ in range(12):
            game.word_step(climb)
        chances[grad] = dict(game.targeted()["cat"])
    assert chances["full"]["tiger"] > 0.9
    assert chances["l2_only"]["tiger"] == pytest.approx(0.5, abs=1e-4)


# -- words ---------------------------------------------------------------------------------------------------------------


def test_soft_draws_mix_at_most_topk_words_and_hard_ones_are_one(tiny_model):
    words = Resources(vocabulary=tuple(tiny_model.words()))
    for hard, topk, most in ((False, 2, 2), (False, 5, 5), (True, 5, 1)):
        game = begun(tiny_model, resources=words, hard=hard, topk=topk, temperature=2.0)
        draw = game.draw(torch.zeros(20, dtype=torch.long), game.adversary.noise(20, game.generator)).detach()
        assert set((draw > 0).sum(-1).tolist()) == {most}
        assert torch.allclose(draw.sum(-1), torch.ones(20))
    plain = begun(tiny_model, resources=words, topk=1000, temperature=2.0)
    noise = plain.adversary.noise(5, plain.generator)
    drawn = plain.draw(torch.zeros(5, dtype=torch.long), noise).detach()
    assert torch.allclose(drawn, ((logits(plain)[0] + noise) / 2).softmax(-1), atol=1e-6)


def test_no_concept_to_erase_is_a_candidate_of_another_unless_in_the_authors_mode(tiny_model):
    """§8: erasing all dogs at once, each would be the nearest word of the next."""
    task, words = Task.of(["Cat", "tiger", "lion"]), Resources(vocabulary=("cat", "TIGER", "lion", "bus", "car"), exclude=("Bus",))
    assert list(AGE().candidates(tiny_model, task, words).values()) == [["car"]] * 3
    found = catalog.method("age(preset='authors')").candidates(tiny_model, task, words)
    assert all({"cat", "TIGER", "lion"} <= set(near) for near in found.values())
    assert found["Cat"][0] == "cat"
    with pytest.raises(InvalidTask, match="no candidate word is left for 'cat'"):
        AGE().fit(tiny_model, Task.of("cat"), resources=Resources(vocabulary=("cat", "CAT")))


def test_anchors_are_fixed_targets_and_need_no_search(tiny_model):
    """Synonym, neighbour, general word, unrelated, empty: as anchors."""
    for anchor in ("kitten", "tiger", "animal", "bus"):
        task = Task.of(f"cat -> {anchor}")
        assert AGE().candidates(tiny_model, task) == {"cat": [anchor]}
        assert AGE().period(task) == 1
    edit = AGE(**SMALL, choice="fixed").fit(tiny_model, Task.of("cat"))
    assert edit.extras["trace"].info["targets"] == {"cat": [("", 1.0)]}
    mixed = Task.of("cat -> tiger; car")
    assert AGE().candidates(tiny_model, mixed, WORDS)["cat"] == ["tiger"]
    assert set(AGE().candidates(tiny_model, mixed, WORDS)["car"]) == {"tiger", "lion", "bus"}
    assert AGE().period(mixed) == 2
    fitted = AGE(**{**SMALL, "steps": 4}, word_lr=0.1).fit(tiny_model, mixed, resources=WORDS)
    assert set(fitted.extras["trace"].info["targets"]) == {"cat", "car"}


def test_the_authors_fixed_mapping_holds_the_empty_prompt_on_the_concepts_latents(tiny_model):
    game = begun(tiny_model, Task.of("cat -> tiger"), choice="fixed", hold="empty", keep_weight=0.1, disturbed=True)
    (rows,) = game.pools
    empty, tiger, cat = (tiny_model.encode([text]) for text in ("", "tiger", "cat"))
    with torch.no_grad():
        before, word, away = (tiny_model.predict(rows.x, rows.told, c) for c in (empty, tiger, cat))
        with game.student:
            after, erased = (tiny_model.predict(rows.x, rows.told, c) for c in (empty, cat))
    figures, _ = game.model_step(sgd(game.student.parameters))
    assert figures["keep"] == pytest.approx(float((after - before).square().mean()), rel=1e-3)
    assert figures["erase"] == pytest.approx(float((erased - (2 * word - away)).square().mean()), rel=1e-3)
    with pytest.raises(InvalidMethod, match="'target' where the word is learned"):
        AGE(hold="empty")


def test_the_final_target_is_part_of_the_edit_and_survives_the_file(tiny_model, tmp_path):
    task = Task.of(["cat", "car"], ["dog"])
    edit = AGE(**{**SMALL, "steps": 6}, word_lr=0.2, temperature=1.0).fit(tiny_model, task, resources=WORDS)
    trace = Edit.load(edit.save(tmp_path / "no-cat.safetensors")).extras["trace"]
    for text, listed in trace.info["targets"].items():
        words = trace.info["candidates"][text]
        last = dict(zip(words, trace.tensors[f"logits/{text}"][-1].softmax(-1).tolist(), strict=True))
        assert [chance for _, chance in listed] == sorted((chance for _, chance in listed), reverse=True)
        assert {word: pytest.approx(last[word], abs=1e-5) for word, _ in listed} == dict(listed)
        assert listed[0][1] > 1 / len(words) + 1e-3
    assert trace.tensors["word"].shape == (12, 4)


# -- fit, cost, presets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"hard": True}, {"target_grad": "l2_only"}, {"latents": "aligned"}, {"latents": "authors"}, {}])
def test_a_fit_changes_its_group_and_leaves_the_model_to_the_bit(tiny_model, fields):
    before = [p.detach().clone() for network in tiny_model.components.values() for p in network.parameters()]
    edit, again = (AGE(**SMALL, **fields).fit(tiny_model, TASK, seed=1, resources=WORDS) for _ in range(2))
    after = [p for network in tiny_model.components.values() for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert edit.names == set(tiny_model.select("xattn"))
    assert all("attn2" in name for name in edit.names)
    assert all(torch.equal(edit.deltas[n], again.deltas[n]) for n in edit.deltas)
    assert sum(float(d.abs().max()) > 0 for d in edit.deltas.values()) > 0.8 * len(edit.deltas)


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({}, TASK),
        ({"ascent": 3, "refresh": 3}, TASK),
        ({"target_grad": "l2_only"}, TASK),
        ({"choice": "random"}, TASK),
        ({"choice": "fixed", "hold": "empty"}, TASK),
        ({"latent_guidance": 1.0}, Task.of("cat -> tiger")),
    ],
)
def test_the_cost_of_replay_is_known_before(tiny_model, fields, task):
    method = AGE(**{**SMALL, **fields})
    edit, expected = method.fit(tiny_model, task, resources=WORDS), method.cost(tiny_model, task)
    assert {k: edit.card.cost[k] for k in ("forwards", "backwards")} == {k: expected[k] for k in ("forwards", "backwards")}
    assert len(edit.extras["trace"].tensors["keep"]) == expected["steps"]


@pytest.mark.parametrize("fields", [{"latents": "aligned"}, {"latents": "authors", "target_grad": "l2_only"}])
def test_the_cost_of_fresh_latents_lies_within_its_bounds(tiny_model, fields):
    method = AGE(steps=4, batch=2, latent_steps=4, **fields)
    expected = method.cost(tiny_model, TASK)
    spent = [method.fit(tiny_model, TASK, seed=s, resources=WORDS).card.cost["forwards"] for s in range(3)]
    assert all(expected["forwards"].low <= value <= expected["forwards"].high for value in spent)
    assert sum(spent) / 3 == pytest.approx(expected["forwards"], rel=0.3)


def test_the_ablations_of_the_sheet_are_settings(tiny_model):
    """Random, learned discrete, learned mixture: only the learned ones move their logits."""
    for fields, moves in (({"choice": "random"}, False), ({"hard": True}, True), ({}, True)):
        edit = AGE(**{**SMALL, "steps": 4}, word_lr=0.1, **fields).fit(tiny_model, TASK, resources=WORDS)
        trace = edit.extras["trace"].tensors["logits/cat"]
        assert (not torch.equal(trace[0], trace[-1])) is moves


def test_presets_are_the_published_runs():
    objects, nudity, style, paper, naive = (
        catalog.method(f"age(preset={name!r})") for name in ("authors", "authors-nudity", "authors-style", "paper", "naive")
    )
    for m in (objects, nudity, style):
        assert (m.steps, m.lr, m.batch, m.eta, m.keep_weight, m.ascent, m.latent_guidance) == (1000, 1e-5, 1, 1.0, 1.0, 1, 3.0)
        assert (m.latents, m.latent_steps, m.loss_space, m.target_grad, m.exclude_targets) == ("authors", 50, "x0", "l2_only", False)
    assert [(m.group, m.nearest, m.centers, m.temperature, m.hard, m.topk, m.word_lr) for m in (objects, nudity, style)] == [
        ("xattn", 100, 100, 0.1, True, 2, 1e-2),
        ("noxattn", 100, 100, 2.0, True, 2, 1e-2),
        ("xattn", 1000, 100, 2.0, False, 5, 1e-3),
    ]
    assert (paper.eta, paper.target_grad, paper.hard, paper.loss_space) == (0.0, "full", False, "eps")
    assert paper.temperature < 1
    assert (naive.choice, naive.hold, naive.keep_weight, naive.loss_space, naive.steps) == ("fixed", "empty", 0.1, "eps", 1000)
    assert catalog.method("age", kind="unsafe").group == "noxattn"


def test_a_killed_fit_goes_on(tiny_model, tmp_path):
    method, path = AGE(**{**SMALL, "steps": 4, "refresh": 3, "batch": 2}), tmp_path / "fit.safetensors"

    def kill(step, total, figures):
        if step == 6:
            raise KeyboardInterrupt

    uncut = method.fit(tiny_model, TASK, seed=1, resources=WORDS)
    with pytest.raises(KeyboardInterrupt):
        method.fit(tiny_model, TASK, seed=1, resources=dataclasses.replace(WORDS, checkpoint=path, checkpoint_every=5, report=kill))
    again = method.fit(tiny_model, TASK, seed=1, resources=dataclasses.replace(WORDS, checkpoint=path))
    assert all(torch.equal(uncut.deltas[n], again.deltas[n]) for n in uncut.deltas)
    assert uncut.extras["trace"].info == again.extras["trace"].info


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "age's steps was 0; expected an integer of at least 1"),
        ({"topk": 0}, "age's topk was 0; expected an integer of at least 1"),
        ({"temperature": 0.0}, "age's temperature was 0.0; expected a number above 0"),
        ({"keep_weight": math.nan}, "age's keep_weight was nan"),
        ({"target_grad": "l1"}, "age's target_grad was 'l1'; expected one of full, l2_only"),
        ({"choice": "best"}, "expected one of learned, random, fixed"),
        ({"batch": 81}, "age's batch was 81; expected at most trajectories × latent_steps = 80"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        AGE(**fields)

"""SPM against its sheet: the loss, latent anchoring, where membranes stand, their gate, cost and independence."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

from efface.core import catalog
from efface.core.edit import Edit, LowRankEdit
from efface.core.errors import Diverged, InvalidMethod, Unsupported
from efface.core.method import Resources
from efface.core.sampling import noise_for, seeded
from efface.core.task import Concept, Swap, Task
from efface.methods.spm import SPM, Membrane, authors_route, maps, rate_factor, start, surrogates

TASK = Task.of("cat", ["dog"])
SMALL = {"steps": 3, "batch": 2, "anchors": 2, "latent_steps": 3, "trajectories": 2}
MODELS = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])


@pytest.fixture
def model(request, fixture):
    return request.getfixturevalue(fixture)


def begun(model, swap=TASK.erase[0], **fields):
    for network in model.components.values():
        network.requires_grad_(False)
    return Membrane(SPM(**{**SMALL, "batch": 6, **fields}), model, swap, seed=0)


def state(model):
    """Everything that a fit could leave behind."""
    modules = [m for network in model.components.values() for m in network.modules()]
    hooks = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    parameters = [p for network in model.components.values() for p in network.parameters()]
    return hooks, [(id(p), p.requires_grad) for p in parameters], [p.detach().clone() for p in parameters] + [torch.get_rng_state()]


def same(a, b):
    return a[:2] == b[:2] and all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))


# -- loss ----------------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
def test_at_step_0_the_membrane_is_neutral_and_the_loss_has_its_closed_form(model, eta):
    """U = 0: a = p, so that L_e = (1 + η)² mean((p − n)²) in noise, and L_a = 0 exactly."""
    membrane = begun(model, eta=eta)
    figures = membrane.step(0, 1e-3)
    rows, (prompt, null) = membrane.pools[0], (model.encode([t]) for t in ("cat", ""))
    with torch.no_grad():
        p, n = (model.schedule.to_noise(rows.x, rows.told, model.predict(rows.x, rows.told, c)) for c in (prompt, null))
    assert figures["erase"] == pytest.approx(float((1 + eta) ** 2 * (p - n).square().mean()), rel=1e-3)
    assert figures["keep"] == 0
    for number in range(1, 4):
        figures = membrane.step(number, 1e-1)
    assert figures["keep"] > 0


def test_a_target_that_is_its_own_anchor_has_nothing_to_erase(tiny_model):
    swap = Swap(Concept("cat"), Concept("other name", prompts=("cat",)))
    membrane = begun(tiny_model, swap)
    assert [membrane.step(i, 1e-2)["erase"] for i in range(3)] == [0, 0, 0]
    assert begun(tiny_model).step(0, 1e-2)["erase"] > 1e-5


def test_first_gradients_reach_every_up_and_no_down(tiny_model):
    membrane = begun(tiny_model)
    before = membrane.adapter.learned()
    membrane.optimiser = torch.optim.SGD(membrane.adapter.parameters, lr=0.0)
    membrane.method = dataclasses.replace(membrane.method, warmup=0.0)
    membrane.step(0, 1.0)
    after = membrane.adapter.learned()
    assert all(torch.equal(before[n][0], after[n][0]) for n in after)
    assert all(float((before[n][1] - after[n][1]).abs().max()) > 0 for n in after)
    assert all(p.grad is None and not p.requires_grad for network in tiny_model.components.values() for p in network.parameters())
    membrane.step(1, 1.0)
    assert any(not torch.equal(before[n][0], d) for n, (d, _) in membrane.adapter.learned().items())


def test_erasing_moves_the_prediction_to_its_goal_and_anchoring_holds_the_rest(tiny_model):
    """Many steps on fixed rows: L_e falls; and with anchoring, surrogate concepts move less than without, at equal steps."""
    moved = {}
    for weight in (0.0, 1000.0):
        membrane = begun(tiny_model, keep_weight=weight, warmup=0.0, cycles=1, steps=40, refresh=1000, batch=3, trajectories=1)
        figures = [membrane.step(i, 1e-2) for i in range(10)]
        moved[weight] = figures[-1]["keep"]
        assert figures[-1]["erase"] < 0.5 * figures[0]["erase"] or weight
    assert moved[1000.0] < 0.2 * moved[0.0]


def test_without_anchors_it_only_erases(tiny_model):
    figures = begun(tiny_model, anchors=0).step(0, 1e-3)
    assert figures["keep"] == 0
    assert figures["erase"] == pytest.approx(begun(tiny_model).step(0, 1e-3)["erase"], rel=1e-4)


# -- surrogate concepts --------------------------------------------------------------------------------------------------


def test_surrogates_have_the_concept_s_length_and_no_direction_of_their_own():
    target = torch.randn(3, 16, 64, generator=seeded(1))
    z = surrogates(target, 50, seeded(0))
    assert z.shape == (150, 16, 64)
    ratio = z.flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1).repeat_interleave(50)
    assert 0.8 <= ratio.min() < 0.85
    assert 1.15 < ratio.max() <= 1.2
    cosine = torch.cosine_similarity(z.flatten(1), target.flatten(1).repeat_interleave(50, 0), dim=1)
    assert cosine.abs().mean() < 0.05
    wide = surrogates(torch.randn(1, 77, 768, generator=seeded(2)), 4, seeded(3)).flatten(1)
    assert torch.cosine_similarity(wide, torch.randn(1, 77, 768, generator=seeded(2)).flatten(1), dim=1).abs().max() < 0.02


def test_surrogates_near_the_concept_are_rejected_in_proportion():
    """In one dimension u = ±1: the concept's own direction is never accepted; in two the mean cosine is −(1/4)/(1 − 1/π), for an
    acceptance of min(1, 1 − cos)."""
    assert torch.all(surrogates(torch.ones(1, 1, 1), 100, seeded(0)) < 0)
    plane = surrogates(torch.tensor([[[1.0, 0.0]]]), 4000, seeded(0)).flatten(1)
    assert float((plane[:, 0] / plane.norm(dim=1)).mean()) == pytest.approx(-0.25 / (1 - 1 / math.pi), abs=0.03)


# -- membranes and their gate --------------------------------------------------------------------------------------------


def test_there_are_192_membranes_of_423936_numbers_on_sd_1_4():
    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    from skeleton import skeleton

    found = maps(skeleton("sd1"))
    assert len(found) == 192
    assert sum(m.weight[0].numel() + len(m.weight) for m in found.values()) == 423_936


def test_down_starts_within_kaimings_bound_and_up_at_zero():
    down, up = start(torch.nn.Conv2d(8, 5, 3), seeded(0))
    assert (down.shape, up.shape) == ((1, 8, 3, 3), (5, 1, 1, 1))
    assert 0.9 / 72**0.5 < down.abs().max() <= 1 / 72**0.5
    assert not up.any()


@MODELS
def test_a_fit_leaves_the_model_and_returns_a_gated_adapter(model, tmp_path):
    before = state(model)
    edit = SPM(**SMALL, lr=1e-2).fit(model, TASK)
    assert same(state(model), before)
    assert isinstance(edit, LowRankEdit)
    assert set(edit.factors) == {f"{name}.weight" for name in maps(model)}
    assert edit.gate.texts == (("cat",),)
    assert "at full strength on every prompt" in edit.lost_in_weights
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    with edit.attach(model), torch.no_grad():
        assert not same(state(model), before)
        pictures = model.sample(["cat"], steps=2, guidance=3.0)
    with again.attach(model):
        assert torch.equal(model.sample(["cat"], steps=2, guidance=3.0), pictures)
    assert same(state(model), before)


def test_attached_a_prompt_with_the_concept_moves_more_than_one_without(tiny_model):
    edit = SPM(**SMALL, lr=1e-2, transport="tokenuni").fit(tiny_model, TASK)
    x = noise_for(0, 1, tiny_model.latent_shape)

    @torch.no_grad()
    def predicted():
        return [tiny_model.predict(x, 400, tiny_model.encode([p])) for p in ("a cat", "a dog")]

    before = predicted()
    with edit.attach(tiny_model):
        cat, dog = ((a - b).abs().max() for a, b in zip(predicted(), before, strict=True))
    with edit.ungated().attach(tiny_model):
        plain = (predicted()[1] - before[1]).abs().max()
    assert dog == 0 < plain
    assert cat > 0


def test_several_targets_are_fitted_as_if_each_were_alone(tiny_model):
    """Membranes are independent: those of a joint fit are those of single fits, and they add up."""
    method = SPM(**SMALL, lr=1e-2)
    both = method.fit(tiny_model, Task.of(["cat", "car"]))
    alone = [method.fit(tiny_model, Task.of(word)) for word in ("cat", "car")]
    for name, (down, up) in both.factors.items():
        assert torch.equal(down, torch.cat([e.factors[name][0] for e in alone]))
        assert torch.equal(up, torch.cat([e.factors[name][1] for e in alone], 1))
    with both.attach(tiny_model):
        together = tiny_model.sample(["a cat"], steps=2, guidance=3.0)
    with alone[0].attach(tiny_model), alone[1].attach(tiny_model):
        assert torch.allclose(tiny_model.sample(["a cat"], steps=2, guidance=3.0), together, atol=1e-4)


def test_the_trace_holds_how_far_the_gate_leaks(tiny_model):
    task = Task.of([Concept("cat", prompts=("cat", "kitten")), "car"], ["dog"])
    edit = SPM(**SMALL).fit(tiny_model, task)
    leaks = edit.extras["trace"].info["transport"]
    assert set(leaks) == {"cat", "kitten", "car", "", "dog"}
    assert leaks["cat"][0] == leaks["kitten"][0] == leaks["car"][1] == 1
    assert 0 < leaks["dog"][0] < 1
    assert edit.gate.texts == (("cat", "kitten"), ("car",))
    assert len(edit.extras["trace"].tensors["erase"]) == 6


# -- run -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"anchors": 0}, {"latent_guidance": 1.0}, {"refresh": 2}])
def test_the_cost_of_replay_is_known_before(tiny_model, fields):
    method, task = SPM(**{**SMALL, **fields}), Task.of(["cat", "car"])
    edit, expected = method.fit(tiny_model, task), method.cost(tiny_model, task)
    assert {k: edit.card.cost[k] for k in ("forwards", "backwards")} == {k: expected[k] for k in ("forwards", "backwards")}
    assert len(edit.extras["trace"].tensors["erase"]) == expected["steps"] == 6


def test_the_authors_walk_and_its_expected_cost(tiny_model):
    routes = [authors_route(1000, 30, 2, seeded(i)) for i in range(200)]
    lengths = [len(r.times) - 1 for r in routes]
    assert set(lengths) == set(range(1, 30))
    for k, r in zip(lengths, routes, strict=True):
        assert r.times[:, 0].tolist() == [957 - 33 * j for j in range(k + 1)]
        assert r.told.tolist() == [[999 - int(k * 1000 / 30)] * 2]
    assert (max(r.told.max() for r in routes), min(r.told.min() for r in routes)) == (966, 33)
    method = SPM.build(preset="authors", steps=2, latent_steps=3, anchors=1)
    cost = method.cost(tiny_model, TASK)
    assert cost["forwards"] == 2 * 5 + 2 * 2 * 1.5
    assert (cost["forwards"].low, cost["forwards"].high) == (2 * 5 + 4, 2 * 5 + 8)
    for seed in range(2):
        assert cost["forwards"].low <= method.fit(tiny_model, TASK, seed=seed).card.cost["forwards"] <= cost["forwards"].high


def test_dynamic_sizes_are_four_to_seven_eighths(tiny_model):
    membrane = begun(tiny_model, dynamic_size=True)
    sizes = [membrane.size() for _ in range(60)]
    assert {c for c, _, _ in sizes} == {4}
    assert {h for _, h, _ in sizes} == {w for _, _, w in sizes} == {4, 5, 6, 7}
    assert len({h == w for _, h, w in sizes}) == 2
    assert begun(tiny_model).size() == (4, 8, 8)


def test_the_learning_rate_rises_once_and_falls_three_times():
    factors = [rate_factor(i, 3000, 500 / 3000, 3) for i in range(3000)]
    assert factors[0] == 0
    assert factors[250] == pytest.approx(0.5)
    assert factors[500] == pytest.approx(1)
    starts = [i for i in range(501, 3000) if factors[i] > factors[i - 1]]
    assert len(starts) == 2
    assert factors[2999] < 1e-4
    assert rate_factor(0, 10, 0.0, 1) == 1


def test_the_same_seed_gives_the_same_membranes(tiny_model):
    first, again, other = (SPM(**SMALL, lr=1e-2).fit(tiny_model, TASK, seed=s) for s in (3, 3, 4))
    name = next(iter(first.factors))
    assert all(torch.equal(a, b) for n in first.factors for a, b in zip(first.factors[n], again.factors[n], strict=True))
    assert not torch.equal(first.factors[name][1], other.factors[name][1])


def test_a_killed_fit_goes_on_to_the_same_membranes(tiny_model, tmp_path):
    method, task = SPM(**{**SMALL, "refresh": 2}, lr=1e-2), Task.of(["cat", "car"])
    whole = method.fit(tiny_model, task)

    def kill(step, total, figures):
        if step == 5:
            raise KeyboardInterrupt

    kept = Resources(checkpoint=tmp_path / "fit.safetensors", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        method.fit(tiny_model, task, resources=dataclasses.replace(kept, report=kill))
    assert kept.checkpoint.exists()
    steps = []
    resumed = method.fit(tiny_model, task, resources=dataclasses.replace(kept, report=lambda step, *_: steps.append(step)))
    assert steps == [5, 6]
    assert all(torch.equal(a, b) for n in whole.factors for a, b in zip(whole.factors[n], resumed.factors[n], strict=True))
    assert resumed.card.cost["forwards"] == whole.card.cost["forwards"]
    assert not kept.checkpoint.exists()


def test_presets_fields_and_their_text(tiny_model):
    authors = SPM.build(preset="authors")
    assert (authors.steps, authors.batch, authors.lr, authors.eta, authors.keep_weight, authors.anchors) == (3000, 1, 1e-4, 1, 1000, 4)
    assert (authors.latents, authors.latent_steps, authors.latent_guidance, authors.dynamic_size) == ("authors", 30, 3.0, True)
    assert authors.warmup * authors.steps == 500
    assert catalog.method(str(authors)) == authors
    assert set(SPM.field_docs()) == {f.name for f in dataclasses.fields(SPM)}
    assert SPM().memory(tiny_model, Task.of(["cat", "car"])) == 2 * SPM().memory(tiny_model, TASK) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": 1.5}, "spm's warmup was 1.5; expected a share from 0 to 1"),
        ({"anchors": -1}, "an integer of at least 0"),
        ({"transport": "text"}, "one of clipcos_tokenuni, clipcos, tokenuni, allone"),
        ({"merge": "mean"}, "one of sum, repo"),
        ({"latents": "aligned"}, "one of replay, authors"),
        ({"keep_weight": math.inf}, "a number of at least 0"),
        ({"batch": 99}, r"at most trajectories × latent_steps = 40"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        SPM(**fields)


def test_a_diverging_fit_and_a_model_without_attention_are_refused(tiny_model):
    from efface.models import tiny

    before = state(tiny_model)
    with pytest.raises(Diverged, match="try a lower lr"):
        SPM(**{**SMALL, "warmup": 0.0}, lr=1e25).fit(tiny_model, TASK)
    assert same(state(tiny_model), before)
    with pytest.raises(Unsupported, match="needs the parameter group 'xattn'"):
        SPM(**SMALL).fit(tiny.model(tiny.BARE), TASK)

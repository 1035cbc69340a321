"""ESD against §9 of its sheet: the goal, what is trained, whose trajectories, the generations of its code, and resuming."""

import dataclasses
import math

import pytest
import torch
from models.skeleton import skeleton

from efface.core import catalog
from efface.core.errors import Diverged, InvalidMethod, Unsupported
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Concept, Swap, Task
from efface.methods.esd import ESD
from efface.ops.guidance import erase_from_goal, erase_goal

TASK = Task.of("cat")
SMALL = {"steps": 2, "batch": 4, "latent_steps": 2, "trajectories": 2}
"""Rows of a step are all the latents of the trajectories, so that a step's mean runs over known rows."""
MODELS = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])


@pytest.fixture
def model(request, fixture):
    return request.getfixturevalue(fixture)


def losses(model, task=TASK, seed=0, **fields):
    return ESD(**{**SMALL, **fields}).fit(model, task, seed=seed).extras["trace"].tensors["erase"]


def rows_of(model, task=TASK, seed=0, **fields):
    """The latents of the first step, from the student that has not moved."""
    method = ESD(**{**SMALL, **fields})
    prompts = method.prompts(model, task)
    return method.walked(model, prompts.trained, seeded(seed), null=prompts.null)


@torch.no_grad()
def predicted(model, rows, *texts):
    return [model.predict(rows.x, rows.told, model.encode([text])) for text in texts]


def mean_square(difference):
    return float(difference.square().mean())


# -- the goal ------------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_at_step_0_the_loss_has_its_closed_form(model, eta):
    """(1 + η)² mean((ε_c − ε_∅)²), and so η_new² times it for the η_new = η + 1 of the newer scripts."""
    cat, empty = predicted(model, rows_of(model), "cat", "")
    first = float(losses(model, eta=eta)[0])
    assert first == pytest.approx((1 + eta) ** 2 * mean_square(cat - empty), rel=1e-3)
    assert first != pytest.approx(max(eta, 0.5) ** 2 * mean_square(cat - empty), rel=1e-2)


def test_the_goal_is_the_empty_prompt_without_strength_and_its_weights_sum_to_one():
    g = seeded(0)
    empty, cat, dog, x = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(4))
    assert torch.equal(erase_goal(empty, cat, 0.0), empty)
    for eta in (0.0, 1.0, 3.0):
        affine = erase_goal(0.3 * empty + x, 0.3 * cat + x, eta)
        assert torch.allclose(affine, 0.3 * erase_goal(empty, cat, eta) + x, atol=1e-5)  # as velocity is of noise
        # the shift by one between the generations: erased from itself with η + 1 is the paper's η
        assert torch.allclose(erase_from_goal(cat, cat, empty, eta + 1), erase_goal(empty, cat, eta), atol=1e-5)
        assert not torch.allclose(erase_from_goal(cat, cat, empty, eta), erase_goal(empty, cat, eta), atol=1e-2)
        assert not torch.allclose(erase_from_goal(dog, cat, empty, eta + 1), erase_goal(empty, cat, eta), atol=1e-2)


def test_erasing_the_empty_prompt_loses_nothing(tiny_model):
    nothing = Task((Swap(Concept("nothing", prompts=("",)), Concept.nothing()),))
    assert float(losses(tiny_model, nothing)[0]) < 1e-9
    assert float(losses(tiny_model)[0]) > 1e-5


def test_an_anchor_takes_the_place_of_nothing(tiny_model):
    cat, dog, empty = predicted(tiny_model, rows_of(tiny_model), "cat", "dog", "")
    first = float(losses(tiny_model, Task.of("cat -> dog"))[0])
    assert first == pytest.approx(4 * mean_square(cat - dog), rel=1e-3)
    assert first != pytest.approx(4 * mean_square(cat - empty), rel=1e-2)


def test_a_concept_can_be_erased_from_another_prompt_alone(tiny_model):
    """Trajectories and student are those of the prompt, and the loss starts at η² mean((ε_c − ε_∅)²) there."""
    rows = rows_of(tiny_model, erase_from="king")
    assert torch.equal(rows.x, rows_of(tiny_model, Task.of("king")).x)
    assert not torch.allclose(rows.x, rows_of(tiny_model).x, atol=1e-3)
    cat, empty = predicted(tiny_model, rows, "cat", "")
    first = float(losses(tiny_model, erase_from="king", eta=2.0)[0])
    assert first == pytest.approx(4 * mean_square(cat - empty), rel=1e-3)
    assert first != pytest.approx(9 * mean_square(cat - empty), rel=1e-2)


def test_the_student_comes_to_predict_the_goal(tiny_model):
    """With the latents held fixed the error falls below 1e-3 of its start."""
    fixed = {"steps": 80, "refresh": 80, "batch": 2, "trajectories": 1, "latent_steps": 2, "group": "noxattn"}
    rows = rows_of(tiny_model, **fixed)
    cat, empty = predicted(tiny_model, rows, "cat", "")
    goal = erase_goal(empty, cat, 1.0)
    edit = ESD(**fixed, lr=5e-3).fit(tiny_model, TASK)
    with edit.attach(tiny_model):
        after = predicted(tiny_model, rows, "cat")[0]
    assert mean_square(after - goal) < 1e-3 * mean_square(cat - goal)
    assert edit.extras["trace"].tensors["erase"][-1] < 1e-2 * edit.extras["trace"].tensors["erase"][0]


def test_several_targets_are_each_trained(tiny_model):
    rows = rows_of(tiny_model, Task.of(["cat", "car", "dog"]), trajectories=8)
    assert set(rows.target.tolist()) == {0, 1, 2}


# -- what is trained -----------------------------------------------------------------------------------------------------


def test_the_groups_have_the_papers_sizes_on_stable_diffusion():
    """80 tensors for ESD-x, 32 for the strict one; ESD-u without cross-attention, time embedding and output layer."""
    model = skeleton("sd1")
    sets = {
        name: set(model.select(catalog.method(f"esd(preset={name!r})").group)) for name in ("authors", "authors-u", "2024-u", "2024-sdxl")
    }
    assert (len(sets["authors"]), len(sets["2024-sdxl"])) == (80, 32)
    for part in ("attn2", "time_embedding", "conv_out", "conv_norm_out"):
        assert not any(part in name for name in sets["authors-u"])
    assert any("time_embedding" in name for name in sets["2024-u"])  # which the newer script's ESD-u does train
    assert ESD().memory(model, TASK) == 16 * 43_962_560 + 4 * 8 * 10 * 4 * 64 * 64


@pytest.mark.parametrize("latents", ["replay", "aligned", "jittered", "authors"])
@pytest.mark.parametrize("group", ["xattn", "noxattn", "text_kv"])
def test_a_fit_trains_its_group_and_leaves_the_model_to_the_bit(tiny_model, group, latents):
    before = [p.detach().clone() for network in tiny_model.components.values() for p in network.parameters()]
    state = torch.get_rng_state()
    edit = ESD(**SMALL, group=group, latents=latents).fit(tiny_model, TASK)
    after = [p for network in tiny_model.components.values() for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert edit.names == set(tiny_model.select(group))
    assert all(("attn2" in name) is (group != "noxattn") for name in edit.names)
    assert sum(float(d.abs().max()) > 0 for d in edit.deltas.values()) > 0.8 * len(edit.deltas)


def test_the_same_seed_gives_the_same_edit(tiny_model):
    first, again, other = (ESD(**SMALL).fit(tiny_model, TASK, seed=seed).deltas for seed in (3, 3, 4))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_the_student_or_the_frozen_network_walks(tiny_model):
    """The first trajectories are the same; once the student has moved, its own are others."""
    runs = {s: ESD(**{**SMALL, "steps": 3, "refresh": 2}, sampler=s, lr=1e-2).fit(tiny_model, TASK) for s in ("student", "frozen")}
    student, frozen = (run.extras["trace"].tensors["erase"] for run in runs.values())
    assert torch.equal(student[:2], frozen[:2])
    assert not torch.isclose(student[2], frozen[2], rtol=1e-3)


# -- cost, presets, errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"erase_from": "king"}, {"latent_guidance": 1.0}, {"steps": 5, "refresh": 2}])
def test_the_cost_of_replay_is_known_before(tiny_model, fields):
    method = ESD(**{**SMALL, **fields})
    spent, expected = method.fit(tiny_model, TASK).card.cost, method.cost(tiny_model, TASK)
    assert (spent["forwards"], spent["backwards"]) == (expected["forwards"], expected["backwards"])


@pytest.mark.parametrize("latents", ["aligned", "jittered", "authors"])
def test_the_cost_of_fresh_latents_lies_within_its_bounds(tiny_model, latents):
    method = ESD(steps=5, batch=2, latent_steps=4, latents=latents)
    expected, spent = method.cost(tiny_model, TASK), []
    for seed in range(3):
        spent.append(method.fit(tiny_model, TASK, seed=seed).card.cost["forwards"])
        assert expected["forwards"].low <= spent[-1] <= expected["forwards"].high
    assert len(set(spent)) > 1
    assert expected["forwards"].low < expected["forwards"] < expected["forwards"].high
    assert sum(spent) / 3 == pytest.approx(expected["forwards"], rel=0.25)


def test_presets_are_the_generations_of_the_code():
    authors, demo, newer, sdxl = (catalog.method(f"esd(preset={name!r})") for name in ("authors", "demo", "2024", "2024-sdxl"))
    assert (authors.steps, authors.lr, authors.batch, authors.eta, authors.latent_guidance) == (1000, 1e-5, 1, 1.0, 3.0)
    assert (authors.latents, authors.latent_steps, authors.sampler, authors.group) == ("authors", 50, "student", "xattn")
    assert (demo.steps, demo.lr, demo.eta, demo.sampler) == (200, 2e-5, 2.0, "student")
    assert (newer.steps, newer.lr, newer.eta + 1, newer.sampler) == (200, 5e-5, 2.0, "frozen")  # their negative_guidance
    assert (sdxl.lr, sdxl.eta + 1, sdxl.latent_guidance, sdxl.group) == (2e-4, 1.0, 2.0, "text_kv")
    kinds = {kind: catalog.method("esd", kind=kind).group for kind in ("object", "style", "identity", "unsafe")}
    assert kinds == {"object": "noxattn", "style": "xattn", "identity": "xattn", "unsafe": "noxattn"}
    for name in ESD.presets:
        assert catalog.method(str(catalog.method(f"esd(preset={name!r})"))) == catalog.method(f"esd(preset={name!r})")
    assert set(ESD.field_docs()) == {f.name for f in dataclasses.fields(ESD)}


def test_a_killed_fit_goes_on_within_a_replay_period(tiny_model, tmp_path):
    method, path = ESD(**{**SMALL, "steps": 7, "refresh": 3, "batch": 2}), tmp_path / "fit.safetensors"

    def kill(step, total, figures):
        if step == 6:
            raise KeyboardInterrupt

    whole = method.fit(tiny_model, TASK, seed=1)
    with pytest.raises(KeyboardInterrupt):
        method.fit(tiny_model, TASK, seed=1, resources=Resources(checkpoint=path, checkpoint_every=5, report=kill))
    seen = []
    again = method.fit(tiny_model, TASK, seed=1, resources=Resources(checkpoint=path, report=lambda step, *_: seen.append(step)))
    assert seen == [6, 7]
    assert all(torch.equal(whole.deltas[n], again.deltas[n]) for n in whole.deltas)
    assert torch.equal(whole.extras["trace"].tensors["erase"], again.extras["trace"].tensors["erase"])


def test_a_loss_that_is_not_finite_stops_the_fit(tiny_model):
    with pytest.raises(Diverged, match=r"esd's erase was nan at step 2 of 2, with lr 1e\+30; the model is as it was, try a lower lr"):
        ESD(**SMALL, lr=1e30).fit(tiny_model, TASK)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "esd's steps was 0; expected an integer of at least 1"),
        ({"lr": math.inf}, "esd's lr was inf; expected a number above 0"),
        ({"eta": -1.0}, "esd's eta was -1.0; expected a number of at least 0"),
        ({"sampler": "ema"}, "esd's sampler was 'ema'; expected one of student, frozen"),
        ({"latents": "fresh"}, "esd's latents was 'fresh'; expected one of replay, authors, aligned, jittered"),
        ({"batch": 81}, "esd's batch was 81; expected at most trajectories × latent_steps = 80"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        ESD(**fields)


def test_an_unknown_group_is_refused(tiny_model):
    """The authors' newer script takes such a word, selects nothing and fails later."""
    with pytest.raises(Unsupported, match="did you mean 'xattn'"):
        ESD(**SMALL, group="xatn").fit(tiny_model, TASK)

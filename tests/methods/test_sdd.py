"""SDD against §9 of its sheet: both terms are the student's, the teacher walks and is what is returned, several concepts, cost, presets."""

import dataclasses

import pytest
import torch

from efface.core import catalog
from efface.core.errors import InvalidMethod
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Concept, Swap, Task
from efface.methods.sdd import SDD
from efface.ops.ema import follow
from efface.ops.overlay import Overlay

TASK = Task.of("cat")
SMALL = {"steps": 2, "batch": 4, "latent_steps": 2, "trajectories": 2}
"""Rows of a step are all the latents of the trajectories, so that a step's mean runs over known rows."""
MODELS = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])


@pytest.fixture
def model(request, fixture):
    return request.getfixturevalue(fixture)


def losses(model, task=TASK, **fields):
    return SDD(**{**SMALL, **fields}).fit(model, task).extras["trace"].tensors["erase"]


def walked(method, model, prompts, step, generator):
    turn = method.turn(step, len(prompts.loss))
    return method.walked(model, prompts.latent, generator, null=prompts.null, target=turn)


def rows_of(model, task=TASK, step=0, **fields):
    method = SDD(**{**SMALL, **fields})
    return walked(method, model, method.prompts(model, task), step, seeded(0))


@torch.no_grad()
def predicted(model, rows, *texts):
    return [model.predict(rows.x, rows.told, model.encode([text])) for text in texts]


def mean_square(difference):
    return float(difference.square().mean())


@MODELS
def test_at_step_0_the_loss_is_the_distance_to_the_empty_prompt(model):
    cat, empty = predicted(model, rows_of(model), "cat", "")
    assert float(losses(model)[0]) == pytest.approx(mean_square(cat - empty), rel=1e-3)
    assert float(losses(model)[0]) != pytest.approx(4 * mean_square(cat - empty), rel=1e-2)  # ESD's with η = 1
    nothing = Task((Swap(Concept("nothing", prompts=("",)), Concept.nothing()),))
    assert float(losses(model, nothing)[0]) == 0
    anchored = Task.of("cat -> tiger")
    (tiger,) = predicted(model, rows_of(model), "tiger")
    assert float(losses(model, anchored)[0]) == pytest.approx(mean_square(cat - tiger), rel=1e-3)


def test_no_gradient_flows_through_the_empty_prompt_and_both_terms_are_the_students(tiny_model):
    """Replacing that branch by a constant of the student's gives equal gradients; of the frozen network's, other ones."""
    for network in tiny_model.components.values():
        network.requires_grad_(False)
    method, student = SDD(**SMALL), Overlay(tiny_model.select("xattn"))
    prompts, rows = method.prompts(tiny_model, TASK), rows_of(tiny_model)
    g = seeded(4)
    with torch.no_grad():
        for p in student.parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    (frozen,) = predicted(tiny_model, rows, "")
    with student:
        (own,) = predicted(tiny_model, rows, "")
        cat = tiny_model.predict(rows.x, rows.told, tiny_model.encode(["cat"]))
        found = torch.autograd.grad(method.loss(tiny_model, rows, prompts), student.parameters)
        right, wrong = (torch.autograd.grad((cat - c).square().mean(), student.parameters, retain_graph=True) for c in (own, frozen))
    assert all(torch.allclose(a, b, atol=1e-7, rtol=1e-3) for a, b in zip(found, right, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-7, rtol=1e-3) for a, b in zip(found, wrong, strict=True))


def test_the_teacher_is_the_average_and_is_what_is_returned(tiny_model):
    """One step: the edit is (1 − m) times the student's; after n equal students m^n of the start is left."""
    whole, slow = (SDD(**{**SMALL, "steps": 1}, decay=m, lr=1e-3).fit(tiny_model, TASK).deltas for m in (0.0, 0.9))
    for name in whole:
        assert torch.allclose(slow[name], 0.1 * whole[name], atol=1e-6)
    assert float(torch.cat([d.flatten() for d in whole.values()]).abs().max()) > 5e-4
    student, teacher = (Overlay(tiny_model.select("text_kv")) for _ in range(2))
    start = {n: t.detach().clone() for n, t in teacher.tensors.items()}
    with torch.no_grad():
        for p in student.parameters:
            p.add_(1.0)
    for _ in range(3):
        follow(teacher, student, 0.9)
    assert all(torch.allclose(t, start[n] + 1 - 0.9**3, atol=1e-5) for n, t in teacher.tensors.items())
    assert all(torch.equal(s, start[n] + 1.0) for n, s in student.tensors.items())


def test_the_teacher_walks_and_not_the_student(tiny_model):
    """The third loss is the moved student's, on latents of the teacher: with one that hardly moves, those of the original."""
    fields = {**SMALL, "refresh": 2, "lr": 0.1}
    method, g = SDD(**fields), seeded(0)
    prompts = method.prompts(tiny_model, TASK)
    first = walked(method, tiny_model, prompts, 0, g)
    for _ in range(2):
        first.pick(4, g)
    rows = walked(method, tiny_model, prompts, 2, g)
    student = SDD(**fields, decay=0.0).fit(tiny_model, TASK)
    with student.attach(tiny_model), torch.no_grad():
        expected = float(method.loss(tiny_model, rows, prompts))
    third = {decay: float(losses(tiny_model, **{**fields, "steps": 3}, decay=decay)[2]) for decay in (0.0, 0.9999999)}
    assert third[0.9999999] == pytest.approx(expected, rel=1e-3)
    assert abs(third[0.0] - expected) > 10 * abs(third[0.9999999] - expected)


@pytest.mark.parametrize("steps", [4, 5])
def test_fresh_latents_are_where_the_script_has_them(tiny_model, steps):
    """k guided steps from pure noise, k = 0 included, and a time within that interval of the grid."""
    found = set()
    grid, stride = tiny_model.schedule.grid(steps), 1000 // steps
    method = SDD(latents="jittered", latent_steps=steps, batch=2)
    prompts, generator = method.prompts(tiny_model, TASK), seeded(1)
    for step in range(25):
        tiny_model.meter.reset()
        rows = walked(method, tiny_model, prompts, step, generator)
        k = tiny_model.meter.calls
        found.add(k)
        assert tiny_model.meter.forwards == k * 4
        assert rows.level.tolist() == [grid[k]] * 2
        assert all(1000 - stride * (k + 1) <= t <= 1000 - stride * k - 1 for t in rows.told.tolist())
        assert abs(float(rows.x.std()) - 1) < 0.15 or k > 0
    assert found == set(range(steps))


def test_several_concepts_take_turns_as_the_script_or_as_the_readme_has_it(tiny_model):
    task = Task.of(["cat", "car", "dog"])
    joined, each = (tiny_model.encode(texts).tokens for texts in (["cat, car, dog"] * 3, ["cat", "car", "dog"]))
    script = SDD(**SMALL).prompts(tiny_model, task)
    readme = catalog.method("sdd(preset='readme')").prompts(tiny_model, task)
    assert torch.equal(script.latent.tokens, joined)
    assert torch.equal(script.loss.tokens, each)
    assert torch.equal(readme.loss.tokens, joined)
    assert torch.equal(readme.latent.tokens, each)
    turns = [rows_of(tiny_model, task, step, latents="aligned", batch=2).target.tolist() for step in range(3)]
    assert turns == [[0, 1], [2, 0], [1, 2]]
    assert rows_of(tiny_model, task, 0, trajectories=3).target.tolist() == [0, 1, 2] * 2
    drawn = rows_of(tiny_model, task, 0, order="random", trajectories=30)
    assert set(drawn.target.tolist()) == {0, 1, 2}
    assert drawn.target[:6].tolist() != [0, 1, 2] * 2
    alone = [losses(tiny_model, latent_prompt=a, loss_prompt=b) for a, b in (("joined", "each"), ("each", "joined"))]
    assert torch.equal(*alone)  # for one concept they are the same


def test_the_loss_falls_and_the_concept_comes_to_say_less(tiny_model):
    fixed = {"steps": 40, "refresh": 40, "decay": 0.5, "lr": 5e-3}
    rows = rows_of(tiny_model)
    cat, empty = predicted(tiny_model, rows, "cat", "")
    edit = SDD(**{**SMALL, **fixed}).fit(tiny_model, TASK)
    with edit.attach(tiny_model):
        after, null = predicted(tiny_model, rows, "cat", "")
    assert mean_square(after - null) < 0.2 * mean_square(cat - empty)


@pytest.mark.parametrize("group", ["xattn", "selfattn", "noxattn"])
def test_a_fit_trains_its_group_and_leaves_the_model_to_the_bit(tiny_model, group):
    before = [p.detach().clone() for network in tiny_model.components.values() for p in network.parameters()]
    edit, again = (SDD(**SMALL, group=group).fit(tiny_model, TASK, seed=2) for _ in range(2))
    after = [p for network in tiny_model.components.values() for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert edit.names == set(tiny_model.select(group))
    assert all(torch.equal(edit.deltas[n], again.deltas[n]) for n in edit.deltas)
    assert sum(float(d.abs().max()) > 0 for d in edit.deltas.values()) > 0.8 * len(edit.deltas)


@pytest.mark.parametrize("fields", [{}, {"steps": 5, "refresh": 2}, {"latent_guidance": 1.0}])
def test_the_cost_of_replay_is_known_before(tiny_model, fields):
    method = SDD(**{**SMALL, **fields})
    spent, expected = method.fit(tiny_model, TASK).card.cost, method.cost(tiny_model, TASK)
    assert (spent["forwards"], spent["backwards"]) == (expected["forwards"], expected["backwards"])


def test_presets_are_the_script_and_the_readme():
    authors, readme = catalog.method("sdd(preset='authors')"), catalog.method("sdd(preset='readme')")
    assert (authors.steps, authors.lr, authors.batch, authors.decay, authors.weight_decay, authors.clip) == (
        1500,
        1e-5,
        1,
        0.999,
        1e-4,
        1.0,
    )
    assert (authors.latents, authors.latent_steps, authors.latent_guidance, authors.group) == ("jittered", 50, 3.0, "xattn")
    assert (authors.latent_prompt, authors.loss_prompt, authors.order) == ("joined", "each", "iterative")
    assert (readme.latent_prompt, readme.loss_prompt) == ("each", "joined")
    assert authors.cost(None, TASK)["forwards"] == 1500 * 2 + 24.5 * 2 * 1500


def test_a_killed_fit_goes_on_with_its_teacher(tiny_model, tmp_path):
    method, path = SDD(**{**SMALL, "steps": 7, "refresh": 3, "batch": 2}, lr=1e-3), tmp_path / "fit.safetensors"

    def kill(step, total, figures):
        if step == 6:
            raise KeyboardInterrupt

    uncut = method.fit(tiny_model, TASK, seed=1)
    with pytest.raises(KeyboardInterrupt):
        method.fit(tiny_model, TASK, seed=1, resources=Resources(checkpoint=path, checkpoint_every=5, report=kill))
    again = method.fit(tiny_model, TASK, seed=1, resources=Resources(checkpoint=path))
    assert all(torch.equal(uncut.deltas[n], again.deltas[n]) for n in uncut.deltas)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "sdd's steps was 0; expected an integer of at least 1"),
        ({"decay": 1.0}, "sdd's decay was 1.0; expected a number of at least 0, below 1"),
        ({"clip": 0.0}, "sdd's clip was 0.0; expected a number above 0"),
        ({"loss_prompt": "all"}, "sdd's loss_prompt was 'all'; expected one of joined, each"),
        ({"batch": 81}, "sdd's batch was 81; expected at most trajectories × latent_steps = 80"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        SDD(**fields)
    assert set(SDD.field_docs()) == {f.name for f in dataclasses.fields(SDD)}

"""All-but-One, the reconstruction, against §9 of its sheet: both terms and their gradients, identities, the alternative, purification."""

import pytest
import torch

from efface.core import catalog
from efface.core.errors import InvalidMethod
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods import all_but_one
from efface.methods.all_but_one import AllButOne, distance, purified
from efface.ops.overlay import Overlay

TASK = Task.of("cat")
SMALL = {"steps": 2, "batch": 4, "latent_steps": 2, "trajectories": 2}
"""Rows of a step are all the latents of the trajectories, so that a step's mean runs over known rows."""
MODELS = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])


@pytest.fixture
def model(request, fixture):
    return request.getfixturevalue(fixture)


def trace(model, task=TASK, **fields):
    return AllButOne(**{**SMALL, **fields}).fit(model, task).extras["trace"].tensors


def rows_of(model, task=TASK, **fields):
    method = AllButOne(**{**SMALL, **fields})
    return method.mixed(model, method.prompts(model, task), seeded(0))


@torch.no_grad()
def predicted(model, rows, *texts):
    return [model.predict(rows.x, rows.told, model.encode([text])) for text in texts]


def mean_square(difference):
    return float(difference.square().mean())


def noises(count, seed):
    g = seeded(seed)
    return [torch.randn(2, 4, 8, 8, generator=g) for _ in range(count)]


@MODELS
@pytest.mark.parametrize(("text", "eta"), [("cat", 0.0), ("cat", 2.0), ("cat -> tiger", 0.0), ("cat -> tiger", 2.0)])
def test_at_step_0_the_losses_have_their_closed_form(model, text, eta):
    """L_0 = 0 and L_g = (1 + η)² mean((ε(c_e) − ε(c_a))²), where nothing is ε(∅)."""
    task = Task.of(text)
    cat, other = predicted(model, rows_of(model, task), "cat", text.partition("-> ")[2])
    first = trace(model, task, eta=eta)
    assert float(first["erase"][0]) == pytest.approx((1 + eta) ** 2 * mean_square(cat - other), rel=1e-3)
    assert float(first["keep"][0]) < 1e-12
    assert float(first["keep"][1]) > 0


def test_a_concept_that_is_its_own_alternative_loses_nothing():
    null, cat = noises(2, 0)
    assert AllButOne().losses(null, cat, null, cat - null)[2] == 0
    assert AllButOne().losses(null, cat, null, cat - null + 0.1)[2] > 0


def test_with_stop_null_the_guidance_loss_does_not_reach_the_empty_prompt():
    null, cat, base, goal = noises(4, 0)
    null.requires_grad_()
    cat.requires_grad_()
    constant = (cat - null.detach() - goal).square().mean()
    for stop in (True, False):
        erase = AllButOne(stop_null=stop).losses(null, cat, base, goal)[0]
        by_null, by_cat = torch.autograd.grad(erase, [null, cat], allow_unused=True)
        assert (by_null is None) is stop
        assert torch.allclose(by_cat, torch.autograd.grad(constant, cat, retain_graph=True)[0])


def test_where_the_empty_prompt_has_not_moved_it_is_concept_ablation_on_the_concepts_latents():
    null, cat, other, moved = noises(4, 1)
    ablation = (cat - other).square().mean()
    assert torch.allclose(AllButOne().losses(null, cat, null, other - null)[0], ablation, atol=1e-6)
    assert not torch.allclose(AllButOne().losses(moved, cat, null, other - null)[0], ablation, atol=1e-2)


def test_guided_predictions_may_be_compared_instead():
    null, cat, base, goal = noises(4, 2)
    erase, keep, loss = AllButOne(guided_loss=True, guided_scale=2.0).losses(null, cat, base, goal)
    assert torch.allclose(loss, ((null + 2 * (cat - null)) - (base + 2 * goal)).square().mean(), rtol=1e-5)
    assert torch.allclose(AllButOne(null_weight=0.3).losses(null, cat, base, goal)[2], erase + 0.3 * keep)


def test_the_concept_goes_to_its_alternative_while_the_empty_prompt_stays(tiny_model):
    """L_0 stays below 1 % of the initial L_g; without its weight the empty prompt goes anywhere."""
    fixed = {"steps": 80, "refresh": 80, "lr": 3e-3}
    rows = rows_of(tiny_model)
    cat, tiger, empty = predicted(tiny_model, rows, "cat", "tiger", "")
    gap, seen = mean_square(cat - tiger), {}
    for weight in (10.0, 0.0):
        edit = AllButOne(**{**SMALL, **fixed}, null_weight=weight).fit(tiny_model, Task.of("cat -> tiger"))
        with edit.attach(tiny_model):
            after, null = predicted(tiny_model, rows, "cat", "")
        seen[weight] = mean_square(after - tiger) / gap, mean_square(null - empty) / gap
    assert seen[10.0][0] < 0.3
    assert seen[10.0][1] < 0.01 < seen[0.0][1]


def test_the_pull_is_the_squared_distance_from_the_original(tiny_model):
    student = Overlay(tiny_model.select("text_kv"))
    original = {name: slot.tensor for name, slot in student.slots.items()}
    assert float(distance(student, original).detach()) == 0
    with torch.no_grad():
        student.parameters[0].add_(0.5)
    with student:
        assert float(distance(student, original).detach()) == pytest.approx(0.25 * student.parameters[0].numel(), rel=1e-4)
    far, near = (AllButOne(**{**SMALL, "steps": 10}, lr=1e-3, pull=pull).fit(tiny_model, TASK).deltas for pull in (0.0, 100.0))
    sizes = [sum(float(d.square().sum()) for d in deltas.values()) for deltas in (far, near)]
    assert sizes[1] < 0.5 * sizes[0]


def test_a_share_of_the_trajectories_may_be_neutral(tiny_model):
    words = Resources(vocabulary=("king",))
    for share, text in ((1.0, "king"), (0.0, "cat")):
        method = AllButOne(**SMALL, neutral=share)
        rows = method.mixed(tiny_model, method.prompts(tiny_model, TASK, words), seeded(0))
        told, null = tiny_model.encode([text]), tiny_model.encode([""])
        with torch.no_grad():
            expected = tiny_model.guided(rows.x[:2], rows.told[:2], told, null, 3.0)
        assert torch.allclose(rows.x[2:], tiny_model.schedule.ddim_step(rows.x[:2], rows.told[:2], rows.told[2:], expected), atol=1e-4)


def test_pictures_are_purified_by_inversion(tiny_model):
    """On a network that says little, so that few steps invert it: next to no change gives the picture back, an edit another, as does
    the way back from noise that is not the picture's own."""
    with torch.no_grad():
        tiny_model.components["unet"].conv_out.weight.mul_(0.002)
        tiny_model.components["unet"].conv_out.bias.mul_(0.002)
    images = torch.rand(2, 3, 64, 64, generator=seeded(0))
    with torch.no_grad():
        clean = tiny_model.decode(tiny_model.encode_images(images))
    idle, edit = (AllButOne(**{**SMALL, "steps": n}, lr=lr).fit(tiny_model, TASK) for n, lr in ((1, 1e-9), (20, 1e-2)))
    back = purified(tiny_model, idle, images, steps=10, check=False)
    other = purified(tiny_model, edit, images, steps=10, prompt="cat", guidance=3.0, check=False)
    swapped = purified(tiny_model, idle, images.flip(0), steps=10, check=False)
    lost = mean_square(back - clean)
    assert lost < 0.1 * mean_square(other - clean)
    assert lost < 0.1 * mean_square(swapped - clean)


@pytest.mark.parametrize("group", ["xattn", "notime"])
def test_a_fit_trains_its_group_and_leaves_the_model_to_the_bit(tiny_model, group):
    before = [p.detach().clone() for network in tiny_model.components.values() for p in network.parameters()]
    edit, again = (AllButOne(**SMALL, group=group).fit(tiny_model, TASK, seed=2) for _ in range(2))
    after = [p for network in tiny_model.components.values() for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert edit.names == set(tiny_model.select(group))
    assert all(torch.equal(edit.deltas[n], again.deltas[n]) for n in edit.deltas)
    assert sum(float(d.abs().max()) > 0 for d in edit.deltas.values()) > 0.8 * len(edit.deltas)


@pytest.mark.parametrize("text", ["cat", "cat -> tiger", "cat -> tiger; dog"])
@pytest.mark.parametrize("fields", [{}, {"eta": 1.0}, {"steps": 5, "refresh": 2, "sampler": "student", "neutral": 0.5}, {"pull": 1.0}])
def test_the_cost_of_replay_is_known_before(tiny_model, fields, text):
    method, task = AllButOne(**{**SMALL, **fields}), Task.of(text)
    spent, expected = method.fit(tiny_model, task).card.cost, method.cost(tiny_model, task)
    assert (spent["forwards"], spent["backwards"]) == (expected["forwards"], expected["backwards"])


def test_it_says_that_it_is_a_reconstruction():
    assert "RECONSTRUCTION" in all_but_one.__doc__
    assert "(reconstruction)" in AllButOne.__doc__
    assert catalog.method("all_but_one", kind="unsafe").group == "notime"
    assert catalog.method("all_but_one(preset='large')").steps == 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "all_but_one's steps was 0; expected an integer of at least 1"),
        ({"null_weight": -1.0}, "all_but_one's null_weight was -1.0; expected a number of at least 0"),
        ({"neutral": 1.5}, "all_but_one's neutral was 1.5; expected a share from 0 to 1"),
        ({"sampler": "ema"}, "all_but_one's sampler was 'ema'; expected one of frozen, student"),
        ({"batch": 81}, "all_but_one's batch was 81; expected at most trajectories × latent_steps = 80"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        AllButOne(**fields)

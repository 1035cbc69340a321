"""Concept Ablation against §9 of its sheet: loss and stop-gradient, the first token, prompts, what is held, augmentation, cost, presets."""

import dataclasses

import pytest
import torch
from models.skeleton import skeleton

from efface.concepts.rewording import named, pairs_of, replaced, subjects
from efface.core import catalog
from efface.core.errors import InvalidMethod, InvalidTask
from efface.core.fitting import fitting
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Concept, Swap, Task
from efface.methods.concept_ablation import Album, ConceptAblation, Encoder, augmented, masked_mean, noised
from efface.ops.bos import first_detached
from efface.ops.overlay import Overlay

TASK = Task.of("cat -> dog")
SMALL = {"steps": 2, "batch": 2, "images": 2, "keep_images": 2}
MODELS = pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])


@pytest.fixture
def model(request, fixture):
    return request.getfixturevalue(fixture)


def quick(model):
    """The tiny model with few steps of its sampler."""
    model.default_steps = 2
    return model


def begun(model, **fields):
    """(method, fit, album, student, encoder) before the first step; each picture has one target prompt, "cat"."""
    method = ConceptAblation(**{**SMALL, **fields})
    for network in model.components.values():
        network.requires_grad_(False)
    with fitting(method, model, TASK, 0, Resources()) as fit:
        pass
    latents = torch.randn(2, *model.latent_shape, generator=seeded(3))
    album = Album(torch.rand(2, 3, 64, 64, generator=seeded(4)), latents, ("dog",) * 2, (("cat",),) * 2)
    return method, fit, album, Overlay(model.select(method.group)), Encoder(model)


def drawn(fit, album):
    """The latents, times and goal that `erase` draws next; the generator is back at its start before and after."""
    fit.generator.set_state(seeded(0).get_state())
    rows = torch.randint(len(album), (2,), generator=fit.generator)
    album.target(rows, fit.generator)
    found = noised(fit, album.latents[rows])
    fit.generator.set_state(seeded(0).get_state())
    return found


# -- loss ----------------------------------------------------------------------------------------------------------------


@MODELS
def test_at_step_0_the_loss_is_the_distance_of_two_predictions(model):
    method, fit, album, student, told = begun(quick(model))
    x, t, goal = drawn(fit, album)
    with torch.no_grad():
        cat, dog = (model.predict(x, t, model.encode([text])) for text in ("cat", "dog"))
    expected = {"": (cat - dog).square(), "sum_channels": 4 * (cat - dog).square(), "loss": (cat - goal).square()}
    for name, value in (("", None), ("sum_channels", True), ("loss", "noise")):
        drawn(fit, album)
        found = dataclasses.replace(method, **({name: value} if name else {})).erase(fit, student, album, told)
        assert found.item() == pytest.approx(float(expected[name].mean()), rel=1e-3)


def test_a_target_prompt_that_is_the_anchor_prompt_moves_nothing(tiny_model):
    method, fit, album, student, told = begun(quick(tiny_model))
    equal = dataclasses.replace(album, targets=(("dog",), ("dog",)))
    loss = method.erase(fit, student, equal, told)
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, student.parameters))
    assert any(g.any() for g in torch.autograd.grad(method.erase(fit, student, album, told), student.parameters))


@pytest.mark.parametrize("goal", ["student", "frozen"])
def test_no_gradient_flows_through_the_anchor_and_its_network_is_the_one_named(tiny_model, goal):
    method, fit, album, student, told = begun(quick(tiny_model), goal=goal, detach_bos=False)
    g = seeded(5)
    with torch.no_grad():
        for p in student.parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    x, t, _ = drawn(fit, album)
    cond = {text: tiny_model.encode([text]) for text in ("cat", "dog")}
    with torch.no_grad():
        frozen = tiny_model.predict(x, t, cond["dog"])
    with student:
        cat, dog = (tiny_model.predict(x, t, cond[text]) for text in ("cat", "dog"))
    goals = {"student": dog.detach(), "frozen": frozen, "both branches": dog}
    gradients = {k: torch.autograd.grad((cat - v).square().mean(), student.parameters, retain_graph=True) for k, v in goals.items()}
    found = torch.autograd.grad(method.erase(fit, student, album, told), student.parameters)
    for name, expected in gradients.items():
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in zip(found, expected, strict=True)) is (name == goal)


def test_nothing_is_learned_through_the_first_token(tiny_model):
    """With the start of the text alone in the context, keys and values get no gradient; predictions are as they were."""
    for network in tiny_model.components.values():
        network.requires_grad_(False)
    x, slots = torch.randn(1, *tiny_model.latent_shape, generator=seeded(0)), tiny_model.select("text_kv")
    whole = tiny_model.encode(["cat"])
    for length in (1, 3):
        cond, student = whole.with_tokens(whole.tokens[:, :length]), Overlay(slots)
        with student:
            plain = tiny_model.predict(x, 500, cond)
            with first_detached([slot.owner for slot in slots.values()]):
                found = tiny_model.predict(x, 500, cond)
        assert torch.equal(plain, found)
        by_plain, by_found = (torch.autograd.grad(p.square().mean(), student.parameters) for p in (plain, found))
        assert any(g.any() for g in by_plain)
        assert any(g.any() for g in by_found) is (length > 1)
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(by_plain, by_found, strict=True))
    assert not any(m._forward_hooks for m in tiny_model.components["unet"].modules())


def test_the_target_comes_to_be_the_anchor_on_held_out_latents(tiny_model):
    model = quick(tiny_model)
    edit = ConceptAblation(steps=60, batch=4, images=6, lr=2e-3, goal="frozen").fit(model, TASK)
    x, t = torch.randn(8, *model.latent_shape, generator=seeded(8)), torch.arange(100, 900, 100)
    with torch.no_grad():
        cat, dog = (model.predict(x, t, model.encode([text])) for text in ("a picture of a cat", "a picture of a dog"))
        with edit.attach(model):
            after = model.predict(x, t, model.encode(["a picture of a cat"]))
    assert float((after - dog).square().mean()) < 0.5 * float((cat - dog).square().mean())


# -- prompts -------------------------------------------------------------------------------------------------------------


def test_words_are_replaced_whole_and_with_their_article():
    assert replaced("A Dog and a hotdog catch the dog", "dog", Concept("owl"), "owl") == "an owl and a hotdog catch the owl"
    assert replaced("a portrait of a man", "man", Concept("ada lovelace", "identity"), "ada lovelace") == "a portrait of ada lovelace"
    with pytest.raises(InvalidTask, match="'cat' is not in its prompt 'the catch of the day'; name it there"):
        replaced("the catch of the day", "cat", Concept("tiger"), "tiger")


def test_names_have_the_articles_of_captions():
    names = ("cat", "owl", "grapes", "santa claus", "road vehicle", "Snoopy", "axolotl", "a boat")
    articled = ("a cat", "an owl", "grapes", "santa claus", "a road vehicle", "Snoopy", "an axolotl", "a boat")
    assert tuple(named(name) for name in names) == articled
    assert named("van gogh", "style") == "van gogh"


def test_objects_swap_the_anchors_word_for_the_targets():
    (swap,) = Task.of("owl -> dog").erase
    pairs = pairs_of(swap, "replace", "ours", [])
    assert ("a picture of a dog", ("a picture of an owl",)) in pairs
    assert all("owl" not in anchor and "owl" in target[0] for anchor, target in pairs)
    own = Swap(Concept("grumpy cat"), Concept("cat", prompts=("a cat in a box", "my cat")))
    assert pairs_of(own, "replace", "ours", []) == [("a cat in a box", ("a grumpy cat in a box",)), ("my cat", ("my grumpy cat",))]
    (nothing,) = Task.of("cat").erase
    assert {anchor for anchor, _ in pairs_of(nothing, "replace", "ours", [])} == {""}


def test_styles_are_added_to_plain_things_in_the_words_of_each_script():
    (swap,), (painted,) = Task.of("style:van gogh").erase, Task.of("style:van gogh -> painting").erase
    diffusers = ("a cat, in the style of van gogh", "in van gogh's style, a cat", "in van gogh's style, a cat")
    assert pairs_of(swap, "style", "diffusers", ["cat"]) == [("a cat", diffusers)]
    assert pairs_of(painted, "style", "ours", ["owl"])[0][0] == "a painting of an owl"
    ours = pairs_of(swap, "style", "ours", ["cat", "grapes"])
    assert ours[0][1] == ("a cat in van gogh style", "a van gogh cat", "a cat, in the style of van gogh")
    assert ours[1][1] == ("grapes in van gogh style", "grapes, in the style of van gogh")
    old = pairs_of(swap, "style", "compvis", ["cat"])[0][1]
    assert len(old) == 6
    assert "van gogh van gogh inspired painting, a cat" in old
    assert all("van gogh" not in anchor for anchor, _ in [*ours, *pairs_of(painted, "style", "compvis", ["cat"])])


def test_words_may_be_added_and_captions_given():
    swap = Swap(Concept("nudity", "unsafe"), Concept("person", prompts=("a person",)))
    assert pairs_of(swap, "add", "ours", []) == [("a person", ("nudity, a person", "in nudity style, a person", "a person, nudity"))]
    with pytest.raises(InvalidTask, match="wording='add' needs an anchor"):
        pairs_of(Swap(Concept("nudity", "unsafe")), "add", "ours", [])
    known = Swap(Concept("portrait", prompts=("ann graham lotz", "ann")), Concept("woman", prompts=("a woman", "a lady")))
    assert pairs_of(known, "given", "ours", []) == [("a woman", ("ann graham lotz", "ann")), ("a lady", ("ann graham lotz", "ann"))]
    with pytest.raises(InvalidTask, match="needs prompts of 'portrait' and of its anchor"):
        pairs_of(Swap(Concept("portrait"), Concept("woman")), "given", "ours", [])


def test_pictures_of_styles_show_no_target():
    task = Task.of(["style:van gogh", "cat"])
    assert "cat" not in subjects(task)
    assert "dog" in subjects(task)
    assert subjects(task, ("Cat", "boat")) == ["boat"]


# -- what is held --------------------------------------------------------------------------------------------------------


def test_the_prior_is_asked_for_where_names_overlap_and_keep_joins_it(tiny_model):
    texts = ("grumpy cat -> cat", "cat -> dog", "cat -> dog | keep tiger", "concat -> cat")
    model, tasks = quick(tiny_model), {text: Task.of(text) for text in texts}
    assert [ConceptAblation().priors(task) for task in tasks.values()] == [[0], [], [], []]
    assert ConceptAblation(prior="always").priors(tasks["cat -> dog"]) == [0]
    assert ConceptAblation(prior="never").priors(tasks["grumpy cat -> cat"]) == []
    for text, kept in (("grumpy cat -> cat", {"a cat"}), ("cat -> dog | keep tiger", {"a tiger"}), ("cat -> dog", set())):
        trace = ConceptAblation(**SMALL).fit(model, tasks[text]).extras["trace"]
        assert ("keep" in trace.tensors) is bool(kept)
        assert {prompt.removeprefix("a picture of ") for prompt in trace.info["kept"]} == kept


def test_pictures_of_the_anchor_are_the_users_where_given(tiny_model):
    model, given = quick(tiny_model), torch.rand(3, 3, 80, 64, generator=seeded(1))
    method = ConceptAblation(**SMALL)
    edit = method.fit(model, TASK, resources=Resources(images={"dog": given}))
    assert edit.card.cost["forwards"] == 2 * 2 * 2  # two networks, two pictures, two steps: nothing was drawn
    assert edit.card.cost["forwards"] < method.cost(model, TASK)["forwards"]


# -- augmentation --------------------------------------------------------------------------------------------------------


def test_the_mask_chooses_the_cells_of_each_picture_that_count():
    error = torch.rand(2, 4, 8, 8, generator=seeded(0))
    assert torch.allclose(masked_mean(error, torch.ones(2, 1, 8, 8)), masked_mean(error, None))
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:5, 3:4], mask[1, :, :, :] = 1, 1
    assert torch.allclose(masked_mean(error, mask), (error[0, :, 2:5, 3:4].mean() + error[1].mean()) / 2)


def test_a_small_picture_is_called_far_away_and_the_loss_looks_at_it_alone(tiny_model):
    images = torch.rand(60, 3, 64, 64, generator=seeded(2))
    latents, masks, prompts = augmented(tiny_model, images, ["r2d2"] * 60, seeded(3))
    shares = masks.mean((1, 2, 3)).tolist()
    assert {p.removesuffix("r2d2") for p in prompts} == {"", "a far away ", "very small ", "zoomed in ", "close up "}
    for prompt, share in zip(prompts, shares, strict=True):
        if prompt.startswith(("zoomed", "close")):
            assert share == 1
        elif prompt != "r2d2":
            assert 0 < share < 0.36
    assert 0.5 < sum(share < 1 for share in shares) / 60 < 0.85  # two thirds
    assert latents.shape == (60, *tiny_model.latent_shape)


# -- fit, cost, presets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"group": "attn"}, {"group": "full"}, {"augment": True}, {"goal": "frozen"}])
def test_a_fit_trains_its_group_and_leaves_the_model_to_the_bit(tiny_model, fields):
    model = quick(tiny_model)
    before = [p.detach().clone() for network in model.components.values() for p in network.parameters()]
    edit, again = (ConceptAblation(**SMALL, **fields).fit(model, TASK, seed=2) for _ in range(2))
    after = [p for network in model.components.values() for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert edit.names == set(model.select(fields.get("group", "text_kv")))
    assert all(torch.equal(edit.deltas[n], again.deltas[n]) for n in edit.deltas)
    assert sum(float(d.abs().max()) > 0 for d in edit.deltas.values()) > 0.8 * len(edit.deltas)


@pytest.mark.parametrize("text", ["cat -> dog", "cat; style:van gogh", "grumpy cat -> cat | keep tiger"])
@pytest.mark.parametrize("fields", [{}, {"loss": "noise"}, {"prior": "always"}, {"augment": True}])
def test_the_cost_is_known_before(tiny_model, fields, text):
    model, method, task = quick(tiny_model), ConceptAblation(**SMALL, **fields), Task.of(text)
    spent, expected = method.fit(model, task).card.cost, method.cost(model, task)
    assert (spent["forwards"], spent["backwards"]) == (expected["forwards"], expected["backwards"])


def test_presets_are_the_published_runs():
    names = ("authors", "authors-style", "authors-memorization", "authors-nudity")
    methods = [catalog.method(f"concept_ablation(preset={name!r})") for name in names]
    assert [(m.steps, m.batch, m.group, m.augment, m.prior) for m in methods] == [
        (100, 8, "text_kv", True, "overlap"),
        (100, 8, "text_kv", False, "overlap"),
        (400, 4, "full", False, "always"),
        (400, 8, "attn", False, "always"),
    ]
    rates = [2e-6 * 2 * 4, 2e-6 * 2 * 4, 5e-7 * 2 * 2, 4e-6 * 2 * 4 * 2]  # base · GPUs · batch, twice with prior on nudity
    assert [m.lr for m in methods] == pytest.approx(rates)
    assert all(m.images == 1000 and m.sum_channels and m.detach_bos and m.loss == "model" for m in methods)
    model = skeleton("sd1")
    assert len(model.select(methods[0].group)) == 32
    assert set(model.select("attn")) == set(model.select("xattn")) | set(model.select("selfattn"))


def test_a_killed_fit_goes_on(tiny_model, tmp_path):
    model, method, path = quick(tiny_model), ConceptAblation(**{**SMALL, "steps": 7}), tmp_path / "fit.safetensors"

    def kill(step, total, figures):
        if step == 6:
            raise KeyboardInterrupt

    uncut = method.fit(model, TASK, seed=1)
    with pytest.raises(KeyboardInterrupt):
        method.fit(model, TASK, seed=1, resources=Resources(checkpoint=path, checkpoint_every=5, report=kill))
    again = method.fit(model, TASK, seed=1, resources=Resources(checkpoint=path))
    assert all(torch.equal(uncut.deltas[n], again.deltas[n]) for n in uncut.deltas)
    assert uncut.card.cost["forwards"] == again.card.cost["forwards"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": 0}, "concept_ablation's images was 0; expected an integer of at least 1"),
        ({"clip": 0.0}, "concept_ablation's clip was 0.0; expected a number above 0"),
        ({"wording": "swap"}, "concept_ablation's wording was 'swap'; expected one of auto, replace, style, add, given"),
        ({"prior": "maybe"}, "expected one of overlap, always, never"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        ConceptAblation(**fields)

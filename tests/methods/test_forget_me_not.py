"""Forget-Me-Not against its sheet: the loss, which tokens are marked, what is trained, the inversion, and what it costs."""

import dataclasses

import pytest
import torch

from efface.core.errors import InvalidMethod, InvalidTask
from efface.core.fitting import fitting
from efface.core.method import Resources
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.methods import forget_me_not
from efface.methods.forget_me_not import ForgetMeNot
from efface.ops.resteer import attention_norm, pulled, spliced, squared_attention

SMALL = {"steps": 2, "batch": 2, "images": 2, "inversion_steps": 2}


def fitted(model, task="cat", resources=Resources(), seed=0, **fields):
    return ForgetMeNot(**{**SMALL, **fields}).fit(model, Task.of(task), seed=seed, resources=resources)


def subject(model, text="van gogh", kind="object", **fields):
    method = ForgetMeNot(**{**SMALL, **fields})
    task = Task.of(text if kind == "object" else f"{kind}:{text}")
    with fitting(method, model, task, 0, Resources()) as fit:
        return method.subject(fit, task.targets[0], text)


def attended(model, *args):
    with forget_me_not.attended(model, *args) as squares:
        return squares


def latents(model, rows, seed=0):
    return torch.randn(rows, *model.latent_shape, generator=seeded(seed))


# -- loss ----------------------------------------------------------------------------------------------------------------
def test_all_attention_on_one_marked_token_gives_the_largest_norm():
    """√(Σ_l H_l N_l) for each row; the mean of the maps, or marking another token, would give something else."""
    shapes, marked = [(2, 3, 16, 7), (2, 5, 4, 7)], torch.zeros(2, 7, dtype=torch.bool)
    marked[:, 2] = True
    layers = [torch.zeros(shape).index_fill(3, torch.tensor([2]), 1.0) for shape in shapes]
    squares = sum(squared_attention(layer, marked) for layer in layers)
    assert attention_norm(squares).item() == pytest.approx((3 * 16 + 5 * 4) ** 0.5)
    assert sum(squared_attention(layer, ~marked) for layer in layers).sum() == 0


def test_no_attention_left_has_no_gradient_and_no_nan():
    layer = torch.zeros(1, 1, 2, 3, requires_grad=True)
    attention_norm(squared_attention(layer, torch.ones(1, 3, dtype=torch.bool))).backward()
    assert torch.equal(layer.grad, torch.zeros_like(layer))


def by_hand(model, x, t, cond, marked):
    """The same sum from queries and keys, layer by layer."""
    total = torch.zeros(len(x))
    entering = model.inputs("xattn", cond, x=x, t=t)
    for name, layer in model.hook_points("cross_attn").items():
        q, k = layer.to_q(entering[f"{name}.to_q.weight"]), layer.to_k(cond.tokens)
        q, k = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, k))
        probabilities = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        total += (probabilities.square() * marked[:, None, None]).sum((1, 2, 3))
    return total


def test_the_loss_is_that_of_queries_and_keys(tiny_model):
    x, t, cond = latents(tiny_model, 2), torch.tensor([300, 700]), tiny_model.encode(["a picture of cat", "a picture of van gogh"])
    marked = torch.zeros(2, tiny_model.length, dtype=torch.bool)
    marked[0, 4], marked[1, 4:6] = True, True
    with torch.no_grad():
        found, expected = attended(tiny_model, x, t, cond, marked), by_hand(tiny_model, x, t, cond, marked)
        assert torch.allclose(found, expected, rtol=1e-4)
        assert not torch.allclose(found, by_hand(tiny_model, x, t, cond, marked.roll(1, 1)), rtol=1e-2)


def test_rows_of_a_batch_are_marked_each_by_itself(tiny_model):
    """The authors' code tiles the mask over heads and rows in the wrong order from two rows on."""
    x, t, cond = latents(tiny_model, 2), torch.tensor([300, 700]), tiny_model.encode(["a picture of cat", "a picture of van gogh"])
    marked = torch.zeros(2, tiny_model.length, dtype=torch.bool)
    marked[0, 4], marked[1, 4:6] = True, True
    with torch.no_grad():
        both = attended(tiny_model, x, t, cond, marked)
        alone = torch.cat([attended(tiny_model, x[[i]], t[[i]], cond[[i]], marked[[i]]) for i in range(2)])
        swapped = attended(tiny_model, x, t, cond, marked.flip(0))
    assert torch.allclose(both, alone, rtol=1e-4)
    assert not torch.allclose(both, swapped, rtol=1e-2)


# -- what is marked ------------------------------------------------------------------------------------------------------
def test_the_name_and_the_chosen_ends_are_marked(tiny_model):
    """ "a picture of van gogh" is start, three words, two of the name, ends: this tokenizer pads with end-of-text, as SD 1.x does."""
    found = subject(tiny_model)
    assert found.marked("none", False).nonzero().flatten().tolist() == [4, 5]
    assert found.marked("first", False).nonzero().flatten().tolist() == [4, 5, 6]
    assert found.marked("all", False).nonzero().flatten().tolist() == list(range(4, tiny_model.length))


def test_a_tokenizer_that_pads_with_another_token_has_one_end(tiny_model):
    """SD 2.x pads with "!": there the code's reading and ours are the same."""
    tokenizer = tiny_model.pipeline.tokenizer
    tokenizer.pad_token = "!"
    assert tiny_model.encode(["cat"]).ids[0, -1] != tokenizer.eos_token_id
    found = subject(tiny_model)
    assert torch.equal(found.marked("all", False), found.marked("first", False))


def test_learned_words_move_the_end(tiny_model):
    found = subject(tiny_model, inversion=True, tokens=4)
    assert found.marked("first", True).nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


def test_a_style_has_a_prompt_of_its_own_and_a_name_that_is_cut_off_is_refused(tiny_model):
    ids = tiny_model.encode(["a picture in van gogh style"]).ids[0]
    assert torch.equal(subject(tiny_model, kind="style").ids, ids)
    with pytest.raises(InvalidTask, match=r"do not stand in the prompt .* too long"):
        subject(tiny_model, text=" ".join(["cat"] * 14))


# -- what is trained -----------------------------------------------------------------------------------------------------
def test_what_lies_before_the_last_map_is_trained_and_nothing_behind_it(tiny_model):
    names = fitted(tiny_model, batch=4).names
    assert "unet.conv_in.weight" in names
    for layer in tiny_model.hook_points("cross_attn"):
        assert {f"{layer}.to_q.weight", f"{layer}.to_k.weight"} <= names
    assert not {"unet.conv_out.weight", "unet.conv_norm_out.weight"} & names
    last = list(tiny_model.hook_points("cross_attn"))[-2]  # the mid block stands last in the network's own order
    assert f"{last}.to_v.weight" not in names
    assert fitted(tiny_model, group="xattn").names <= set(tiny_model.select("xattn"))


def share(model, marked):
    x, cond = latents(model, 6, seed=5), model.encode(["a picture of cat"])
    with torch.no_grad(), model.attention() as maps:
        model.predict(x, 500, cond)
    mean = maps.mean()
    assert torch.allclose(mean.sum(-1), torch.ones(mean.shape[:-1]), atol=1e-5)
    return float(mean[..., marked].sum(-1).mean())


def test_attention_leaves_the_name_for_the_other_tokens(tiny_model):
    marked = subject(tiny_model, text="cat").marked("first", False)
    edit = fitted(tiny_model, steps=30, lr=1e-3, group="xattn")
    before = share(tiny_model, marked)
    with edit.attach(tiny_model):
        assert share(tiny_model, marked) < 0.7 * before
    assert share(tiny_model, marked) == before


def test_several_targets_are_forgotten_by_turns(tiny_model):
    edit = fitted(tiny_model, task="cat; van gogh", steps=6, batch=4)
    assert (
        edit.card.cost["forwards"]
        == ForgetMeNot(**{**SMALL, "steps": 6, "batch": 4}).cost(tiny_model, Task.of("cat; van gogh"))["forwards"]
    )


# -- inversion -----------------------------------------------------------------------------------------------------------
def test_the_names_own_words_in_its_place_change_nothing(tiny_model):
    found = subject(tiny_model)
    words = found.embeds[found.span]
    same = spliced(found.embeds, found.span.start, found.span.stop, words)
    assert torch.equal(same, found.embeds)
    longer = spliced(found.embeds, 4, 6, torch.zeros(4, 32))
    assert len(longer) == len(found.embeds)
    assert torch.equal(longer[8:], found.embeds[6:-2])
    with torch.no_grad():
        plain = tiny_model.encode(["a picture of van gogh"]).tokens
        assert torch.allclose(tiny_model.encode_tokens(embeds=same[None]).tokens, plain, atol=1e-6)
        assert not torch.allclose(tiny_model.encode_tokens(embeds=longer[None]).tokens, plain, atol=1e-2)


def test_lengths_approach_the_norm_and_directions_stay():
    rows = torch.randn(3, 8, generator=seeded(0))
    once = pulled(rows, 0.4, 0.1)
    assert torch.allclose(once.norm(dim=1), rows.norm(dim=1) + 0.1 * (0.4 - rows.norm(dim=1)))
    assert torch.allclose(torch.nn.functional.cosine_similarity(once, rows), torch.ones(3))
    assert torch.allclose(pulled(rows, 0.4, 1.0).norm(dim=1), torch.full((3,), 0.4))


def test_inversion_learns_words_of_the_right_length_and_leaves_the_table(tiny_model):
    table = tiny_model.pipeline.text_encoder.get_input_embeddings().weight
    before, start = table.detach().clone(), subject(tiny_model, inversion=True).words.detach()
    edit = fitted(tiny_model, task="van gogh", inversion=True, inversion_steps=40, word_norm=0.4)
    words = edit.extras["trace"].tensors["words/van gogh"]
    assert torch.equal(table, before)
    assert words.shape == (4, 32)
    assert torch.allclose(words.norm(dim=1), torch.full((4,), 0.4), atol=0.05)
    ids = tiny_model.encode(["van gogh"]).ids[0, 1:3]
    assert torch.equal(start[:2], before[ids])
    assert (torch.nn.functional.cosine_similarity(words, start) < 0.9999).all()
    assert edit.extras["trace"].tensors["inversion"].isfinite().sum() == 40


def test_inversion_lowers_its_loss_on_the_same_noise(tiny_model):
    """The loss of the words against fixed pictures, times and noise, before and after 60 steps."""
    method = ForgetMeNot(**{**SMALL, "inversion": True, "images": 1, "batch": 16, "inversion_lr": 0.05, "word_norm": 10.0})
    with fitting(method, tiny_model, Task.of("cat"), 0, Resources()) as fit:
        found = method.subject(fit, fit.task.targets[0], "cat")
        optimiser = torch.optim.AdamW([found.words], lr=0.05)
        losses = []
        for _ in range(60):
            fit.generator.manual_seed(3)
            losses.append(method.invert(fit, found, optimiser))
    assert losses[-1] < losses[0] - 1e-4


# -- pictures, cost, state -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fields", [{}, {"inversion": True}, {"images": 0}, {"group": "xattn", "batch": 3}])
def test_the_metered_cost_is_the_formula(tiny_model, fields):
    method = ForgetMeNot(**{**SMALL, **fields})
    task = Task.of("cat; van gogh")
    spent, expected = method.fit(tiny_model, task).card.cost, method.cost(tiny_model, task)
    assert (spent["forwards"], spent["backwards"]) == (expected["forwards"], expected["backwards"])


def test_the_users_pictures_stand_in_for_the_models(tiny_model):
    given = torch.rand(3, 3, 80, 70, generator=seeded(0))
    edit = fitted(tiny_model, resources=Resources(images={"cat": given}))
    assert edit.card.cost["forwards"] == SMALL["steps"] * SMALL["batch"]
    other = fitted(tiny_model, resources=Resources(images={"cat": 1 - given}))
    assert any(not torch.equal(edit.deltas[n], other.deltas[n]) for n in edit.names & other.names)
    with pytest.raises(InvalidTask, match=r"example images hold values from .* expected \[0, 1\]"):
        fitted(tiny_model, resources=Resources(images={"cat": 255 * given}))
    with pytest.raises(InvalidTask, match=r"the shape \(3, 80, 70\)"):
        fitted(tiny_model, resources=Resources(images={"cat": given[0]}))


def test_a_killed_fit_goes_on_to_the_bit(tiny_model, tmp_path):
    fields = {"inversion": True, "inversion_steps": 3, "steps": 3}
    whole = fitted(tiny_model, **fields)
    path = tmp_path / "state.safetensors"

    def kill(step, total, figures):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(tiny_model, resources=Resources(checkpoint=path, checkpoint_every=2, report=kill), **fields)
    assert path.exists()
    resumed = fitted(tiny_model, resources=Resources(checkpoint=path, checkpoint_every=2), **fields)
    assert all(torch.equal(whole.deltas[n], resumed.deltas[n]) for n in whole.names | resumed.names)
    assert torch.equal(*(e.extras["trace"].tensors["words/cat"] for e in (whole, resumed)))


def test_presets_and_readings():
    authors = ForgetMeNot.build(preset="authors")
    assert (authors.steps, authors.lr, authors.batch, authors.ends, authors.inversion) == (35, 2e-6, 1, "all", True)
    assert dataclasses.replace(authors, inversion=False).group == "full"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ends": "pooler"}, "expected one of first, all, none"),
        ({"images": 0, "inversion": True}, "expected False where `images` is 0"),
        ({"template": "a photo"}, "a text with one {}"),
        ({"steps": 0}, "an integer of at least 1"),
        ({"word_norm": 0}, "a number above 0, or None"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        ForgetMeNot(**fields)

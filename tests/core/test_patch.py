"""A right factor in the place of a Δ for each map: the patches of a `WeightEdit`."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from efface.core.card import Card
from efface.core.edit import Chain, Edit, Patch, WeightEdit
from efface.core.errors import InvalidEdit, Unsupported
from efface.core.sampling import seeded
from efface.core.task import Task
from efface.ops.ridge import RightFactor


def card(model):
    return Card.of(model, method="noop", task=Task.of("cat"), seed=0)


def patched(model, seed, rank=2, width=32):
    g = seeded(seed)
    left, right = torch.randn(width, rank, generator=g) / 8, torch.randn(rank, width, generator=g)
    names = tuple(model.select("text_kv"))
    return WeightEdit({}, card(model), patches=(Patch(names, RightFactor(left, right)),))


def weights(model):
    return {n: s.tensor.detach().clone() for n, s in model.select("text_kv").items()}


def test_attached_and_baked_it_multiplies_every_map(tiny_model):
    edit, before = patched(tiny_model, 0), weights(tiny_model)
    one = torch.eye(32) + edit.patches[0].factor.dense()
    with edit.attach(tiny_model):
        attached = weights(tiny_model)
    assert all(torch.allclose(attached[n], w @ one, atol=1e-5) and not torch.allclose(attached[n], w, atol=1e-2) for n, w in before.items())
    assert all(torch.equal(w, before[n]) for n, w in weights(tiny_model).items())
    edit.bake(tiny_model)
    assert all(torch.equal(w, attached[n]) for n, w in weights(tiny_model).items())


def test_in_a_chain_the_second_multiplies_what_the_first_left(tiny_model, tmp_path):
    first, second = patched(tiny_model, 0), patched(tiny_model, 1)
    chain = Edit.load(Chain((first, second), card(tiny_model)).save(tmp_path / "two.safetensors"))
    before, both = weights(tiny_model), first.patches[0].factor.then(second.patches[0].factor)
    with chain.attach(tiny_model):
        assert all(torch.allclose(w, before[n] + before[n] @ both.dense(), atol=1e-5) for n, w in weights(tiny_model).items())
    assert all(torch.equal(w, before[n]) for n, w in weights(tiny_model).items())


@pytest.mark.parametrize("thin", [True, False])
def test_the_file_holds_the_factor_alone(tiny_model, tmp_path, thin):
    edit = patched(tiny_model, 0)
    if not thin:
        dense = RightFactor(edit.patches[0].factor.dense())
        edit = WeightEdit({}, edit.card, patches=(Patch(edit.patches[0].names, dense),))
    path = edit.save(tmp_path / "cat.safetensors")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == ({"patch.0/left", "patch.0/right"} if thin else {"patch.0/left"})
    loaded = Edit.load(path)
    assert loaded.names == edit.names == frozenset(tiny_model.select("text_kv"))
    ours, theirs = edit.expand(tiny_model), loaded.expand(tiny_model)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_patch_for_another_width_is_refused(tiny_model):
    with pytest.raises(Unsupported, match="the patch is for maps of input width 16"), patched(tiny_model, 0, width=16).attach(tiny_model):
        pass


def test_a_file_without_its_factor_is_refused(tiny_model, tmp_path):
    path = patched(tiny_model, 0).save(tmp_path / "cat.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({"other": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(InvalidEdit, match=r"lacks 'patch.0/left'"):
        Edit.load(path)

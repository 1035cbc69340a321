"""SLD as a method: presets, concepts, probes, cost. What the rule computes is tested in tests/core/test_rules.py."""

import dataclasses

import pytest
import torch

from efface.core import catalog
from efface.core.edit import Chain, Edit, SamplingEdit
from efface.core.errors import InvalidMethod, NoEffect, Unsupported
from efface.core.evidence import Attack
from efface.core.method import Paper
from efface.core.task import Task
from efface.methods.sld import SLD


def drawn(model, prompt="a cat", steps=4):
    return model.sample([prompt], seed=3, steps=steps, guidance=3.0)


def test_the_presets_are_the_papers_four_and_diffusers_weaker_one():
    table = {
        "weak": (15, 200, 0.0, 0.0, 0.0),
        "medium": (10, 1000, 0.01, 0.3, 0.4),
        "strong": (7, 2000, 0.025, 0.5, 0.7),
        "max": (0, 5000, 1.0, 0.5, 0.7),
        "diffusers-weak": (15, 20, 0.0, 0.0, 0.0),
        "authors": (10, 1000, 0.01, 0.3, 0.4),
    }
    assert set(table) == set(SLD.presets)
    for name, values in table.items():
        built = SLD.build(preset=name)
        assert (built.warmup, built.strength, built.threshold, built.momentum, built.momentum_decay) == values
        assert catalog.method(str(built)) == built
    assert SLD() == SLD.build(preset="medium")
    assert SLD.build(preset="authors").prefix == ""
    assert set(SLD.field_docs()) == {f.name for f in dataclasses.fields(SLD)}


def test_stronger_presets_move_the_picture_further(tiny_model):
    plain, moved = drawn(tiny_model, steps=10), []
    for preset in ("diffusers-weak", "medium", "max"):
        with SLD.build(preset=preset).fit(tiny_model, Task.of("cat")).attach(tiny_model, check=False):
            moved.append(float((drawn(tiny_model, steps=10) - plain).abs().mean()))
    assert 0 < moved[0] < moved[1] < moved[2]


def test_the_prompt_that_is_the_safety_text_is_untouched_so_another_one_probes(tiny_model):
    """ε_p = ε_s: the bare concept as safety text does nothing for the bare concept as prompt, and the prefix is there for that."""
    plain = drawn(tiny_model, "cat")
    bare = SLD(prefix="").fit(tiny_model, Task.of("cat"))
    assert bare.card.probes == ("a picture of cat",)
    with bare.attach(tiny_model):
        assert torch.allclose(drawn(tiny_model, "cat"), plain, atol=1e-5)
        assert not torch.allclose(drawn(tiny_model, "a cat"), drawn(tiny_model, "cat"), atol=1e-3)
    edit = SLD().fit(tiny_model, Task.of("cat"))
    assert edit.card.probes == ("cat",)
    with edit.attach(tiny_model):
        assert not torch.allclose(drawn(tiny_model, "cat"), plain, atol=1e-3)
    idle = dataclasses.replace(bare, card=dataclasses.replace(bare.card, probes=("cat",)))
    for each in (idle, Chain((idle,), idle.card)):
        with pytest.raises(NoEffect), each.attach(tiny_model):
            pass


def test_several_concepts_are_one_text_or_one_each(tiny_model):
    task = Task.of(["cat", "car"])
    joined, apart = SLD(prefix="a").fit(tiny_model, task), SLD(prefix="a", joined=False).fit(tiny_model, task)
    assert (joined.rule.texts, apart.rule.texts) == (("a cat, car",), ("a cat", "a car"))
    for edit, per_step in ((joined, 3), (apart, 4)):
        with edit.attach(tiny_model, check=False):
            tiny_model.meter.reset()
            drawn(tiny_model)
            assert tiny_model.meter.forwards == 4 * per_step


def test_a_fit_costs_nothing_and_its_file_holds_all(tiny_model, tmp_path):
    edit = SLD(strength=50.0).fit(tiny_model, Task.of("cat"))
    assert isinstance(edit, SamplingEdit)
    assert edit.card.cost["forwards"] == edit.card.cost["backwards"] == 0
    assert SLD().cost(tiny_model, Task.of("cat")) == {"steps": 0, "forwards": 0, "backwards": 0}
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    with edit.attach(tiny_model):
        expected = drawn(tiny_model)
    with again.attach(tiny_model):
        assert torch.equal(drawn(tiny_model), expected)
    with pytest.raises(Unsupported, match="cannot be baked in"):
        edit.bake(tiny_model)


class OnPredict(Attack):
    access = "embeddings"
    paper = Paper("none", "none", "none")
    bare = True

    def search(self, before, after, concept, detector, *, budget, seed):
        self.require(after)
        raise AssertionError("the attack ran")


def test_an_attack_on_the_bare_denoiser_is_refused(tiny_model):
    task = Task.of("cat")
    with SLD().fit(tiny_model, task).attach(tiny_model), pytest.raises(Unsupported, match="would attack the un-erased model"):
        OnPredict().search(tiny_model, tiny_model, task.targets[0], None, budget=1, seed=0)
    with pytest.raises(AssertionError, match="the attack ran"):
        OnPredict().search(tiny_model, tiny_model, task.targets[0], None, budget=1, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": -1}, "sld's warmup was -1; expected an integer of at least 0"),
        ({"warmup": 60}, "at most warmup_of = 50"),
        ({"warmup_of": 0}, "at least 1"),
        ({"strength": -1.0}, "a number of at least 0"),
        ({"momentum_decay": 1.5}, "from 0 to 1"),
        ({"threshold": float("nan")}, "a finite number"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InvalidMethod, match=message):
        SLD(**fields)

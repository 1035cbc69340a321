"""The null baseline: it is the pipeline's own negative prompt, and it is honest about where it does nothing."""

import pytest
import torch

from efface.core import catalog
from efface.core.edit import Edit, SamplingEdit
from efface.core.errors import InvalidTask, Unsupported
from efface.core.sampling import noise_for
from efface.core.task import Task


def fitted(model, *concepts):
    return catalog.method("negative_prompt").fit(model, Task.of(list(concepts) or ["cat"]))


def drawn(model, **settings):
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "a dog", num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(7), output_type="pt", **settings
    )
    return made.images


def test_it_draws_what_the_pipeline_draws_with_this_negative_prompt(tiny_model):
    plain = tiny_model.sample(["a dog"], seed=7, steps=3, guidance=3.0)
    with fitted(tiny_model, "cat", "car").attach(tiny_model):
        images = tiny_model.sample(["a dog"], seed=7, steps=3, guidance=3.0)
    assert torch.allclose(images, drawn(tiny_model, negative_prompt="cat, car"), atol=1e-5)
    assert torch.allclose(plain, drawn(tiny_model), atol=1e-5)
    assert not torch.allclose(images, plain, atol=1e-3)


def test_the_prompt_that_is_the_concept_loses_its_guidance_and_no_more(tiny_model):
    """ε(c) + s (ε(c) − ε(c)) = ε(c): the known failure."""
    x, cat, dog, null = (noise_for(0, 1, tiny_model.latent_shape), *(tiny_model.encode([t]) for t in ("cat", "dog", "")))
    with fitted(tiny_model).attach(tiny_model), torch.no_grad():
        for prompt, equal in ((cat, True), (dog, False)):
            guided = tiny_model.guided(x, 400, prompt, null, 7.5)
            assert torch.allclose(guided, tiny_model.predict(x, 400, prompt), atol=1e-5) is equal


def test_fitting_and_sampling_cost_nothing_on_top(tiny_model):
    edit = fitted(tiny_model)
    assert edit.card.cost["forwards"] == edit.card.cost["backwards"] == 0
    assert catalog.method("negative_prompt").cost(tiny_model, Task.of("cat")) == {"steps": 0, "forwards": 0, "backwards": 0}
    spent = []
    for attached in (False, True):
        tiny_model.meter.reset()
        if attached:
            with edit.attach(tiny_model, check=False):
                tiny_model.sample(["dog"], steps=3, guidance=3.0)
        else:
            tiny_model.sample(["dog"], steps=3, guidance=3.0)
        spent.append(tiny_model.meter.forwards)
    assert spent == [6, 6]


def test_it_is_a_removable_rule_that_cannot_be_baked_in_and_survives_its_file(tiny_model, tmp_path):
    edit = fitted(tiny_model)
    assert isinstance(edit, SamplingEdit)
    assert "leave it out" in edit.threat
    with pytest.raises(Unsupported, match="cannot be baked in"):
        edit.bake(tiny_model)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert again.rule.settings() == {"text": "cat"}
    with again.attach(tiny_model):
        assert tiny_model.unseen == ("negative_prompt",)


def test_an_anchor_and_guidance_of_one_are_refused(tiny_model):
    with pytest.raises(InvalidTask, match="towards nothing; leave out '-> dog'"):
        fitted(tiny_model, "cat -> dog")
    with fitted(tiny_model).attach(tiny_model), pytest.raises(Unsupported, match="there is none; give more than 1"):
        tiny_model.sample(["dog"], steps=1, guidance=1.0)

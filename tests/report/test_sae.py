"""The page of latents: what it says of each picture is what the autoencoder computes on the un-edited model."""

import pytest
import torch

from efface.core.edit import WeightEdit
from efface.core.errors import Unsupported
from efface.core.method import Resources
from efface.core.task import Task
from efface.methods.saeuron import SAeUron
from efface.models import tiny
from efface.models.sae import traced
from efface.report import sae

PROMPTS = ["cat", "dog", "a picture of a car", "<b>bold</b>"]


@pytest.fixture(scope="module")
def fitted():
    model, task = tiny.model(), Task.of("cat", ["dog"])
    assets = SAeUron.make_assets(model, task)
    return model, SAeUron(samples=2, latent_steps=2, contrast=3, selected=2).fit(model, task, resources=Resources(assets=assets))


def test_the_maps_are_the_latents_activations_where_they_are_ablated(fitted):
    model, edit = fitted
    firings = sae.gather(model, edit, PROMPTS, seed=3)
    (place, feature), noise = (
        sae.ablation(edit),
        torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3 + i)) for i in range(4)]),
    )
    times = model.schedule.grid(2)
    features = traced(model, place, PROMPTS, noise, times, model.default_guidance)
    for number, latent in enumerate(firings.latents):
        active = [i for i in range(2) if latent in feature.table.latents[i][feature.table.thresholds[i].isfinite()]]
        assert len(active) == firings.times[number]
        expected = torch.stack([feature.net.codes(features[i].flatten(0, 1))[:, latent].reshape(4, 8, 8) for i in active]).mean(0)
        assert torch.allclose(firings.maps[number], expected, atol=1e-4)
        means = expected.flatten(1).mean(1)
        assert firings.best(number) == means.argsort(descending=True).tolist()
    assert torch.equal(firings.images, model.sample(PROMPTS, seed=3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())


def test_heat_is_nothing_where_a_latent_is_silent_and_orange_where_it_fires_most():
    image, heat = torch.rand(3, 8, 8), torch.zeros(2, 2)
    grey = sae.heated(image, heat, 1.0)
    assert torch.equal(grey[0], grey[1])
    heat[0, 0] = 1.0
    hot = sae.heated(image, heat, 1.0)
    assert (hot[0, 0, 0] > hot[2, 0, 0] + 100).item()
    assert torch.equal(hot[:, -1, -1], grey[:, -1, -1])


def test_the_page_is_one_file_that_shows_every_latent_and_escapes_prompts(fitted, tmp_path):
    model, edit = fitted
    firings = sae.gather(model, edit, PROMPTS, seed=3)
    text = sae.write(firings, tmp_path / "page.html", edit=edit, command="efface sae show x").read_text(encoding="utf-8")
    assert all(f"Latent {latent}" in text for latent in firings.latents)
    assert text.count("data:image/png") == 2 * 4 * len(firings.latents)
    assert "&lt;b&gt;bold" in text
    assert "<b>bold" not in text
    assert "://" not in text


def test_an_edit_without_latents_is_refused(fitted):
    model, edit = fitted
    other = WeightEdit({}, edit.card)
    with pytest.raises(Unsupported, match="ablates no latents"):
        sae.ablation(other)

"""What every test can ask for. `import tiny` works in every test file (this folder is on the path)."""

from __future__ import annotations

import pytest
import tiny

from efface.core.model import Model


@pytest.fixture
def tiny_model() -> Model:
    """A Stable Diffusion model of 0.2 M parameters that predicts noise, fresh for each test."""
    from efface.models.sd import StableDiffusion

    return StableDiffusion(tiny.pipeline("epsilon"), id="tiny")


@pytest.fixture
def tiny_v_model() -> Model:
    """The same with other weights and a network that predicts velocity."""
    from efface.models.sd import StableDiffusion

    return StableDiffusion(tiny.pipeline("v_prediction", seed=1), id="tiny-v")

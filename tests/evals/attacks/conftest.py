"""Pairs of models for attacks; what the tests share is in `attackparts`."""

from __future__ import annotations

from collections.abc import Iterator

import attackparts as parts
import pytest

from efface.api import erase
from efface.core.edit import Edit
from efface.core.model import Model


@pytest.fixture
def before() -> Model:
    """The un-erased model, which draws in two steps."""
    return parts.tiny_model()


@pytest.fixture(scope="session")
def no_cat() -> Edit:
    """UCE's erasure of the cat."""
    return erase(parts.tiny_model(), "cat", method="uce")


@pytest.fixture
def after(no_cat: Edit) -> Iterator[Model]:
    """The same model, another object, with the edit attached."""
    model = parts.tiny_model()
    with no_cat.attach(model):
        yield model

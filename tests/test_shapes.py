"""The shapes that `efface.ops` declares are checked while tests run (pyproject.toml asks jaxtyping for it)."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from efface.ops.ridge import without_component


def test_a_wrong_shape_is_refused_in_tests() -> None:
    assert without_component(torch.ones(3, 2), torch.ones(3, 2)).shape == (3, 2)
    with pytest.raises(jaxtyping.TypeCheckError):
        without_component(torch.ones(3, 2), torch.ones(4, 2))

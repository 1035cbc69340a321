"""The shapes that `efface.ops` declares are checked while tests run (pyproject.toml asks jaxtyping for it)."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from efface.ops.ridge import gram


def test_a_wrong_shape_is_refused_in_tests() -> None:
    assert gram(torch.ones(3, 2), torch.ones(3), 1.0).shape == (2, 2)
    with pytest.raises(jaxtyping.TypeCheckError):
        gram(torch.ones(3, 2), torch.ones(4), 1.0)

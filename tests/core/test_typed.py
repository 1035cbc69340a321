"""Literals as values of a field's type; what a type of somebody else's takes is not judged."""

from typing import Any, Literal, Optional, Union

import pytest

from efface.core.typed import typed


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (2, float, 2.0),
        (None, float | None, None),
        (2, float | None, 2.0),
        (2, Optional[float], 2.0),  # noqa: UP045
        ("x", Union[int, str], "x"),  # noqa: UP007
        (2.5, int | float, 2.5),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ("a", Literal["a", "b"], "a"),
        ({"a": 1}, dict[str, int], {"a": 1}),
        ([1], Any, [1]),
    ],
)
def test_a_value_has_one_form(value: Any, kind: Any, expected: Any) -> None:
    found = typed(value, kind)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (2.5, int),
        (True, int),
        (1, bool),
        ("x", float | None),
        (1.0, tuple[float, ...]),
        ([1], tuple[int, str]),
        (None, str),
        ("1", int | float),
    ],
)
def test_what_is_none_is_told(value: Any, kind: Any) -> None:
    with pytest.raises(TypeError):
        typed(value, kind)

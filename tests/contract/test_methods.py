"""Every method of the catalogue through the conformance suite, on every tiny family; in the slow tier on the bundled model.

In tests beartype watches the shapes in `efface.ops`, and picks the items that it looks at with Python's global generator. So that this
one state is not blamed on a method here, it is asked for in a process of its own, where nothing watches."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from efface.bench import conformance
from efface.bench.conformance import checks
from efface.core import catalog

WATCHED = "Python's random state changed"
UNWATCHED = """
import json, sys
from efface.bench import conformance
from efface.core import catalog
found = {name: [o.detail for o in conformance.failed(conformance.run(catalog.find(name), families=["sd1"], only=["fits", "unchanged"]))]
         for name in sys.argv[1:]}
print(json.dumps(found))
"""


def complaints(name: str, families: tuple[str, ...], slow: bool = False) -> str:
    found = conformance.failed(conformance.run(catalog.find(name), families=families, slow=slow))
    return "\n".join(f"{o.check} ({o.family}): {o.detail}" for o in found if (o.check, o.detail) != ("unchanged", WATCHED))


@pytest.mark.parametrize("family", checks.families())
@pytest.mark.parametrize("name", catalog.names())
def test_a_method_keeps_its_promises(name: str, family: str) -> None:
    assert not complaints(name, (family,))


def test_no_fit_leaves_a_trace_in_the_process() -> None:
    names = catalog.names()
    done = subprocess.run([sys.executable, "-c", UNWATCHED, *names], capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout) == {name: [] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", catalog.names())
def test_a_method_erases_the_target_and_nothing_else_as_the_judge_sees_it(name: str) -> None:
    assert not complaints(name, (), slow=True)

"""efface: erase concepts from text-to-image diffusion models, and measure what it cost.

    model = efface.load("emoji")
    edit = efface.erase(model, "cat", keep=["dog", "tiger"], method="ap", seed=0)
    with edit.attach(model):
        images = model.sample(["a cat on a blue background", "a dog"], seed=7)
    edit.save("no-cat.safetensors")

Names are imported on first use, so that `import efface` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efface.api import erase as erase
    from efface.core.catalog import method as method
    from efface.core.edit import Edit as Edit
    from efface.core.errors import EffaceError as EffaceError
    from efface.core.method import Method as Method
    from efface.core.method import Needs as Needs
    from efface.core.method import Paper as Paper
    from efface.core.method import Resources as Resources
    from efface.core.model import Cond as Cond
    from efface.core.model import Model as Model
    from efface.core.task import Concept as Concept
    from efface.core.task import Swap as Swap
    from efface.core.task import Task as Task
    from efface.models import load as load
    from efface.models.export import export as export
    from efface.models.finetune import finetune as finetune
    from efface.models.imports import import_edit as import_edit

_HOME = {
    "Concept": "efface.core.task",
    "Cond": "efface.core.model",
    "Edit": "efface.core.edit",
    "EffaceError": "efface.core.errors",
    "Method": "efface.core.method",
    "Model": "efface.core.model",
    "Needs": "efface.core.method",
    "Paper": "efface.core.method",
    "Resources": "efface.core.method",
    "Swap": "efface.core.task",
    "Task": "efface.core.task",
    "erase": "efface.api",
    "export": "efface.models.export",
    "finetune": "efface.models.finetune",
    "import_edit": "efface.models.imports",
    "load": "efface.models",
    "method": "efface.core.catalog",
}
__all__ = [*_HOME]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'efface' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""One safetensors file with a JSON header: read with checks, written whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from efface.core.errors import EffaceError, InvalidEdit
from efface.core.whole import whole_file

HEADER = "efface"


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Writes to a temporary name in the same folder, then renames. Raises EffaceError when the disk is full, OSError otherwise."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with whole_file(path) as temporary:
            save_file(whole, temporary, metadata={"format": "pt", HEADER: json.dumps(header, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise EffaceError(f"no space is left to write {path}; free some and try again. Nothing was written") from error
        raise
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header. Raises InvalidEdit for a file that is missing, truncated, corrupt or not efface's."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InvalidEdit(f"no edit file at {path}; give the path of a .safetensors file that `edit.save` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InvalidEdit(
            f"{path} is not a whole safetensors file ({error}); it is corrupt or truncated, fetch or make it again"
        ) from error
    if HEADER not in metadata:
        raise InvalidEdit(f"{path} is a safetensors file without efface's card; it was not written by `edit.save`")
    try:
        header = json.loads(metadata[HEADER])
    except json.JSONDecodeError as error:
        raise InvalidEdit(f"the card in {path} is no JSON ({error}); the file is corrupt, make it again") from error
    return tensors, header

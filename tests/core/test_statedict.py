"""Weights that somebody names: found in a folder, read without running code, and told apart from what they are not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from efface.core.errors import EffaceError
from efface.core.statedict import Weights, digest

WEIGHTS = Weights("ResNet-50", "resnet50", "expected this; give that")


def test_a_file_or_the_one_of_a_folder(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no.pth", "there are no ResNet-50 weights at"), (tmp_path, "holds 0 files of ResNet-50's weights")):
        with pytest.raises(EffaceError, match=f"{words}.*; expected this; give that"):
            WEIGHTS.find(path)
    file = tmp_path / "ResNet50-1.pth"
    for name in ("alexnet.pth", "resnet50.txt", file.name):
        (tmp_path / name).write_bytes(b"0")
    assert WEIGHTS.find(tmp_path) == WEIGHTS.find(str(file)) == file
    assert len(digest(file)) == 12
    (tmp_path / "resnet50.safetensors").write_bytes(b"1")
    assert digest(tmp_path / "resnet50.safetensors") != digest(file)
    with pytest.raises(EffaceError, match="holds 2 files"):
        WEIGHTS.find(tmp_path)


@dataclass
class Evil:
    """Touches a file when it is unpickled."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_run_no_code(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pth")
    save_file({"a": torch.ones(2)}, tmp_path / "good.safetensors")
    assert all(torch.equal(WEIGHTS.read(tmp_path / name)["a"], torch.ones(2)) for name in ("good.pth", "good.safetensors"))
    torch.save({"a": Evil(tmp_path / "touched")}, tmp_path / "evil.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:40])
    with pytest.raises(EffaceError, match="holds something else than a state dict"):
        WEIGHTS.read(tmp_path / "list.pth")
    for name in ("evil.pth", "cut.safetensors"):
        with pytest.raises(EffaceError, match=f"{name} cannot be read as a state dict"):
            WEIGHTS.read(tmp_path / name)
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "touched").exists()  # control

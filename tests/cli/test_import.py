"""`efface import`: what others have made becomes an edit with a card that says so, and can be measured like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from efface.core.edit import Edit, LowRankEdit, WeightEdit
from efface.models.load import load

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def weight() -> torch.Tensor:
    return tiny.pipeline().unet.get_parameter(NAME).detach()


@pytest.fixture(params=["LoRA", "state dict", "torch's", "folder"])
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same change of one map in what others write."""
    up, down = 0.3 * torch.ones(16, 1), torch.ones(1, tiny.WIDTH)
    changed = {NAME: weight() + up @ down}
    if request.param == "LoRA":
        module = f"unet.{NAME.removesuffix('.weight')}"
        save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, tmp_path / "theirs.safetensors")
    elif request.param == "state dict":
        save_file(changed, tmp_path / "theirs.safetensors")
    elif request.param == "torch's":
        torch.save(changed, tmp_path / "theirs.pt")
    else:
        pipeline = tiny.pipeline()
        pipeline.unet.load_state_dict(changed, strict=False)
        pipeline.save_pretrained(tmp_path / "theirs")
    (found,) = tmp_path.glob("theirs*")
    return found


def test_what_others_made_becomes_an_edit(efface: Callable, theirs: Path, model_folder: Path) -> None:
    outcome = efface("import", theirs, "--model", model_folder, "--task", "van gogh", "--out", "edit.safetensors", "--json")
    assert outcome.code == 0
    assert (outcome.json["out"], outcome.json["parameters"]) == ("edit.safetensors", 1)
    edit, model = Edit.load("edit.safetensors"), load(model_folder)
    assert edit.card.json() == {**outcome.json["card"], "probes": ("van gogh",), "fingerprint": edit.card.json()["fingerprint"]}
    assert edit.card.method == f"imported(source={theirs.name!r})"
    assert edit.card.task == "style:van gogh"  # the kind is known for the name
    assert edit.card.model == str(model_folder)
    (delta,) = (edit.deltas(model) if isinstance(edit, LowRankEdit) else edit.deltas).values()  # type: ignore[attr-defined]
    assert isinstance(edit, (LowRankEdit, WeightEdit))
    assert torch.allclose(delta, torch.tensor(0.3), atol=1e-6)


def test_an_imported_edit_is_exported_and_sampled(efface: Callable, theirs: Path, model_folder: Path) -> None:
    assert efface("import", theirs, "--model", model_folder, "--task", "cat", "--out", "edit.safetensors").code == 0
    assert efface("sample", "cat", "--model", model_folder, "--edit", "edit.safetensors", "--out", "drawn").code == 0
    data = efface("export", "edit.safetensors", "--as", "lora", "--prove", "--out", "again.safetensors", "--json").json
    assert data["difference"] < 1e-4
    assert set(data["ranks"].values()) == {1}
    outcome = efface("import", "again.safetensors", "--model", model_folder, "--out", "again-edit.safetensors")
    assert outcome.code == 0
    assert "erases cat" in outcome.out  # efface's own exports bring their card
    assert Edit.load("again-edit.safetensors").card.method == f"imported(source={theirs.name!r})"


def test_scale_belongs_to_loras(efface: Callable, model_folder: Path) -> None:
    module = f"unet.{NAME.removesuffix('.weight')}"
    save_file({f"{module}.lora_A.weight": torch.ones(1, tiny.WIDTH), f"{module}.lora_B.weight": torch.ones(16, 1)}, "a.safetensors")
    outcome = efface("import", "a.safetensors", "--model", model_folder, "--scale", 0.5, "--out", "edit.safetensors")
    assert outcome.code == 0
    assert "efface: nothing says what it erases" in outcome.err
    edit = Edit.load("edit.safetensors")
    assert isinstance(edit, LowRankEdit)
    assert torch.allclose(edit.deltas(load(model_folder))[f"unet.{NAME}"], torch.tensor(0.5))


def test_what_is_there_is_not_overwritten(efface: Callable, theirs: Path, model_folder: Path) -> None:
    arguments = ("import", theirs, "--model", model_folder, "--out", "edit.safetensors")
    assert efface(*arguments).code == 0
    written = Path("edit.safetensors").read_bytes()
    refused = efface(*arguments, "--task", "cat")
    assert (refused.code, "--force" in refused.err) == (2, True)
    assert Path("edit.safetensors").read_bytes() == written
    assert efface(*arguments, "--task", "cat", "--force").code == 0
    assert Path("edit.safetensors").read_bytes() != written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors"], "there is no file or folder none.safetensors"),
        (["same.safetensors"], "the very weights"),
        (["wrong.safetensors"], "the nearest name here is"),
        (["wrong.safetensors", "--task", "; "], "no target to erase"),
        (["wrong.safetensors", "--out", "edit.pt"], "--out edit.pt was given"),
        (["wrong.safetensors", "--out", "same.safetensors"], "--out same.safetensors exists already"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(efface: Callable, model_folder: Path, arguments: list[str], message: str) -> None:
    save_file({NAME: weight()}, "same.safetensors")
    save_file({f"{NAME}s": weight()}, "wrong.safetensors")
    out = [] if "--out" in arguments else ["--out", "edit.safetensors"]
    outcome = efface("import", *arguments, "--model", model_folder, *out)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["same.safetensors", "wrong.safetensors"]


def test_no_change_of_what_is_denoised_is_no_edit(efface: Callable, model_folder: Path) -> None:
    module = f"unet.{NAME.removesuffix('.weight')}"
    save_file({f"{module}.lora_A.weight": torch.ones(1, tiny.WIDTH), f"{module}.lora_B.weight": torch.zeros(16, 1)}, "a.safetensors")
    outcome = efface("import", "a.safetensors", "--model", model_folder, "--task", "cat", "--out", "edit.safetensors")
    assert (outcome.code, "changes nothing for 'cat'" in outcome.err) == (2, True)
    assert not Path("edit.safetensors").exists()

"""The field's prompt files, each as its authors write its header, made here; and what a broken one is told."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from efface.bench.listed import Rows
from efface.bench.options import Options
from efface.bench.prompts import Prompt, names_minors, read
from efface.bench.questions import ERASURE
from efface.core.errors import EffaceError
from efface.core.evidence import Shot


def write(folder: Path, text: str, name: str = "prompts.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


FORMS: dict[str, tuple[str, str, Prompt]] = {
    "I2P, as published": (
        "prompt,categories,hard,nudity_percentage,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model",
        '"a statue, marble","sexual, shocking",1,20.0,4068382156,7,512,768,SD 1.4',
        Prompt("a statue, marble", 0, 4068382156, 7.0, 512, 768, "", ("sexual", "shocking")),
    ),
    "I2P, as ESD renamed it": (
        ",prompt,categories,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,sd_model,case_number",
        "9,a statue,hate,12,7.5,512,512,SD 1.4,7",
        Prompt("a statue", 7, 12, 7.5, 512, 512, "", ("hate",)),
    ),
    "Imagenette, AP": (
        "case_number,prompt,label_str,evaluation_seed",
        "3,Image of Chain Saw,Chain Saw,3990",
        Prompt("Image of Chain Saw", 3, 3990, concept="Chain Saw"),
    ),
    "Imagenette, ESD": (
        "case_number,prompt,evaluation_seed,class",
        "0,image of tench,41,tench",
        Prompt("image of tench", 0, 41, concept="tench"),
    ),
    "artists, ESD": (
        "case_number,data,prompt,artist,evaluation_seed",
        "5,x,A house by Monet,Monet,2",
        Prompt("A house by Monet", 5, 2, concept="Monet"),
    ),
    "Ring-A-Bell": ("prompt,case_number,evaluation_seed", "church =))) zz,4,15", Prompt("church =))) zz", 4, 15)),
    "UnlearnDiffAtk": (
        "case_number,prompt,evaluation_seed,evaluation_guidance",
        "1,A church.,36416,7.5",
        Prompt("A church.", 1, 36416, 7.5),
    ),
    "MACE": (",type,prompt,evaluation_seed", "250,others,A sketch of a clown,3", Prompt("A sketch of a clown", 250, 3, type="others")),
    "COCO, ESD": ("image_id,source,prompt,evaluation_seed", "391895,coco,A man rides,9", Prompt("A man rides", 391895, 9)),
    "COCO, MACE": ("case_number,source,prompt,evaluation_seed,coco_id", "2,coco,A man rides,9,391895", Prompt("A man rides", 2, 9)),
    "COCO, HUB": ("image_id,text", "391895,A man rides", Prompt("A man rides", 391895)),
    "a text beside the prompt": ("text,prompt", "a note,a cat", Prompt("a cat", 0)),
    "pandas' floats": ("prompt,sd_seed", "a cat,12.0", Prompt("a cat", 0, 12)),
    "empty cells": ("prompt,evaluation_seed,evaluation_guidance", "a cat,,nan", Prompt("a cat", 0)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, tmp_path: Path) -> None:
    header, row, expected = FORMS[form]
    assert read(write(tmp_path, f"{header}\n{row}\n")).rows == (expected,)


def test_both_spellings_are_one_file_apart_from_its_digest(tmp_path: Path) -> None:
    published = read(write(tmp_path, "prompt,sd_seed,sd_guidance_scale\na,1,7\n", "a.csv"))
    renamed = read(write(tmp_path, "evaluation_guidance,PROMPT,evaluation_seed\n7,a,1\n", "b.csv"))
    assert published.rows == renamed.rows
    assert published.digest != renamed.digest
    assert renamed.columns == {"text": "PROMPT", "seed": "evaluation_seed", "guidance": "evaluation_guidance"}


def test_plain_text_gzip_tabs_a_byte_order_mark_and_lines_within_quotes(tmp_path: Path) -> None:
    assert [p.text for p in read(write(tmp_path, "a cat, sitting\n\n  a dog \n", "list.txt")).rows] == ["a cat, sitting", "a dog"]
    zipped = tmp_path / "p.csv.gz"
    zipped.write_bytes(gzip.compress('\ufeffprompt,seed\n"two\nlines",4\n\n'.encode()))
    assert read(zipped).rows == (Prompt("two\nlines", 0, 4),)
    assert read(write(tmp_path, "seed\tprompt\n4\ta, b\n", "p.tsv")).rows == (Prompt("a, b", 0, 4),)


def test_a_row_without_a_seed_has_the_same_noise_however_few_are_drawn(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join(f"a picture of {name}" for name in "abcdefgh"), "few.txt")

    def seeds(limit: int | None) -> dict[str, int]:
        options = Options(prompts=str(path), limit=limit)
        plan = Rows.of("artists", "full", options).plan(
            "", "full", options, ERASURE, lambda row: [Shot(row.text, 0, "target", "a", ("a",))]
        )
        return {shot.prompt: shot.seed for shot in plan.shots}

    whole, few = seeds(None), seeds(3)
    assert len(set(whole.values())) == 8
    assert few == {prompt: seed for prompt, seed in whole.items() if prompt in few}
    assert list(few) != list(whole)[:3], "control: they are not the first rows of the file"


def test_a_subset_is_evenly_spaced_and_keeps_every_class_of_a_sorted_file(tmp_path: Path) -> None:
    rows = [f"{c}{i},{c}" for c in "abcde" for i in range(10)]
    found = read(write(tmp_path, "\n".join(["prompt,class", *rows])))
    some = found.subset(10)
    assert [p.concept for p in some] == [c for c in "abcde" for _ in (0, 1)]
    assert found.subset(None) == found.subset(50) == found.rows
    with pytest.raises(ValueError, match="limit was 0"):
        found.subset(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt,seed\na,1\n", r"prompts.csv has no column 'prompt'; did you mean 'promt'"),
        ("", "has no column 'prompt'"),
        ("prompt,seed\n", "holds no prompt"),
        ("prompt,seed\na,x\n", r"prompts.csv, line 2, column 'seed', holds 'x'; expected a number"),
        ("prompt,seed\na,1\nb,-1\n", "line 3, column 'seed', holds '-1'; expected an integer of at least 0"),
        ("prompt,seed\na,1.5\n", "line 2, column 'seed', holds '1.5'"),
        ("prompt,evaluation_guidance\na,inf\n", "column 'evaluation_guidance', holds 'inf'"),
        ("prompt,sd_image_width\na,0\n", "column 'sd_image_width', holds '0'; expected an integer of at least 1"),
        ("prompt,seed\n ,1\n", "line 2, column 'prompt', is blank"),
        ("prompt,seed\na, b,1\n", "line 2, has 3 cells, and the header 2; put a text with commas in quotes"),
        ("prompt,seed,seed\na,1,2\n", "has the column 'seed' twice"),
        ('prompt,seed\n"a"b,1\n', "line 2, is no CSV"),
        ('prompt,seed\n"a,1\n', "is no CSV"),
    ],
)
def test_a_broken_file_is_told_where(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(EffaceError, match=message):
        read(write(tmp_path, text))


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    with pytest.raises(EffaceError, match=r"cannot read the prompts .*nowhere.csv: No such file"):
        read(tmp_path / "nowhere.csv")
    (tmp_path / "latin.csv").write_bytes("prompt\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(EffaceError, match=r"is no UTF-8 text \(byte 10\)"):
        read(tmp_path / "latin.csv")
    (tmp_path / "half.csv.gz").write_bytes(gzip.compress(b"prompt\na\n")[:-4])
    with pytest.raises(EffaceError, match="cannot read the prompts"):
        read(tmp_path / "half.csv.gz")


def test_prompts_about_minors_are_recognised_and_others_are_not() -> None:
    for text in ("a Child in a garden", "two kids", "schoolgirl", "15 years old", "a 9-year-old", "young boys", "teenager portrait"):
        assert names_minors(text), text
    for text in ("a woman of 35 years", "a boyish grin", "kidney", "a man, 21 years old", "miner", "babylon", "117 year old house"):
        assert not names_minors(text), text

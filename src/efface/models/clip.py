"""CLIP's tokenizer, from the merges that are shipped: no Hub is needed for it. And whole CLIPs, from a folder or the Hub."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from efface.core.errors import InvalidModel
from efface.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

MERGES = Path(__file__).parent / "configs" / "clip" / "merges.txt.gz"
LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_table() -> dict[str, int]:
    """The printable stand-in of each byte, in the order of CLIP's vocabulary (from GPT-2, Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def spelt(token: str, table: dict[str, int]) -> str:
    """The text that a token's bytes spell, or "" where they are no text of their own."""
    try:
        return bytes(table[mark] for mark in token).decode()
    except (KeyError, UnicodeDecodeError):
        return ""


def clip_tokenizer(*, pad: str = END) -> CLIPTokenizer:
    """CLIP's byte-level BPE of 49 408 tokens and 77 positions; `pad` is "!" in Stable Diffusion 2.x."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=LENGTH, pad_token=pad)


def load_clip(source: str) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP, and what prepares its pictures and texts, from a folder that `save_pretrained` wrote, or by its Hub id.

    Pictures are resized by Pillow, as OpenAI's code does it, whether or not torchvision is there, which resizes a little differently.
    Raises InvalidModel where it is not there or cannot be read."""
    folder = Path(source).expanduser()
    with quiet():
        import transformers

        # In older versions the one that works by Pillow has the plain name.
        pictures = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        local = folder.is_dir() or source.count("/") != 1  # a Hub id is OWNER/NAME
        where = {"pretrained_model_name_or_path": str(folder) if folder.is_dir() else source, "local_files_only": local}
        try:
            model = transformers.CLIPModel.from_pretrained(**where, dtype="float32")
            processor = transformers.CLIPProcessor(pictures.from_pretrained(**where), transformers.CLIPTokenizer.from_pretrained(**where))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            said = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
            raise InvalidModel(
                f"there is no CLIP in {source!r} ({type(error).__name__}: {said}); give a folder with config.json, model.safetensors, "
                "preprocessor_config.json and the tokenizer's files as --clip FOLDER or clip = 'FOLDER', or a Hub id that can be reached"
            ) from error
    return model.eval().requires_grad_(False), processor


@cache
def _vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    merges = tuple((left, right) for left, right in (line.split(" ") for line in lines))
    marks = list(byte_table())
    tokens = [*marks, *(mark + "</w>" for mark in marks), *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges

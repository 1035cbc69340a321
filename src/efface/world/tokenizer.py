"""A small CLIPTokenizer: byte-level BPE learned from the captions.

Every caption word is one whole token, and all 256 bytes stand in the vocabulary with and without the end-of-word mark, so that
any text encodes without an unknown token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from efface.ops.bpe import MARK, alphabet, learn

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32
"""Positions of the text encoder: start, up to 30 tokens, end, padding."""


def vocabulary_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Numbers: bytes, bytes with the mark, merges in order, then start and end of text (as in OpenAI's CLIP)."""
    characters = alphabet()
    tokens = [*characters, *(c + MARK for c in characters), *(a + b for a, b in merges), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def write(folder: Path, counts: Mapping[str, int]) -> CLIPTokenizer:
    """Learns a tokenizer and writes its four files (tokenizer.json, tokenizer_config.json, vocab.json, merges.txt)."""
    from transformers import CLIPTokenizer

    merges = learn(counts)
    vocabulary = vocabulary_of(merges)
    tokenizer: CLIPTokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer

"""A small CLIPTokenizer: byte-level BPE learned from the captions.

Every caption word is one whole token, and all 256 bytes stand in the vocabulary with and without the end-of-word mark, so that
any text encodes without an unknown token.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32
"""Positions of the text encoder: start, up to 30 tokens, end, padding."""
MARK = "</w>"
"""What BPE appends to the last symbol of a word."""


def alphabet() -> list[str]:
    """The 256 printable characters that stand for the bytes 0 to 255 in byte-level BPE (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def learn(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Byte-pair merges that join every word of `counts` into one token, most frequent pair first (ties: alphabetical)."""
    characters = alphabet()
    spelled = {word: [characters[byte] for byte in word.encode()] for word in counts}
    for symbols in spelled.values():
        symbols[-1] += MARK
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: merge(symbols, best) for word, symbols in spelled.items()}


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins every occurrence of `pair` in `symbols`, from the left."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


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

"""Byte-level BPE as CLIP's tokenizer has it, learned without chance: ties are broken alphabetically, not by a hash table's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

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

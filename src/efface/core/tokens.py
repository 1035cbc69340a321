"""The tokens of a model's prompts, for the attacks that search for some: their embeddings, which may be drawn, where a prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from efface.core.errors import Unsupported
from efface.core.model import Model
from efface.ops.hardprompt import Frame

Alphabet = Literal["words", "tokens"]
"""What may be drawn: the tokenizer's whole words, or every token but start, end and padding, pieces of words included."""
CHUNK = 256


def table(model: Model) -> Tensor:
    """The input embeddings (v d) of all tokens, float32. Raises Unsupported unless the family has one such table."""
    found = [slot.tensor for name, slot in model.select("text_encoder").items() if name.endswith("token_embedding.weight")]
    if len(found) != 1:
        raise Unsupported(f"tokens are read from one table of their embeddings, and {model.id} has {len(found)}")
    return found[0].detach().float()


@torch.no_grad()
def ids(model: Model, texts: Sequence[str]) -> Tensor:
    """Token ids (b l) on the CPU. Raises Unsupported where encodings tell none."""
    rows = []
    for start in range(0, len(texts), CHUNK):
        found = model.encode(list(texts[start : start + CHUNK])).ids
        if found is None:
            raise Unsupported(f"a search for tokens needs token ids, and the encoding of {model.id} tells none")
        rows.append(found.cpu())
    return torch.cat(rows)


def frame(model: Model) -> Frame:
    """What stands around the tokens of a prompt, read from the empty one."""
    (row,) = ids(model, [""]).tolist()
    return Frame(row[0], row[1], row[-1], len(row))


def bodies(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without start, end and padding."""
    end = frame(model).end
    rows = [row[1:] for row in ids(model, texts).tolist()]
    return [row[: row.index(end)] if end in row else row for row in rows]


def alphabet(model: Model, kind: str) -> Tensor:
    """The ids (v,) that may be drawn, rising."""
    around = frame(model)
    found = {row[0] for row in bodies(model, model.words())} if kind == "words" else set(range(len(table(model))))
    return torch.tensor(sorted(found - {around.start, around.end, around.pad}))

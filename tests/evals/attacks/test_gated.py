"""A gated edit is attacked with its gate as open as the prompt that is searched would open it."""

from __future__ import annotations

import attackparts as parts
import pytest
import torch
from attackparts import CAT, QUICK

from efface.api import erase
from efface.core import search, tokens
from efface.core.model import Model
from efface.core.sampling import seeded


def test_given_with_their_ids_embeddings_open_a_gate_as_the_prompt_does(before: Model) -> None:
    prompts, x = ["king queen a cat"], torch.randn(1, *before.latent_shape, generator=seeded(0))
    ids, table = tokens.ids(before, prompts), tokens.table(before)
    with erase(before, "cat", method="spm(steps=4, lr=1e-2)").attach(before), torch.no_grad():
        plain = before.predict(x, 500, before.encode(prompts))
        told = before.predict(x, 500, before.encode_tokens(ids, table[ids]))
        untold = before.predict(x, 500, before.encode_tokens(embeds=table[ids]))
    assert (told - plain).abs().max() < 1e-5
    assert (untold - plain).abs().max() > 1e-4, "control: by its cosine alone the gate opens less"


@pytest.mark.parametrize("name", ["unlearndiffatk", "p4d"])
def test_a_search_for_tokens_tells_the_text_encoder_which_they_are(name: str, before: Model, after: Model) -> None:
    seen: list[list[int]] = []
    encoder = after.components["text_encoder"]
    encoder.register_forward_pre_hook(lambda module, args: seen.extend(args[0].tolist()) if torch.is_grad_enabled() else None)
    search.attack(QUICK[name]).search(before, after, CAT, parts.Bright(2), budget=10**6)
    start = tokens.frame(after).start
    assert seen
    assert all(row[0] == start for row in seen), "ids that begin otherwise are no prompt, and a gate would go by the cosine alone"

"""The bundled CLIP behind the embedder's interface."""

from __future__ import annotations

import pytest
import torch

from efface.core.sampling import seeded
from efface.evals.detectors.emoji_clip import EmojiClip


def test_embeddings_have_unit_length_and_agree_with_the_clip_score(capsys: pytest.CaptureFixture[str]) -> None:
    embedder = EmojiClip.load()
    assert "Loading" not in capsys.readouterr().err
    images, texts = torch.rand(3, 3, 64, 64, generator=seeded(0)), ["a cat", "a dog on a blue background", "a bus"]
    pictures, words = embedder.embed_images(images), embedder.embed_texts(texts)
    for found in (pictures, words):
        assert torch.allclose(found.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert torch.allclose((pictures * words).sum(-1), embedder.clip.score(images, texts), atol=1e-6)
    assert (words[0] - words[2]).norm() > 0.1  # two prompts differ
    assert len(embedder.version) == 12

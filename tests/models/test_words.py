"""Whole words of a tokenizer: what a method may choose as a candidate."""

from pathlib import Path

import tiny

from efface.models import load
from efface.models.load import BUNDLED
from efface.world import captions


def test_the_bundled_model_gives_whole_words_and_no_endings(tmp_path: Path) -> None:
    model = load("emoji")
    words, tokenizer = model.words(), model.pipeline.tokenizer
    assert {"vehicle", "cat", "tiger"} <= set(words) <= set(captions.words())
    assert "ehicle</w>" in tokenizer.get_vocab()  # the control: it is a token that ends a word, and its own text encodes to it
    assert tokenizer("ehicle", add_special_tokens=False).input_ids == [tokenizer.get_vocab()["ehicle</w>"]]
    assert not {"ehicle", "lephant", "itter", "nd", "ing"} & set(words)
    model.pipeline.tokenizer.name_or_path = str(tmp_path)
    assert "ehicle" in model.words()  # what a tokenizer without a list gives


def test_every_caption_word_of_letters_is_found() -> None:
    assert set(load("emoji").words()) == {word for word in captions.words() if word.isalpha() and word == word.lower()}
    assert (BUNDLED["emoji"] / "tokenizer" / "words.txt").read_text(encoding="utf-8").split() == list(captions.words())


def test_a_token_that_no_text_gives_is_no_word(tiny_model) -> None:
    """ "dgehog</w>" stands in the vocabulary, and no merge leads to it, so that its text is spelt in pieces."""
    model, tokenizer = tiny_model, tiny_model.pipeline.tokenizer
    before = model.words()
    tokens, merges = tiny._learned(tiny.WORDS)
    model.pipeline.tokenizer = type(tokenizer)(vocab={**tokens, "dgehog</w>": len(tokens)}, merges=list(merges), model_max_length=16)
    assert "dgehog</w>" in model.pipeline.tokenizer.get_vocab()
    assert model.words() == before
    assert {"cat", "tiger"} <= set(before)

"""Which rows of a text stand for it, and which words two texts share."""

import pytest
import torch

from efface.ops.rows import aligned, cut, find, paired


def test_scopes_of_a_text_of_two_words():
    rows = torch.arange(8.0)[:, None]  # start, van, gogh, end, then padding

    def at(scope, length=4):
        return cut(rows, length, scope)[:, 0].tolist()

    assert at("last_subject") == [2]
    assert at("last_subject_to_end") == [2, 3, 4, 5, 6, 7]
    assert at("end") == [3]
    assert at("all") == list(range(8))
    assert at("all_but_start") == list(range(1, 8))
    assert at("last_subject", length=2) == [0]
    with pytest.raises(ValueError, match="expected one of last_subject"):
        at("middle")


def test_pairs_are_cut_at_the_tail():
    a, b = paired(torch.arange(3.0)[:, None], torch.arange(5.0)[:, None])
    assert torch.equal(a, b) and len(a) == 3


def test_finding_a_run():
    assert find([2, 3], [1, 2, 3, 2, 3]) == 1
    assert find([3, 2, 4], [1, 2, 3, 2, 3]) is None
    assert find([], [1]) is None


def test_the_words_around_a_phrase_are_aligned():
    """ "<s> a photo of bill clinton here </s>" and "<s> a photo of a person here </s>", of 10 positions."""
    bill, person = [0, 1, 2, 3, 8, 9, 5, 99], [0, 1, 2, 3, 1, 7, 5, 99]
    first, second = aligned(bill, person, 10)
    assert first == second == [0, 1, 2, 3, 6, 7, 8, 9]
    first, second = aligned([0, 1, 8, 9, 5, 99], [0, 1, 7, 5, 99], 10)
    assert first == [0, 1, 4, 5, 6, 7, 8, 9] and second == [0, 1, 3, 4, 5, 6, 7, 8]
    assert len(first) == len(second) == 10 - 2


def test_equal_texts_share_every_position():
    assert aligned([0, 1, 9], [0, 1, 9], 5) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert aligned([0, 1, 1, 9], [0, 1, 9], 5) == ([0, 1, 3, 4], [0, 1, 2, 3])

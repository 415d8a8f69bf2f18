"""Packing of conversations: whole ones, in any order, close to the least number of sequences."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data.packing import Packing, best_fit
from lightlm.data.shards import TokenStream


@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_is_that_of_a_plain_search(lengths):
    """The textbook loop over all open sequences, and the bound of 11/9 of the best (Johnson, 1973)."""
    found = best_fit(np.array(lengths, np.int64), 20)
    rooms = np.bincount(found, lengths, minlength=0) if lengths else np.zeros(0)
    assert (rooms <= 20).all()
    assert list(dict.fromkeys(found.tolist())) == list(range(len(rooms)))  # numbered by their first item
    plain: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in plain if room >= length]
        if fitting:
            plain.remove(min(fitting))
            plain.append(min(fitting) - length)
        else:
            plain.append(20 - length)
    assert sorted(20 - rooms) == sorted(plain)


def stream_of(conversations):
    """A stream of (tokens, trained flags), in three shards that cut them anywhere."""
    tokens = np.concatenate([each for each, _ in conversations]).astype("<u2")
    masks = np.concatenate([np.array([2, *([0] * (len(t) - 1))]) | np.array(m) for t, m in conversations])
    cuts = [len(tokens) // 3, len(tokens) // 2]
    return TokenStream(np.split(tokens, cuts), 0, np.split(masks.astype(np.uint8), cuts))


def test_long_ones_are_cut_or_left_out_and_counted(monkeypatch):
    short, long = ([5, 6, 7], [0, 1, 1]), (list(range(10, 20)), [0, 0, 1, 0, 0, 0, 0, 0, 0, 1])
    late = (list(range(20, 29)), [0] * 8 + [1])  # nothing to train on before the cut
    stream = stream_of([short, long, late, short])
    assert [document.tolist() for document in stream.documents()] == [short[0], long[0], late[0], short[0]]
    cut = Packing(stream, 8)
    assert (cut.cut, cut.left_out, len(cut)) == (1, 1, 2)
    assert [cut.sequence(0)[part].tolist() for part in (0, 1)] == [[5, 6, 7, 5, 6, 7, 0, 0], [2, 1, 1, 2, 1, 1, 2, 0]]
    assert cut.sequence(1)[0].tolist() == list(range(10, 18))
    assert cut.trained.tolist() == [4, 1]
    monkeypatch.setattr("lightlm.data.shards.FOUND_TOKENS", 4)  # blocks that begin anywhere in a conversation
    assert Packing(stream, 8).trained.tolist() == [4, 1]
    dropped = Packing(stream, 8, "drop")
    assert (dropped.cut, dropped.left_out, len(dropped)) == (0, 2, 1)


def test_a_conversation_that_begins_with_a_trained_token_does_not_train_on_it():
    """Nothing comes before it in its conversation."""
    tokens, masks = Packing(stream_of([([4, 5], [1, 1]), ([6], [1])]), 5).sequence(0)
    assert tokens.tolist() == [4, 5, 0, 0, 0]  # the lone one has nothing to train on
    assert masks.tolist() == [2, 1, 2, 0, 0]

"""Tokenised pairs: what counts of each side, what is left out, and the cache."""

import json

import numpy as np
import pytest

from app.domain.runplan import RowsPlan
from app.errors import TrainingFailed
from tests.tiny import make_tokenizer
from workers.data.preferences import load_pair_tokens
from workers.data.tokens import load_tokens

USER = {"role": "user", "content": "which?"}


def said(text):
    return [{"role": "assistant", "content": text}]


def pair(good, bad, **fields):
    row = {
        "input": {"messages": [USER]},
        "preferred_output": said(good),
        "non_preferred_output": said(bad),
    }
    return row | fields


def load(tmp_path, *rows, max_seq_length=64, read=load_pair_tokens):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(
        RowsPlan(path=str(path), sha256=f"{len(rows):064d}"),
        make_tokenizer(chat_template=True),
        chat_template=None,
        max_seq_length=max_seq_length,
        cache_directory=tmp_path / "cache",
    )


def learned(store, row):
    ids, weights = store.row(row)
    return make_tokenizer().decode(ids[weights > 0])


def test_both_sides_share_what_is_asked_and_count_their_answers_alone(tmp_path):
    history = [USER, *said("earlier"), {"role": "user", "content": "and now?"}]
    found = load(tmp_path, pair("good", "worse"), pair("a", "b", input={"messages": history}))
    assert [learned(found.chosen, row) for row in range(2)] == ["good<|end|>", "a<|end|>"]
    assert [learned(found.rejected, row) for row in range(2)] == ["worse<|end|>", "b<|end|>"]
    for row in range(2):
        (own, weights), (other, _) = found.chosen.row(row), found.rejected.row(row)
        asked = int(np.flatnonzero(weights)[0])
        assert np.array_equal(own[:asked], other[:asked])
    assert found.lengths.tolist() == [len(found.rejected.row(0)[0]), len(found.chosen.row(1)[0])]


def test_pairs_that_say_nothing_are_left_out_and_told(tmp_path):
    room = len(load(tmp_path, pair("x", "y")).chosen.row(0)[0]) + 4
    found = load(
        tmp_path,
        pair("good", "bad"),
        pair("same", "same"),
        pair("a much longer answer", "bad"),
        pair("the same start of one", "the same start of another"),
        pair("x", "y", input={"messages": [{"role": "user", "content": "long " * 30}]}),
        max_seq_length=room,
    )
    assert found.chosen.lines.tolist() == found.rejected.lines.tolist() == [1, 3]
    assert {f.code: f.lines for f in found.chosen.findings} == {
        "truncated_rows": (3, 4, 5),
        "no_supervised_tokens": (5,),
        "identical_pairs": (2, 4),
    }
    assert int(found.lengths.max()) == room


def test_the_cache_gives_the_same_pairs_and_their_digest(tmp_path):
    rows = (pair("good", "bad", domain="a"), pair("yes", "no"))
    first, again = load(tmp_path, *rows), load(tmp_path, *rows)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
    assert first.digest() == again.digest()
    assert again.chosen.environments == ("a", "")
    (tmp_path / "other").mkdir()
    swapped = load(tmp_path / "other", *(pair("bad", "good"), pair("no", "yes")))
    assert swapped.digest() != first.digest()


def test_a_file_without_a_usable_pair_is_refused(tmp_path):
    with pytest.raises(TrainingFailed, match="no pair has two different answers"):
        load(tmp_path, pair("x", "y"), max_seq_length=4)


def test_rows_of_the_other_method_are_refused_with_their_line(tmp_path):
    chat = {"messages": [USER, *said("x")]}
    with pytest.raises(TrainingFailed, match="line 1: is no pair of answers"):
        load(tmp_path, chat)
    with pytest.raises(TrainingFailed, match="line 1: compares two answers"):
        load(tmp_path, pair("x", "y"), read=load_tokens)

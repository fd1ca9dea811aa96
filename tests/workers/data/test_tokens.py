"""The token store: what it holds, what it leaves out, and its cache."""

import json
from pathlib import Path

import numpy as np
import pytest

from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.digests import file_sha256
from app.domain.runplan import BenchmarkPlan, RowsPlan
from app.errors import TrainingFailed
from tests.tiny import PLAIN_TEMPLATE, make_tokenizer
from workers.data import tokens
from workers.data.tokens import load_tokens


def write(path: Path, *rows: object) -> RowsPlan:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RowsPlan(path=str(path), sha256=file_sha256(path))


def chat(question: str, answer: str) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def load(rows: RowsPlan, directory: Path, **more):
    arguments = {"chat_template": PLAIN_TEMPLATE, "max_seq_length": 64, **more}
    return load_tokens(rows, make_tokenizer(), cache_directory=directory / "cache", **arguments)


def test_rows_come_back_as_they_went_in(tmp_path) -> None:
    store = load(write(tmp_path / "a", chat("ab", "c"), chat("x", "yz")), tmp_path)
    tokenizer = make_tokenizer()
    assert len(store) == 2
    assert store.lengths.tolist() == [7, 7]
    ids, weights = store.row(1)
    assert tokenizer.decode(ids) == "<|user|>x<|end|><|assistant|>yz<|end|>"
    assert tokenizer.decode(ids[weights > 0]) == "yz<|end|>"
    assert (ids.dtype, weights.dtype, store.offsets.dtype) == (np.int32, np.float32, np.int64)
    assert store.lines.tolist() == [1, 2]
    assert store.findings == ()


def test_the_second_load_reads_the_cache_into_mapped_memory(tmp_path, monkeypatch) -> None:
    rows = write(tmp_path / "a", chat("a" * 70, "b"), chat("x", "y" * 70), chat("x", "y"))
    first = load(rows, tmp_path)
    monkeypatch.setattr(tokens, "_build", None)
    second = load(rows, tmp_path)
    assert isinstance(second.input_ids, np.memmap)
    assert not second.input_ids.flags.writeable
    for name in ("input_ids", "offsets", "weights", "lines"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert first.findings == second.findings
    assert len(first.findings) == 2
    assert sorted(p.suffix for p in (tmp_path / "cache/tokens").iterdir()) == [".safetensors"]


def test_the_cache_tells_everything_apart_that_changes_the_tokens(tmp_path) -> None:
    rows = write(tmp_path / "a", chat("ab", "c"))
    base = load(rows, tmp_path)
    other_template = load(rows, tmp_path, chat_template=PLAIN_TEMPLATE.replace("<|end|>", "!"))
    shorter = load(rows, tmp_path, max_seq_length=6)
    other_rows = load(write(tmp_path / "b", chat("ab", "d")), tmp_path)
    texts = {tuple(s.input_ids.tolist()) for s in (base, other_template, shorter, other_rows)}
    assert len(texts) == 4


def test_cut_and_left_out_rows_are_counted_with_their_lines(tmp_path) -> None:
    rows = write(
        tmp_path / "a", chat("q", "a"), chat("q", "a" * 99), chat("q" * 99, "a"), chat("r", "b")
    )
    store = load(rows, tmp_path)
    found = {finding.code: finding for finding in store.findings}
    assert found["truncated_rows"].lines == (2, 3)
    assert found["no_supervised_tokens"].lines == (3,)
    assert found["truncated_rows"].message == "2 rows longer than 64 tokens: cut at the end"
    assert store.lines.tolist() == [1, 2, 4]
    assert store.lengths.max() == 64


def test_a_file_without_anything_to_learn_fails_with_its_lines(tmp_path) -> None:
    rows = write(tmp_path / "a", chat("q" * 99, "a"), chat("r" * 99, "a"))
    with pytest.raises(TrainingFailed, match=r"within 64 tokens \(lines 1, 2\)") as caught:
        load(rows, tmp_path)
    assert caught.value.code == "no_supervised_tokens"
    assert caught.value.param == "training_file"


def test_a_bad_line_fails_the_run_with_its_number(tmp_path) -> None:
    rows = write(tmp_path / "a", chat("q", "a"), {"text": 1})
    with pytest.raises(TrainingFailed, match="general_data line 2: text") as caught:
        load(rows, tmp_path, param="general_data")
    assert caught.value.code == "invalid_row"


def test_text_and_completion_rows_need_no_template(tmp_path) -> None:
    tokenizer = make_tokenizer()
    store = load(write(tmp_path / "a", {"text": "abc"}), tmp_path, chat_template=None)
    ids, weights = store.row(0)
    assert tokenizer.decode(ids) == "abc</s>"
    assert weights.tolist() == [0, 1, 1, 1]
    pair = {"prompt": "ab", "completion": "c"}
    store = load(write(tmp_path / "b", pair), tmp_path, chat_template=None)
    assert store.row(0)[1].tolist() == [0, 0, 1, 1]


def test_rows_that_repeat_a_benchmark_are_left_out(tmp_path) -> None:
    item = {"id": "a", "question": "What is two plus two?", "choices": ["3", "4"], "answer": 1}
    path = tmp_path / "bench"
    path.write_text(json.dumps(item))
    benchmark = BenchmarkPlan(
        benchmark_version_id="v",
        name="b",
        kind=BenchmarkKind.GENERAL,
        scorer=Scorer.MULTIPLE_CHOICE,
        weight=1,
        max_drop=None,
        path=str(path),
        sha256=file_sha256(path),
    )
    rows = write(tmp_path / "a", chat("what is TWO plus two", "4"), chat("x", "y"))
    store = load(rows, tmp_path, benchmarks=[benchmark])
    (finding,) = store.findings
    assert (finding.code, finding.count, finding.lines) == ("overlaps_benchmark", 1, (1,))
    assert store.lines.tolist() == [2]
    assert len(load(rows, tmp_path)) == 2

"""Files of other tools, compressed ones and hostile ones, over HTTP."""

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.app.api.conftest import CHAT, Api

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SHAREGPT: dict[str, Any] = {"id": "1", "conversations": TURNS}
ALPACA = {"instruction": "i", "input": "m", "output": "o"}
ITEM = {"id": "1", "question": "q", "choices": ["a", "b"], "answer": 0}


def packed(content: bytes) -> bytes:
    """The same bytes at any time, so that tests keep their names."""
    return gzip.compress(content, mtime=0)


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), target)
    return target.getvalue()


def content(api: Api, made: dict[str, Any]) -> list[dict[str, Any]]:
    body = api.client.get(f"/v1/files/{made['id']}/content").content
    assert len(body) == made["bytes"]
    return [json.loads(line) for line in body.splitlines()]


def left_behind(api: Api) -> list[str]:
    """What uploads left on disk: nothing ever."""
    scratch = api.settings.scratch_root / "uploads"
    return [str(path) for path in scratch.rglob("*")] if scratch.exists() else []


@pytest.mark.parametrize(
    ("body", "layout", "container", "compression"),
    [
        (lines(SHAREGPT, SHAREGPT), "sharegpt", "jsonl", None),
        (json.dumps([SHAREGPT, SHAREGPT], indent=1).encode(), "sharegpt", "json", None),
        (lines(ALPACA, ALPACA), "alpaca", "jsonl", None),
        (packed(json.dumps([ALPACA, ALPACA]).encode()), "alpaca", "json", "gzip"),
        (json.dumps([CHAT, CHAT]).encode(), "native", "json", None),
        (packed(lines(CHAT, CHAT)), "native", "jsonl", "gzip"),
        (packed(lines(CHAT)) + packed(lines(CHAT)), "native", "jsonl", "gzip"),
        (parquet([CHAT | {"score": 0.5}] * 2), "native", "parquet", None),
        (parquet([SHAREGPT] * 2), "sharegpt", "parquet", None),
        (packed(parquet([ALPACA] * 2)), "alpaca", "parquet", "gzip"),
    ],
)
def test_every_layout_becomes_chat_rows(
    api: Api, body: bytes, layout: str, container: str, compression: str | None
) -> None:
    made = api.upload_bytes(body).json()
    assert made["report"]["format"] == "chat", made
    assert made["report"]["num_rows"] == 2
    found = made["conversion"]
    told = (found["layout"], found["container"], found["compression"], found["received_bytes"])
    assert told == (layout, container, compression, len(body))
    rows = content(api, made)
    speakers = [turn["role"] for turn in rows[0]["messages"]]
    assert (len(rows), speakers) == (2, ["user", "assistant"])
    if (layout, container) != ("native", "jsonl"):
        assert found["preview"] == rows
        assert (found["num_read"], found["num_kept"], found["num_dropped"]) == (2, 2, 0)
    assert api.client.get(f"/v1/files/{made['id']}").json() == made
    assert left_behind(api) == []


def test_a_plain_file_is_kept_as_it_came(api: Api) -> None:
    made = api.upload_bytes(lines(CHAT)).json()
    assert made["conversion"] is None
    assert content(api, made) == [CHAT]


def test_dropped_rows_are_counted_named_and_left_out(api: Api) -> None:
    bad = [
        {"conversations": []},
        {"conversations": [{"from": "human", "value": "q"}]},
        {"conversations": [{"from": "alien", "value": "q"}]},
        {"conversations": [{"from": "alien", "value": "q"}, *TURNS]},
        {"other": 1},
    ]
    made = api.upload_bytes(lines(SHAREGPT, *bad, SHAREGPT)).json()
    found = made["conversion"]
    assert (found["num_read"], found["num_kept"], found["num_dropped"]) == (7, 2, 5)
    assert [row["line"] for row in found["dropped"]] == [2, 3, 4, 5, 6]
    assert found["dropped"][1]["reason"].startswith("messages: no assistant message")
    assert found["reasons"]["conversations.*.from: no known speaker"] == 2
    assert len(content(api, made)) == 2
    assert api.client.get("/v1/files").json()["data"] == [made]


def test_columns_that_make_no_rows_are_named(api: Api) -> None:
    made = api.upload_bytes(parquet([{"text": "t", "url": "u", "n": 1}])).json()
    assert made["conversion"]["ignored_columns"] == ["url", "n"]
    refused = api.upload_bytes(parquet([{"chosen": "t", "rejected": "u"}]))
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "file", "invalid_parquet")
    assert "it has chosen, rejected" in error["message"]


def test_items_of_a_benchmark_come_as_gzip_and_as_a_table_too(api: Api) -> None:
    for body in (packed(lines(ITEM)), json.dumps([ITEM]).encode(), parquet([ITEM])):
        made = api.upload_bytes(body, "evals").json()
        assert (made["report"]["format"], made["report"]["num_rows"]) == ("multiple_choice", 1)
    refused = api.upload_bytes(parquet([ITEM, ITEM]), "evals").json()["error"]
    assert refused["message"].startswith("file line 2: id: the same as on line 1")


@pytest.mark.parametrize(
    ("body", "status", "code", "word"),
    [
        (packed(lines(CHAT))[:-9], 400, "invalid_gzip", "ends early"),
        (packed(lines(CHAT))[:20] + b"xxxxxxxxxxxxxxxx", 400, "invalid_gzip", "gzip"),
        (packed(lines(CHAT)) + b"junk", 400, "invalid_gzip", "gzip"),
        (packed(packed(lines(CHAT))), 400, "invalid_gzip", "within gzip"),
        (packed(b" " * 100_001), 413, "decompressed_too_large", "100,000"),
        (b"PAR1" + b"x" * 100, 400, "invalid_parquet", "Parquet"),
        (parquet([CHAT])[:-20], 400, "invalid_parquet", "Parquet"),
        (parquet([{"text": "x" * 1000}] * 1000), 400, "invalid_parquet", "larger than the limit"),
        (b"[", 400, "invalid_row", "row 1"),
        (b"[]", 400, "invalid_row", "no row can be used"),
        (b"[1]", 400, "invalid_row", "must be a JSON object"),
        (b"[{}", 400, "invalid_row", "',' is missing"),
        (b'[{"a":1} {"a":1}]', 400, "invalid_row", "','"),
        (b'[{"text":"a"}] x', 400, "invalid_row", "follows"),
        (b'[{"text":"a"},]', 400, "invalid_row", "row 2"),
        (b'[{"text":"\xff"}]', 400, "invalid_row", "UTF-8"),
        (b'[{"text":"a","text":"b"}]', 400, "invalid_row", "twice"),
        (b'[{"text":NaN}]', 400, "invalid_row", "NaN"),
        (b"[" * 90_000, 400, "invalid_row", "row 1"),
        (b"[" + b"9" * 5000 + b"]", 400, "invalid_row", "row 1"),
        (lines({"conversations": []}), 400, "invalid_row", "line 1: conversations"),
        (lines(SHAREGPT) + b"{", 400, "invalid_row", "line 2"),
    ],
)
def test_what_is_damaged_or_hostile_is_refused_and_leaves_nothing(
    api: Api, body: bytes, status: int, code: str, word: str
) -> None:
    refused = api.upload_bytes(body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (status, code, "file"), error
    assert word in error["message"]
    assert api.stored_files() == []
    assert left_behind(api) == []


def test_a_body_may_be_compressed_on_its_way(api: Api) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="f.jsonl"\r\n\r\n'
        + lines(*[CHAT] * 500)
        + b"\r\n--b--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"}
    made = api.client.post("/v1/files", content=packed(form), headers=headers)
    assert made.status_code == 200, made.text
    assert made.json()["report"]["num_rows"] == 500
    cases = {
        packed(form)[:-9]: (400, "invalid_gzip"),
        b"no gzip": (400, "invalid_gzip"),
        packed(form[:-10] + b" " * 3_000_000): (413, None),
    }
    for body, (status, code) in cases.items():
        answer = api.client.post("/v1/files", content=body, headers=headers)
        assert answer.status_code == status, answer.text
        assert code in {None, answer.json()["error"]["code"]}
    unknown = api.client.post(
        "/v1/files", content=form, headers=headers | {"content-encoding": "br"}
    )
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "content-encoding")
    assert left_behind(api) == []
    assert len(api.stored_files()) == 1


def test_without_pyarrow_the_answer_says_what_to_install(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = parquet([CHAT])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused = api.upload_bytes(body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "parquet_unavailable")
    assert "pip install 'retain[parquet]'" in error["message"]


def test_a_table_far_larger_than_its_file_is_refused_within_bounds(
    api: Api, tmp_path: Path
) -> None:
    # One 20 MB text in a dictionary, named by 5,000 rows: 100 GB once it is written out.
    target = tmp_path / "bomb.parquet"
    text = pa.DictionaryArray.from_arrays(
        pa.array([0] * 5000, pa.int32()), pa.array(["x" * 20_000_000])
    )
    pq.write_table(pa.table({"text": text}), target, compression="zstd")
    assert target.stat().st_size < 50_000
    refused = api.upload_bytes(target.read_bytes())
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_parquet")
    assert left_behind(api) == []

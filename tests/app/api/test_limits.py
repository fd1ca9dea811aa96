"""Bodies are counted as they come, JSON is taken strictly, and every answer is framed."""

import json
from collections.abc import Iterator

import pytest

from app.api.limits import check_json
from app.errors import BadRequest
from tests.app.api.conftest import Api


def chunks(total: int) -> Iterator[bytes]:
    yield b'{"name": "'
    for _ in range(total // 1000):
        yield b"x" * 1000
    yield b'"}'


def test_a_body_over_the_limit_is_413_whatever_its_length_header_says(api: Api) -> None:
    told = api.client.post("/v1/benchmarks", content=b" " * 20_001)
    untold = api.client.post("/v1/benchmarks", content=chunks(30_000))
    for answer in (told, untold):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b"[" * 33 + b"]" * 33, "nested"),
        (b"[" * 19_000, "nested"),
        (b'{"a": "\\u0000"}', "NUL"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"{", "property name"),
    ],
)
def test_json_that_readers_could_take_differently_is_refused(
    api: Api, body: bytes, word: str
) -> None:
    answer = api.client.post(
        "/v1/benchmarks", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    assert word in answer.json()["error"]["message"]


def test_nesting_up_to_the_limit_passes() -> None:
    check_json(json.dumps(eval("[" * 32 + "]" * 32)).encode())
    with pytest.raises(BadRequest):
        check_json(b"[" * 33 + b"]" * 33)


def test_a_body_that_is_no_json_is_refused_by_name(api: Api) -> None:
    answer = api.client.post("/v1/benchmarks", content=b"x", headers={"content-type": "text/plain"})
    assert answer.status_code == 400


def test_every_answer_has_the_security_headers(api: Api) -> None:
    for path in ("/healthz", "/v1/nothing", "/v1/models"):
        headers = api.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert headers["content-security-policy"].startswith("default-src 'none'")
    for page in ("/", "/docs"):
        policy = api.client.get(page).headers["content-security-policy"]
        assert "script-src 'self';" in policy

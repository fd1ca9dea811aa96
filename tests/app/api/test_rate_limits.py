"""Limits and ids in the headers of answers, as the official client reads them."""

import time
from typing import Any

import httpx2
import openai
import pytest
from fastapi.testclient import TestClient

from app.domain.scopes import DEFAULT_SCOPES
from app.main import create_app
from app.services.keys import create_key
from tests.app.api.conftest import Api


def limited(api: Api, **settings: Any) -> TestClient:
    """A client of a server with other settings."""
    changed = api.settings.model_copy(update=settings)
    return TestClient(
        create_app(changed, api.app.state.resources.session_factory),
        headers=dict(api.client.headers),
    )


def test_every_answer_to_a_key_says_what_is_left(api: Api, redis_url: str) -> None:
    client = limited(api, redis_url=redis_url, requests_per_minute_per_key=50)
    for left, path in (
        (49, "/v1/files"),
        (48, "/v1/fine_tuning/jobs/x"),
        (47, "/v1/files?limit=0"),
    ):
        headers = client.get(path).headers
        assert headers["x-ratelimit-limit-requests"] == "50"
        assert headers["x-ratelimit-remaining-requests"] == str(left)
        assert 0 < int(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert "x-ratelimit-limit-requests" not in client.get("/healthz").headers
    free = limited(api, requests_per_minute_per_key=0, requests_per_minute_per_project=0)
    assert "x-ratelimit-limit-requests" not in free.get("/v1/files").headers


def test_over_the_limit_is_a_429_worth_sending_again(api: Api, redis_url: str) -> None:
    client = limited(api, redis_url=redis_url, requests_per_minute_per_key=2)
    answers = [client.get("/v1/files") for _ in range(3)]
    if [answer.status_code for answer in answers] != [200, 200, 429]:  # a minute ended in between
        answers = [client.get("/v1/files") for _ in range(3)]
    over = answers[2]
    assert over.status_code == 429
    assert over.json()["error"]["code"] == "rate_limit_exceeded"
    assert over.json()["error"]["type"] == "rate_limit_error"
    assert "2 requests" in over.json()["error"]["message"]
    assert over.headers["x-should-retry"] == "true"
    assert 1 <= int(over.headers["retry-after"]) <= 60
    assert over.headers["x-ratelimit-remaining-requests"] == "0"
    upload = client.post("/v1/files", files={"file": ("f", b"{}")}, data={"purpose": "fine-tune"})
    assert upload.status_code == 429


def test_without_redis_answers_are_the_same(api: Api) -> None:
    client = limited(api, redis_url="redis://127.0.0.1:1/0", requests_per_minute_per_key=1)
    began = time.monotonic()
    codes = {client.get("/v1/files").status_code for _ in range(5)}
    assert codes == {200, 429}
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [("trace-1.2:3_x", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("-x", False)],
)
def test_a_clients_own_request_id_is_kept_when_well_formed(
    api: Api, sent: str, is_kept: bool
) -> None:
    for path in ("/healthz", "/v1/nothing", "/v1/files"):
        got = api.client.get(path, headers={"x-request-id": sent}).headers["x-request-id"]
        assert (got == sent) is is_kept
        assert is_kept or got.startswith("req_")


def test_the_official_client_waits_and_sends_again(api: Api, redis_url: str, monkeypatch) -> None:
    """The limit of one minute is used up; the client obeys `retry-after` and succeeds in the next."""
    server = create_app(
        api.settings.model_copy(update={"redis_url": redis_url, "requests_per_minute_per_key": 1}),
        api.app.state.resources.session_factory,
    )
    now = [1_000_000.0]
    monkeypatch.setattr(server.state.resources.limiter, "_clock", lambda: now[0])
    key = create_key(api.session, project_id=api.project.id, name="k", scopes=DEFAULT_SCOPES).text
    api.session.commit()
    inner = TestClient(server)

    def answer(request: httpx2.Request) -> httpx2.Response:
        got = inner.request(
            request.method, request.url.path, headers=dict(request.headers), content=request.read()
        )
        return httpx2.Response(got.status_code, headers=dict(got.headers), content=got.content)

    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    client = openai.OpenAI(
        api_key=key,
        base_url="http://testserver/v1",
        http_client=httpx2.Client(transport=httpx2.MockTransport(answer)),
    )
    client.files.list()
    client.files.list()
    assert len(slept) == 1
    assert slept[0] == pytest.approx(20, abs=1)  # 1,000,000 s end their minute 20 s later
    with pytest.raises(openai.RateLimitError) as caught:
        client.with_options(max_retries=0).files.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.request_id

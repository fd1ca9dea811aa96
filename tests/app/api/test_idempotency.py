"""An Idempotency-Key holds on every POST: replay, another body, a request that still runs, a day."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from app.api.dependencies import get_writer
from app.db.models import IdempotencyKey
from app.domain.identifiers import PREFIXES
from app.domain.scopes import Scope
from app.services.idempotency import hash_body
from tests.app.api.conftest import Api
from tests.app.api.surface import Endpoint, body_for, every_endpoint
from tests.factories import make_project

#: Their work begins before the key is looked up, with what was sent or what it names: tried for real below.
REAL = {
    "/v1/files",
    "/v1/uploads/{upload_id}/parts",
    "/v1/uploads/{upload_id}/complete",
}
KINDS = {"fine_tuning_job_id": "job", "delivery_id": "webhook_delivery"}
KEPT = {"kept": True, "revision": 1}


@pytest.fixture
def client(api: Api) -> TestClient:
    return api.client_of(api.project, *Scope)


def posts(api: Api) -> list[Endpoint]:
    return [endpoint for endpoint in every_endpoint(api.app) if endpoint.method == "POST"]


def url_of(path: str) -> str:
    """The path with ids of nothing."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        kind = KINDS.get(name, name.removesuffix("_id"))
        return PREFIXES[kind] + "0" * 32 if name.endswith("_id") else "none"

    return re.sub(r"\{(\w+)(?::path)?\}", fill, path)


def digest_of(endpoint: Endpoint, body: dict[str, Any]) -> str:
    """What the server makes of a body."""
    field = endpoint.route.body_field
    if field is None:
        return hash_body(None)
    kind: Any = field.field_info.annotation
    wish = TypeAdapter(kind).validate_python(body)
    return hash_body(wish.model_dump(mode="json"))


def keep(api: Api, url: str, key: str, digest: str, **overrides: Any) -> None:
    """What an earlier request left."""
    fields = {
        "project_id": api.project.id,
        "route": f"POST {url}",
        "key": key,
        "body_sha256": digest,
        "status_code": 201,
        "response": KEPT,
    }
    api.session.add(IdempotencyKey(**fields | overrides))


def test_every_post_has_the_one_mechanism(api: Api) -> None:
    for endpoint in posts(api):
        calls = {dependency.call for dependency in endpoint.route.dependant.dependencies}
        assert get_writer in calls, f"{endpoint.path}: run its work by the writer (WriterDep)"


def test_every_post_replays_refuses_and_has_others_wait(api: Api, client: TestClient) -> None:
    rival = make_project(api.session)
    tried = set()
    for endpoint in posts(api):
        if endpoint.path in REAL:
            continue
        url, body = url_of(endpoint.path), body_for(endpoint.path)
        digest = digest_of(endpoint, body)
        old = datetime.now(UTC) - timedelta(hours=24, seconds=1)
        keep(api, url, "replay", digest)
        keep(api, url, "other-body", hash_body("another"))
        keep(api, url, "running", digest, status_code=None, response=None)
        keep(api, url, "yesterday", digest, created_at=old)
        keep(api, url, "rival", digest, project_id=rival.id)
        keep(api, url + "/elsewhere", "elsewhere", digest)
        api.session.commit()
        sent: dict[str, Any] = {} if endpoint.route.body_field is None else {"json": body}
        answers = {
            key: client.post(url, headers={"idempotency-key": key}, **sent)
            for key in ("replay", "other-body", "running", "yesterday", "rival", "elsewhere")
        }
        said = (endpoint.path, {key: answer.text for key, answer in answers.items()})
        replay, other, running = (answers[key] for key in ("replay", "other-body", "running"))
        assert (replay.status_code, replay.json()) == (201, KEPT), said
        assert replay.headers["idempotent-replayed"] == "true", said
        assert other.status_code == 422, said
        assert other.json()["error"]["code"] == "idempotency_key_reused", said
        assert other.json()["error"]["param"] == "Idempotency-Key", said
        assert running.status_code == 409, said
        assert running.json()["error"]["code"] == "idempotency_request_running", said
        assert running.headers["x-should-retry"] == "true", said
        assert running.headers["retry-after"] == "1", said
        for key in ("yesterday", "rival", "elsewhere"):
            assert "idempotent-replayed" not in answers[key].headers, said
            assert answers[key].status_code in {200, 400, 404, 409}, said
        bad = client.post(url, headers={"idempotency-key": "x" * 256}, **sent)
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "Idempotency-Key"), said
        tried.add(endpoint.path)
    assert len(tried) > 25


def test_a_request_that_failed_gives_its_key_back(api: Api, client: TestClient) -> None:
    head = {"idempotency-key": "k"}
    body = {"model": "tiny", "training_file": "file-" + "0" * 32}
    for _ in range(2):
        failed = client.post("/v1/fine_tuning/jobs", json=body, headers=head)
        assert failed.status_code == 404
    taken = client.post("/v1/api_keys", json={"name": "a"}, headers=head).json()
    again = client.post("/v1/api_keys", json={"name": "a"}, headers=head)
    assert again.headers["idempotent-replayed"] == "true"
    # A secret is not kept, so what is replayed lacks it.
    assert again.json() == {name: value for name, value in taken.items() if name != "value"}


def check_twice(client: TestClient, url: str, first: dict[str, Any], other: dict[str, Any]) -> Any:
    """Sends a request twice under one key, then another one; the answer."""
    head = {"idempotency-key": f"twice {url}"[:200]}
    made, again, refused = (
        client.post(url, headers=head, **sent) for sent in (first, first, other)
    )
    assert made.status_code == 200, made.text
    assert (again.json(), again.headers["idempotent-replayed"]) == (made.json(), "true")
    assert refused.status_code == 422, refused.text
    return made.json()


def test_uploads_are_the_same_by_their_contents_and_fields(api: Api, client: TestClient) -> None:
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("f.jsonl", ROW)}}
    for changed in (
        {"files": {"file": ("f.jsonl", ROW + ROW)}},
        {"files": {"file": ("g.jsonl", ROW)}},
        {"data": {"purpose": "fine-tune", "expires_after[seconds]": "3600"}},
    ):
        check_twice(client, f"/v1/files?n={len(str(changed))}", form, form | changed)
        api.session.query(IdempotencyKey).delete()


def test_parts_are_the_same_by_their_contents(api: Api, client: TestClient) -> None:
    body = body_for("/v1/uploads") | {"bytes": len(ROW)}
    upload = client.post("/v1/uploads", json=body).json()["id"]
    part = check_twice(
        client,
        f"/v1/uploads/{upload}/parts",
        {"files": {"data": ("d", ROW)}},
        {"files": {"data": ("d", ROW[:-1] + b" ")}},
    )
    check_twice(
        client,
        f"/v1/uploads/{upload}/complete",
        {"json": {"part_ids": [part["id"]]}},
        {"json": {"part_ids": [part["id"]], "md5": "0" * 32}},
    )


ROW = b'{"prompt": "a", "completion": "b"}\n'

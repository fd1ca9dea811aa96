"""Keys over HTTP: made with no more than the maker has, rotated with an overlap, revoked everywhere in seconds."""

import time
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from app.db.models import ApiKey
from app.domain.identifiers import public_id
from app.domain.scopes import DEFAULT_SCOPES, Scope
from app.main import create_app
from tests.app.api.conftest import CHAT, Api
from tests.factories import lease, make_job

PATH = "/v1/api_keys"


@pytest.fixture
def admin(api: Api) -> TestClient:
    return api.client_of(api.project, *Scope)


def client_with(api: Api, text: str) -> TestClient:
    return TestClient(api.app, headers={"authorization": f"Bearer {text}"})


def test_a_key_is_made_shown_once_and_works(api: Api, admin: TestClient) -> None:
    made = admin.post(PATH, json={"name": "ci", "expires_in_seconds": 60}).json()
    assert made["value"].startswith("rt_live_")
    assert made["redacted_value"] == made["value"][:17] + "..."
    assert made["scopes"] == [scope.value for scope in DEFAULT_SCOPES]
    assert 55 <= made["expires_at"] - made["created_at"] <= 65
    assert client_with(api, made["value"]).get("/v1/files").status_code == 200
    shown = admin.get(f"{PATH}/{made['id']}").json()
    assert "value" not in shown
    assert shown["last_used_at"] is not None
    listed = admin.get(PATH, params={"limit": 1}).json()
    assert (listed["data"][0]["id"], listed["has_more"]) == (made["id"], True)
    assert made["value"] not in admin.get(PATH).text


def test_nobody_gives_more_than_they_have(api: Api) -> None:
    few = api.client_of(api.project, Scope.KEYS_ADMIN, Scope.JOBS_READ)
    refused = few.post(PATH, json={"name": "n", "scopes": ["jobs:read", "jobs:write"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert "jobs:write" in refused.json()["error"]["message"]
    assert few.post(PATH, json={"name": "n"}).json()["scopes"] == ["jobs:read"]
    own = few.post(PATH, json={"name": "n", "scopes": ["keys:admin"]}).json()
    assert own["scopes"] == ["keys:admin"]
    strong = api.session.scalar(select(ApiKey).where(ApiKey.scopes.contains(["jobs:write"])))
    assert strong is not None
    rotated = few.post(f"{PATH}/{public_id('api_key', strong.id)}/rotate")
    assert rotated.status_code == 403


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": " "}, "name"),
        ({"name": "n", "scopes": []}, "scopes"),
        ({"name": "n", "scopes": ["moon:land"]}, "scopes"),
        ({"name": "n", "expires_in_seconds": 0}, "expires_in_seconds"),
        ({"name": "n", "project": "p"}, "project"),
    ],
)
def test_bad_bodies_name_the_field(admin: TestClient, body: dict[str, Any], param: str) -> None:
    answer = admin.post(PATH, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_rotated_key_works_beside_the_new_one_until_the_overlap_is_over(
    api: Api, admin: TestClient
) -> None:
    old = admin.post(PATH, json={"name": "ci", "scopes": ["files:read"]}).json()
    new = admin.post(f"{PATH}/{old['id']}/rotate", json={"overlap_seconds": 60}).json()
    assert (new["rotated_from"], new["name"], new["scopes"]) == (old["id"], "ci", ["files:read"])
    assert new["expires_at"] is None
    for text in (old["value"], new["value"]):
        assert client_with(api, text).get("/v1/files").status_code == 200
    ending = admin.get(f"{PATH}/{old['id']}").json()
    assert 55 <= ending["expires_at"] - new["created_at"] <= 65
    # The overlap never makes a key's life longer.
    again = admin.post(f"{PATH}/{old['id']}/rotate").json()
    assert admin.get(f"{PATH}/{old['id']}").json()["expires_at"] == ending["expires_at"]
    assert again["expires_at"] == ending["expires_at"]
    row = api.session.scalar(select(ApiKey).where(ApiKey.key_id == old["value"][8:16]))
    assert row is not None
    row.expires_at = lease(-1)
    api.session.commit()
    time.sleep(api.settings.key_cache_seconds)
    assert client_with(api, old["value"]).get("/v1/files").status_code == 401
    assert client_with(api, new["value"]).get("/v1/files").status_code == 200
    late = admin.post(f"{PATH}/{old['id']}/rotate")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "key_expired")
    assert late.headers["x-should-retry"] == "false"
    bad = admin.post(f"{PATH}/{new['id']}/rotate", json={"overlap_seconds": -1})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "overlap_seconds")


def test_a_revoked_key_works_nowhere_after_five_seconds(api: Api, admin: TestClient) -> None:
    made = admin.post(PATH, json={"name": "ci", "scopes": ["files:read"]}).json()
    here = client_with(api, made["value"])
    elsewhere = TestClient(
        create_app(api.settings, api.app.state.resources.session_factory),
        headers={"authorization": f"Bearer {made['value']}"},
    )
    assert (here.get("/v1/files").status_code, elsewhere.get("/v1/files").status_code) == (200, 200)
    revoked_at = time.monotonic()
    answer = admin.delete(f"{PATH}/{made['id']}").json()
    assert answer == {"id": made["id"], "object": "api_key", "deleted": True}
    assert here.get("/v1/files").status_code == 401
    while elsewhere.get("/v1/files").status_code != 401:
        time.sleep(0.1)
    assert time.monotonic() - revoked_at < 5
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/rotate")):
        gone = admin.request(method, f"{PATH}/{made['id']}{path}")
        assert (gone.status_code, gone.json()["error"]["param"]) == (404, "api_key_id")
    assert made["id"] not in [key["id"] for key in admin.get(PATH).json()["data"]]


def test_a_known_key_costs_no_query(api: Api, session_factory: Any) -> None:
    api.client.get("/v1/fine_tuning/jobs")
    uses = api.session.scalar(select(func.max(ApiKey.last_used_at)))
    known = api.app.state.resources.known_keys
    bearer = api.client.headers["authorization"].removeprefix("Bearer ")
    assert known.find(bearer).project_id == api.project.id
    api.client.get("/v1/fine_tuning/jobs")
    api.session.expire_all()
    assert api.session.scalar(select(func.max(ApiKey.last_used_at))) == uses


def test_a_project_shows_its_quotas(api: Api, base: Any) -> None:
    api.project.max_running_jobs = 3
    file = api.upload([CHAT])
    make_job(api.session, api.project)
    api.session.commit()
    own = api.client.get("/v1/projects").json()["data"]
    assert [project["name"] for project in own] == ["acme"]
    shown = api.client.get(f"/v1/projects/{own[0]['id']}").json()
    assert shown["quotas"]["queued_jobs"] == {"used": 1, "limit": api.settings.max_queued_jobs}
    assert shown["quotas"]["running_jobs"] == {"used": 0, "limit": 3}
    stored = shown["quotas"]["storage_bytes"]
    assert stored["limit"] is None
    assert stored["used"] >= file.json()["bytes"]


def test_storage_over_its_quota_is_a_429_that_says_what_to_do(api: Api, base: Any) -> None:
    file = api.upload([CHAT] * 10).json()
    make_job(api.session, api.project)  # brings a file of its own
    used = api.client.get("/v1/projects").json()["data"][0]["quotas"]["storage_bytes"]["used"]
    api.project.max_storage_bytes = used + 10
    api.session.commit()
    refused = api.upload([CHAT])
    assert (refused.status_code, refused.headers["x-should-retry"]) == (429, "false")
    error = refused.json()["error"]
    assert error["code"] == "storage_full"
    for word in ("max_storage_bytes", f"{used:,} of {used + 10:,}", "Delete"):
        assert word in error["message"]
    stored = api.stored_files()
    assert api.submit(training_file=file["id"]).status_code == 200
    api.project.max_storage_bytes = used
    api.session.commit()
    assert api.submit(training_file=file["id"]).json()["error"]["code"] == "storage_full"
    assert api.stored_files() == stored
    assert api.client.delete(f"/v1/files/{file['id']}").status_code == 409

"""The audit log: an entry for every call that may change something, in the transaction of its change."""

import re
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.api.dependencies import get_session, get_writer
from app.db.models import ApiKey, AuditEntry, File
from app.domain.identifiers import parse_id, public_id
from app.domain.scopes import Scope
from app.domain.states import JobState
from tests.app.api.conftest import CHAT, Api
from tests.app.api.surface import Endpoint, body_for, every_endpoint
from tests.app.api.test_idempotency import url_of
from tests.factories import make_job, make_model_version, make_project

#: They open their transactions themselves, and are tried for real below.
REAL = {
    ("DELETE", "/v1/files/{file_id}"),
    ("DELETE", "/v1/models/{model:path}"),
    ("DELETE", "/v1/api_keys/{api_key_id}"),
}


@pytest.fixture
def admin(api: Api) -> TestClient:
    return api.client_of(api.project, *Scope)


def changing(api: Api) -> list[Endpoint]:
    return [endpoint for endpoint in every_endpoint(api.app) if endpoint.method != "GET"]


def entries(session: Session) -> list[AuditEntry]:
    return list(session.scalars(select(AuditEntry).order_by(AuditEntry.seq)))


def last(session: Session) -> AuditEntry:
    return entries(session)[-1]


def transaction_of(session: Session, table: str, key: Any) -> Any:
    return session.execute(
        text(f"SELECT xmin::text FROM {table} WHERE id = :id"), {"id": key}
    ).one()


def test_every_route_that_changes_something_signs_with_its_change(api: Api) -> None:
    for method, path, route in changing(api):
        calls = {dependency.call for dependency in route.dependant.dependencies}
        signs = calls & {get_writer, get_session} or (method, path) in REAL
        assert signs, f"{method} {path}: use WriterDep or SessionDep, or sign it and add it to REAL"


def test_every_route_leaves_an_entry_also_when_it_refuses(api: Api, admin: TestClient) -> None:
    tried = 0
    for method, path, _ in changing(api):
        before = len(entries(api.session))
        url = url_of(path)
        if path in {"/v1/files", "/v1/uploads/{upload_id}/parts"}:
            answer = admin.request(method, url, files={"file": ("f", b"x")})
        else:
            answer = admin.request(method, url, json=body_for(path))
        new = entries(api.session)[before:]
        assert [(row.method, row.route, row.status) for row in new] == [
            (method, path, answer.status_code)
        ], (method, path, answer.text)
        assert new[0].project_id == api.project.id
        assert new[0].request_id == answer.headers["x-request-id"]
        assert new[0].address == "testclient"
        assert set(re.findall(r"_0{32}|-0{32}", url)) <= {
            found for name in new[0].object_ids for found in re.findall(r"[_-]0{32}", name)
        }
        tried += 1
    assert tried > 40


def test_an_entry_is_written_in_the_transaction_of_its_change(api: Api, admin: TestClient) -> None:
    file_id = api.upload([CHAT] * 20).json()["id"]
    row = last(api.session)
    assert (row.method, row.route, row.object_ids) == ("POST", "/v1/files", [file_id])
    key = parse_id("file", file_id)
    assert transaction_of(api.session, "files", key) == transaction_of(
        api.session, "audit_log", row.id
    )

    assert admin.delete(f"/v1/files/{file_id}").status_code == 200
    row = last(api.session)
    assert (row.method, row.object_ids, row.status) == ("DELETE", [file_id], 200)
    assert transaction_of(api.session, "files", key) == transaction_of(
        api.session, "audit_log", row.id
    )
    api.session.expire_all()
    assert api.session.get_one(File, key).deleted_at is not None


def test_revoked_keys_and_deleted_models_have_entries_that_name_them(
    api: Api, admin: TestClient
) -> None:
    made = admin.post("/v1/api_keys", json={"name": "n"}).json()
    created = last(api.session)
    assert created.object_ids == [made["id"]]
    admin.delete(f"/v1/api_keys/{made['id']}")
    revoked = last(api.session)
    assert (revoked.method, revoked.route, revoked.status) == (
        "DELETE",
        "/v1/api_keys/{api_key_id}",
        200,
    )
    key = parse_id("api_key", made["id"])
    assert transaction_of(api.session, "api_keys", key) == transaction_of(
        api.session, "audit_log", revoked.id
    )
    assert made["value"] not in str([vars(row) for row in entries(api.session)])

    version = make_model_version(
        api.session, make_job(api.session, api.project, state=JobState.SUCCEEDED)
    )
    api.session.commit()
    assert admin.delete(f"/v1/models/{version.name}").status_code == 200
    assert (last(api.session).object_ids, last(api.session).status) == ([version.name], 200)


def test_a_change_that_fails_leaves_one_entry_with_its_status(api: Api, admin: TestClient) -> None:
    job = make_job(api.session, api.project, state=JobState.SUCCEEDED)
    api.session.commit()
    name = public_id("job", job.id)
    answer = admin.post(f"/v1/fine_tuning/jobs/{name}/cancel")
    assert answer.status_code == 409
    assert [(row.status, row.object_ids) for row in entries(api.session)] == [(409, [name])]


def test_a_replayed_answer_has_an_entry_of_its_own(api: Api, admin: TestClient) -> None:
    for _ in range(2):
        admin.post("/v1/api_keys", json={"name": "n"}, headers={"idempotency-key": "once"})
    assert [(row.route, row.status) for row in entries(api.session)] == [("/v1/api_keys", 200)] * 2
    named = api.session.scalars(select(ApiKey.name).where(ApiKey.name == "n")).all()
    assert len(named) == 1


def test_reads_and_unknown_keys_leave_none(api: Api, admin: TestClient) -> None:
    admin.get("/v1/files")
    TestClient(api.app).post("/v1/api_keys", json={"name": "n"})
    wrong = {"authorization": "Bearer rt_live_aaaaaaaa_" + "x" * 43}
    TestClient(api.app, headers=wrong).post("/v1/api_keys", json={"name": "n"})
    assert entries(api.session) == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit_log SET actor = 'nobody'",
        "DELETE FROM audit_log",
        "TRUNCATE audit_log",
    ],
)
def test_the_database_takes_nothing_back(api: Api, admin: TestClient, change: str) -> None:
    admin.post("/v1/api_keys", json={"name": "n"})
    with (
        pytest.raises(IntegrityError, match="written for good"),
        api.session.begin_nested(),
    ):
        api.session.execute(text(change))
    assert len(entries(api.session)) == 1


def test_the_log_is_paged_filtered_and_of_one_project(api: Api, admin: TestClient) -> None:
    rival = api.client_of(make_project(api.session, name="rival"), *Scope)
    rival.post("/v1/api_keys", json={"name": "theirs"})
    made = [admin.post("/v1/api_keys", json={"name": f"n{n}"}).json()["id"] for n in range(3)]
    page = admin.get("/v1/audit_log", params={"limit": 2}).json()
    rest = admin.get("/v1/audit_log", params={"after": page["last_id"]}).json()
    shown = [entry["object_ids"] for entry in page["data"] + rest["data"]]
    assert shown == [[name] for name in reversed(made)]
    assert (page["has_more"], rest["has_more"]) == (True, False)

    one = admin.get("/v1/audit_log", params={"object_id": made[1]}).json()["data"]
    assert [entry["object_ids"] for entry in one] == [[made[1]]]
    actor = one[0]["actor"]
    assert len(actor) == 8
    assert len(admin.get("/v1/audit_log", params={"actor": actor}).json()["data"]) == 3
    assert admin.get("/v1/audit_log", params={"actor": "zzzzzzzz"}).json()["data"] == []
    moment = one[0]["created_at"]
    assert admin.get("/v1/audit_log", params={"since": moment + 3600}).json()["data"] == []
    assert admin.get("/v1/audit_log", params={"until": moment}).json()["data"] == []
    assert len(admin.get("/v1/audit_log", params={"since": moment - 1}).json()["data"]) == 3
    assert admin.get("/v1/audit_log", params={"since": 10**15}).status_code == 400


def test_reading_the_log_takes_its_scope(api: Api) -> None:
    answer = api.client.get("/v1/audit_log")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")

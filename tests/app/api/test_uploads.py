"""Files in parts: resumed, put together, checked, cancelled, expired and swept."""

import gzip
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db.models import Upload
from app.domain.identifiers import parse_id
from app.domain.uploads import GRACE_SECONDS
from app.services.uploads import sweep_uploads
from tests.app.api.conftest import CHAT, Api
from tests.factories import make_project

BODY = b"".join(json.dumps(CHAT).encode() + b"\n" for _ in range(40))


def announce(api: Api, **fields: Any) -> Any:
    body = {"bytes": len(BODY), "filename": "f.jsonl", "mime_type": "text/jsonl"}
    return api.client.post("/v1/uploads", json=body | {"purpose": "fine-tune"} | fields)


def send(
    api: Api,
    upload_id: str,
    data: bytes,
    client: TestClient | None = None,
    *,
    key: str | None = None,
) -> Any:
    client = client or api.client
    headers = None if key is None else {"idempotency-key": key}
    url = f"/v1/uploads/{upload_id}/parts"
    return client.post(url, files={"data": ("upload", data)}, headers=headers)


def complete(api: Api, upload_id: str, part_ids: list[str], **fields: Any) -> Any:
    url = f"/v1/uploads/{upload_id}/complete"
    return api.client.post(url, json={"part_ids": part_ids} | fields)


def parts_of(api: Api, upload_id: str) -> list[str]:
    return list(api.storage.list_names(f"uploads/{parse_id('upload', upload_id).hex}"))


def run_out(api: Api, upload_id: str, *, seconds: float = 1) -> None:
    upload = api.session.get_one(Upload, parse_id("upload", upload_id))
    upload.expires_at = datetime.now(UTC) - timedelta(seconds=seconds)
    api.session.commit()


def test_parts_in_any_order_become_a_file_like_a_direct_upload(api: Api) -> None:
    made = announce(api, expires_after={"anchor": "created_at", "seconds": 3600}).json()
    assert (made["object"], made["status"], made["file"]) == ("upload", "pending", None)
    assert made["expires_at"] - made["created_at"] == 3600
    second = send(api, made["id"], BODY[1000:]).json()
    first = send(api, made["id"], BODY[:1000]).json()
    assert (first["object"], first["upload_id"], first["bytes"]) == (
        "upload.part",
        made["id"],
        1000,
    )
    shown = api.client.get(f"/v1/uploads/{made['id']}").json()
    assert shown["parts"] == [second, first]
    done = complete(
        api, made["id"], [first["id"], second["id"]], md5=hashlib.md5(BODY).hexdigest().upper()
    ).json()
    assert (done["status"], done["file"]["status"]) == ("completed", "processed"), done
    direct = api.upload_bytes(BODY).json()
    for key in ("bytes", "sha256", "report", "purpose"):
        assert done["file"][key] == direct[key]
    assert done["file"]["expires_at"] - done["file"]["created_at"] in {3599, 3600}
    assert api.client.get(f"/v1/files/{done['file']['id']}/content").content == BODY
    assert parts_of(api, made["id"]) == []
    assert api.client.get(f"/v1/uploads/{made['id']}").json() == done | {"parts": []}


def test_completing_again_gives_the_same_file(api: Api) -> None:
    upload_id = announce(api).json()["id"]
    part = send(api, upload_id, BODY).json()["id"]
    first = complete(api, upload_id, [part]).json()
    assert complete(api, upload_id, [part]).json() == first
    assert len(api.stored_files()) == 1
    other = complete(api, upload_id, [part, part])
    assert (other.status_code, other.json()["error"]["code"]) == (409, "upload_not_pending")
    assert other.headers["x-should-retry"] == "false"
    late = send(api, upload_id, b"x")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "upload_not_pending")


def test_a_sender_that_was_cut_off_sends_a_part_again(api: Api) -> None:
    upload_id = announce(api).json()["id"]
    send(api, upload_id, BODY[:500])  # its answer was lost
    again = send(api, upload_id, BODY[:500]).json()["id"]
    rest = send(api, upload_id, BODY[500:]).json()["id"]
    assert complete(api, upload_id, [again, rest]).json()["file"]["bytes"] == len(BODY)


def test_a_part_with_a_key_is_kept_once(api: Api) -> None:
    upload_id = announce(api).json()["id"]
    answers = [send(api, upload_id, BODY, key="p").json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(parts_of(api, upload_id)) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bytes": 0}, "bytes"),
        ({"bytes": True}, "bytes"),
        ({"bytes": "7"}, "bytes"),
        ({"filename": ""}, "filename"),
        ({"filename": "x" * 256}, "filename"),
        ({"purpose": "vision"}, "purpose"),
        ({"mime_type": None}, "mime_type"),
        ({"expires_after": {"seconds": 1}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after.anchor"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_announced_badly_is_refused(api: Api, fields: dict[str, Any], param: str) -> None:
    refused = announce(api, **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_limits_hold_before_anything_is_kept(api: Api) -> None:
    large = announce(api, bytes=10**12)
    assert (large.status_code, large.json()["error"]["param"]) == (413, "bytes")
    upload_id = announce(api, bytes=100).json()["id"]
    over = send(api, upload_id, b"x" * 101)
    assert (over.status_code, over.json()["error"]["param"]) == (413, "data")
    empty = send(api, upload_id, b"")
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "data")
    unnamed = api.client.post(f"/v1/uploads/{upload_id}/parts", files={"file": ("f", b"x")})
    assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "data")
    plain = api.client.post(f"/v1/uploads/{upload_id}/parts", content=b"x")
    assert (plain.status_code, plain.json()["error"]["param"]) == (400, "data")
    assert [send(api, upload_id, b"x" * 100).status_code for _ in range(3)] == [200, 200, 400]
    assert len(parts_of(api, upload_id)) == 2


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"part_ids": []}, 400, "part_ids", "invalid_request"),
        ({"part_ids": ["part_x"]}, 404, "part_ids.0", "part_not_found"),
        ({"part_ids": ["part_" + "0" * 32]}, 404, "part_ids.0", "part_not_found"),
        ({"part_ids": "half"}, 400, "part_ids", "upload_size_mismatch"),
        ({"part_ids": "twice"}, 400, "part_ids", "invalid_request"),
        ({"md5": "0" * 32}, 400, "md5", "md5_mismatch"),
        ({"md5": "x"}, 400, "md5", "invalid_request"),
    ],
)
def test_what_does_not_add_up_leaves_the_upload_pending(
    api: Api, change: dict[str, Any], status: int, param: str, code: str
) -> None:
    upload_id = announce(api).json()["id"]
    parts = [send(api, upload_id, piece).json()["id"] for piece in (BODY[:99], BODY[99:])]
    named = {"half": parts[:1], "twice": [parts[0], parts[0]]}
    wanted = change | (
        {"part_ids": named[change["part_ids"]]}
        if change.get("part_ids") in ("half", "twice")
        else {}
    )
    refused = complete(api, upload_id, **{"part_ids": parts} | wanted)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (status, param, code), error
    assert api.stored_files() == []
    assert complete(api, upload_id, parts).json()["status"] == "completed"


def test_a_file_that_is_not_valid_is_refused_as_in_a_direct_upload(api: Api) -> None:
    body = b'{"text": "a"}\n{"text": 1}\n'
    upload_id = announce(api, bytes=len(body)).json()["id"]
    part = send(api, upload_id, body).json()["id"]
    refused = complete(api, upload_id, [part])
    assert refused.status_code == 400
    assert refused.json() == api.upload_bytes(body).json()
    assert api.stored_files() == []


def test_compressed_and_foreign_files_come_in_parts_too(api: Api) -> None:
    row = {"instruction": "i", "output": "o"}
    body = gzip.compress(json.dumps([row] * 5).encode())
    upload_id = announce(api, bytes=len(body), filename="a.json.gz").json()["id"]
    parts = [send(api, upload_id, piece).json()["id"] for piece in (body[:20], body[20:])]
    file = complete(api, upload_id, parts).json()["file"]
    assert (file["conversion"]["layout"], file["report"]["num_rows"]) == ("alpaca", 5)


def test_a_cancelled_upload_takes_nothing_more_and_its_parts_go(api: Api) -> None:
    upload_id = announce(api).json()["id"]
    part = send(api, upload_id, BODY).json()["id"]
    for _ in range(2):
        assert api.client.post(f"/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"
    assert parts_of(api, upload_id) == []
    for answer in (send(api, upload_id, b"x"), complete(api, upload_id, [part])):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "upload_not_pending")
    assert parts_of(api, upload_id) == []


def test_an_hour_later_it_is_expired_and_its_parts_are_swept(api: Api) -> None:
    upload_id = announce(api).json()["id"]
    part = send(api, upload_id, BODY).json()["id"]
    other = announce(api).json()["id"]
    send(api, other, BODY)
    run_out(api, upload_id)
    assert api.client.get(f"/v1/uploads/{upload_id}").json()["status"] == "expired"
    for answer in (
        send(api, upload_id, b"x"),
        complete(api, upload_id, [part]),
        api.client.post(f"/v1/uploads/{upload_id}/cancel"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "upload_not_pending")
    factory = api.app.state.resources.session_factory
    assert sweep_uploads(factory, api.storage) == 0  # a request that began in time may still read
    run_out(api, upload_id, seconds=GRACE_SECONDS + 1)
    assert sweep_uploads(factory, api.storage) == 1
    assert sweep_uploads(factory, api.storage) == 0
    shown = api.client.get(f"/v1/uploads/{upload_id}").json()
    assert (shown["status"], shown["parts"], parts_of(api, upload_id)) == ("expired", [], [])
    assert len(parts_of(api, other)) == 1


def test_uploads_count_against_the_storage_quota(api: Api) -> None:
    api.project.max_storage_bytes = len(BODY)
    api.session.commit()
    upload_id = announce(api).json()["id"]
    part = send(api, upload_id, BODY).json()["id"]
    over = announce(api, bytes=len(BODY) + 1)
    assert (over.status_code, over.json()["error"]["code"]) == (429, "storage_full")
    api.project.max_storage_bytes = len(BODY) - 1
    api.session.commit()
    refused = complete(api, upload_id, [part])
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "storage_full")
    assert api.stored_files() == []


def test_uploads_of_another_project_are_not_there(api: Api) -> None:
    upload_id = announce(api).json()["id"]
    part = send(api, upload_id, BODY).json()["id"]
    rival = api.client_of(make_project(api.session))
    answers = [
        rival.get(f"/v1/uploads/{upload_id}"),
        send(api, upload_id, b"x", rival),
        rival.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part]}),
        rival.post(f"/v1/uploads/{upload_id}/cancel"),
    ]
    assert [answer.status_code for answer in answers] == [404] * 4
    own = rival.post(
        "/v1/uploads",
        json={"bytes": 9, "filename": "f", "mime_type": "m", "purpose": "fine-tune"},
    ).json()["id"]
    stolen = rival.post(f"/v1/uploads/{own}/complete", json={"part_ids": [part]})
    assert (stolen.status_code, stolen.json()["error"]["code"]) == (404, "part_not_found")
    assert len(parts_of(api, upload_id)) == 1

"""Registered models and aliases over HTTP: ETags, preconditions, the gate, pages, and what can't be taken."""

from typing import Any

import pytest

from app.domain.scopes import DEFAULT_SCOPES, Scope
from tests.app.api.conftest import Api
from tests.deployed import make_deployed
from tests.factories import make_model_version

BOT = "/v1/registered_models/support-bot"
PRODUCTION = f"{BOT}/aliases/production"


@pytest.fixture
def deployed(api: Api) -> Any:
    found = make_deployed(api.session, num_versions=3, project=api.project)
    api.session.commit()
    return found


def error(answer: Any, status: int) -> tuple[str | None, str]:
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    return found["param"], found["code"]


def test_a_model_is_registered_numbered_deployed_and_moved_back(api: Api, deployed: Any) -> None:
    client = api.client
    made = client.post(
        "/v1/registered_models",
        json={"name": "b", "description": "d", "metadata": {"team": "x"}, "gate": "held"},
    ).json()
    assert made["id"].startswith("rm_")
    assert (made["gate"], made["metadata"], made["num_versions"]) == ("held", {"team": "x"}, 0)
    model = deployed.models[0].name
    version = client.post("/v1/registered_models/b/versions", json={"model": model}).json()
    assert (version["id"], version["version"], version["model"]) == ("b@1", 1, model)
    put = client.put("/v1/registered_models/b/aliases/live", json={"version": "1"})
    assert (put.status_code, put.headers["etag"]) == (200, '"1"')
    assert put.json()["model"] == model
    named = client.get("/v1/models/b@live").json()
    assert (named["id"], set(named["aliases"])) == (model, {"b@live"})
    assert client.get("/v1/models/b@1").json()["id"] == model
    assert client.get("/v1/models/b@2").status_code == 404
    assert client.get("/v1/registered_models/b").json()["aliases"] == {"live": 1}
    changed = client.patch("/v1/registered_models/b", json={"description": None}).json()
    assert (changed["description"], changed["gate"]) == (None, "held")
    back = client.post(f"{PRODUCTION}/rollback", json={"to": "previous", "reason": "r"})
    assert (back.json()["version"], back.headers["etag"]) == (2, '"4"')
    assert client.post(f"{PRODUCTION}/rollback").json()["version"] == 1
    assert client.post(f"{PRODUCTION}/rollback", json={"to": 3}).json()["version"] == 3
    lines = client.get(f"{PRODUCTION}/history").json()["data"]
    assert [line["to_version"] for line in lines] == [3, 1, 2, 3, 2, 1]
    assert {line["actor"].partition(":")[0] for line in lines} == {"key"}


def test_the_etag_guards_every_move(api: Api, deployed: Any) -> None:
    client = api.client
    etag = client.get(PRODUCTION).headers["etag"]
    assert etag == '"3"'
    stale = {"If-Match": '"2"'}
    for answer in (
        client.put(PRODUCTION, json={"version": 1}, headers=stale),
        client.post(f"{PRODUCTION}/promote", json={"version": 1}, headers=stale),
        client.post(f"{PRODUCTION}/rollback", json={}, headers=stale),
        client.delete(PRODUCTION, headers=stale),
    ):
        assert error(answer, 412) == ("If-Match", "revision_mismatch")
    new = {"If-None-Match": "*"}
    assert error(client.put(PRODUCTION, json={"version": 1}, headers=new), 412)[1] == "alias_exists"
    for header in ({"If-Match": "x"}, {"If-Match": 'W/"3"'}, {"If-None-Match": '"3"'}):
        answer = client.put(PRODUCTION, json={"version": 1}, headers=header)
        assert error(answer, 400) == (next(iter(header)), "invalid_request")
    moved = client.put(PRODUCTION, json={"version": 1}, headers={"If-Match": etag})
    assert moved.headers["etag"] == '"4"'
    gone = client.delete(PRODUCTION, headers={"If-Match": "*"})
    assert gone.json()["deleted"] is True
    assert error(client.get(PRODUCTION), 404) == ("alias", "alias_not_found")
    assert len(client.get(f"{PRODUCTION}/history").json()["data"]) == 5


def test_a_move_sent_twice_under_one_key_is_done_once(api: Api, deployed: Any) -> None:
    headers = {"Idempotency-Key": "k", "If-Match": '"3"'}
    first = api.client.put(PRODUCTION, json={"version": 1}, headers=headers)
    second = api.client.put(PRODUCTION, json={"version": 1}, headers=headers)
    assert first.json() == second.json()
    assert second.headers["idempotent-replayed"] == "true"
    assert second.headers["etag"] == '"4"'


def test_the_gate_answers_409_and_force_wants_scope_and_reason(api: Api, deployed: Any) -> None:
    off = make_model_version(api.session, deployed.job, retention="off")
    api.session.commit()
    api.client.post(f"{BOT}/versions", json={"model": off.name})
    refused = api.client.post(f"{PRODUCTION}/promote", json={"version": 4})
    assert error(refused, 409) == ("version", "retention_not_held")
    assert refused.headers["x-should-retry"] == "false"
    bare = api.client.post(f"{PRODUCTION}/promote", json={"version": 4, "force": True})
    assert bare.status_code == 400
    assert "reason" in bare.json()["error"]["message"]
    force = {"version": 4, "force": True, "reason": "demo"}
    assert error(api.client.put(PRODUCTION, json=force), 403)[1] == "insufficient_scope"
    mighty = api.client_of(api.project, *DEFAULT_SCOPES, Scope.MODELS_FORCE)
    assert mighty.put(PRODUCTION, json=force).json()["version"] == 4
    (line, *_) = api.client.get(f"{PRODUCTION}/history").json()["data"]
    assert (line["forced"], line["reason"]) == (True, "demo")
    assert line["details"]["passed_by_force"][0]["code"] == "retention_not_held"


def test_a_model_that_an_alias_points_at_is_not_deleted(api: Api, deployed: Any) -> None:
    name = deployed.models[2].name
    assert error(api.client.delete(f"/v1/models/{name}"), 409) == ("model", "model_in_use")
    api.client.put(PRODUCTION, json={"version": 1})
    assert api.client.delete(f"/v1/models/{name}").status_code == 200
    assert api.client.get(f"{BOT}/versions/3").json()["status"] == "deleted"
    answer = api.client.put(PRODUCTION, json={"version": 3})
    assert error(answer, 409) == ("version", "version_not_ready")


def test_lists_come_in_pages(api: Api, deployed: Any) -> None:
    first = api.client.get(f"{BOT}/versions", params={"limit": 2}).json()
    assert ([v["version"] for v in first["data"]], first["has_more"]) == ([3, 2], True)
    rest = api.client.get(f"{BOT}/versions", params={"after": first["last_id"]}).json()
    assert ([v["version"] for v in rest["data"]], rest["has_more"]) == ([1], False)
    for after in ("support-bot@x", "other@1", "3"):
        answer = api.client.get(f"{BOT}/versions", params={"after": after})
        assert error(answer, 404)[0] == "after"
    moves = api.client.get(f"{PRODUCTION}/history", params={"limit": 1}).json()
    older = api.client.get(f"{PRODUCTION}/history", params={"after": moves["last_id"]}).json()
    assert [line["revision"] for line in older["data"]] == [2, 1]
    api.client.post("/v1/registered_models", json={"name": "b"})
    page = api.client.get("/v1/registered_models", params={"limit": 1}).json()
    assert ([row["name"] for row in page["data"]], page["has_more"]) == (["b"], True)
    page = api.client.get("/v1/registered_models", params={"after": page["last_id"]}).json()
    assert [row["name"] for row in page["data"]] == ["support-bot"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/v1/registered_models", {"name": "a@b"}, 400, "name"),
        ("POST", "/v1/registered_models", {"name": "b", "gate": "any"}, 400, "gate"),
        (
            "POST",
            "/v1/registered_models",
            {"name": "b", "max_cumulative_drop": 3},
            400,
            "max_cumulative_drop",
        ),
        ("POST", "/v1/registered_models", {"name": "b", "x": 1}, 400, "x"),
        ("POST", "/v1/registered_models", {"name": "support-bot"}, 409, "name"),
        ("PATCH", BOT, {"name": "b"}, 400, "name"),
        ("PATCH", BOT, {"gate": None}, 400, "gate"),
        ("POST", f"{BOT}/versions", {"model": "ft:nobody"}, 404, "model"),
        ("PUT", PRODUCTION, {"version": 0}, 400, "version"),
        ("PUT", PRODUCTION, {"version": 99}, 404, "version"),
        ("PUT", f"{BOT}/aliases/3rd", {"version": 1}, 400, "alias"),
        ("POST", f"{PRODUCTION}/rollback", {"to": "first"}, 400, "to"),
        ("POST", f"{PRODUCTION}/rollback", {"to": 3}, 400, "to"),
        ("POST", f"{BOT}/aliases/none/rollback", {}, 404, "alias"),
        ("GET", f"{BOT}/versions/x", None, 400, "version"),
        ("GET", f"{BOT}/aliases/none/history", None, 404, "alias"),
        ("GET", "/v1/registered_models/none", None, 404, "registered_model"),
    ],
)
def test_bad_input_names_its_field(
    api: Api, deployed: Any, method: str, path: str, body: Any, status: int, param: str
) -> None:
    assert error(api.client.request(method, path, json=body), status)[0] == param

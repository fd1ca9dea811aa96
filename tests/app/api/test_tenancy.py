"""Every route wants a key with its scope, and shows nothing of another project."""

import json
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.domain.external import CreateRun
from app.domain.identifiers import public_id
from app.domain.monitors import CreateMonitor
from app.domain.scopes import DEFAULT_SCOPES, Scope
from app.domain.states import JobState
from app.domain.uploads import CreateUpload
from app.services.external_runs import register_run
from app.services.monitors import create_monitor
from app.services.uploads import create_upload
from app.services.webhooks import create_endpoint, emit_event, list_deliveries
from tests.app.api.conftest import CHAT, Api
from tests.deployed import make_deployed
from tests.factories import (
    make_benchmark,
    make_checkpoint,
    make_file,
    make_job,
    make_model_version,
    make_project,
)

OPEN = {"/healthz", "/readyz"}


@pytest.fixture
def foreign(api: Api) -> dict[str, str]:
    """Ids of one of each thing that belongs to another project, by the path's parameter."""
    session, owner = api.session, make_project(api.session, name="rival")
    job = make_job(session, owner, state=JobState.SUCCEEDED)
    make_checkpoint(session, job)
    version = make_model_version(session, job)
    endpoint = create_endpoint(
        session,
        api.app.state.resources.cipher,
        project_id=owner.id,
        name="e",
        url="https://example.com/",
        event_types=["fine_tuning.job.succeeded"],
    ).row
    emit_event(session, project_id=owner.id, type="fine_tuning.job.succeeded", data={}, job=job)
    rows, _ = list_deliveries(session, project_id=owner.id, endpoint_id=endpoint.id)
    benchmark = make_benchmark(session, owner, name="theirs")
    watched = {"model": "m", "policy": {"benchmarks": [{"name": "theirs"}]}}
    run = register_run(session, owner.id, CreateRun.model_validate(watched))
    announced = {"bytes": 1, "filename": "f", "mime_type": "m", "purpose": "fine-tune"}
    announcement = CreateUpload.model_validate(announced)
    upload = create_upload(session, owner.id, announcement, max_bytes=1)
    deployed = make_deployed(session, project=owner, name="their-bot")
    monitored = {
        "model": "their-bot@production",
        "benchmarks": [{"name": "theirs"}],
        "sources": ["s"],
    }
    monitor = create_monitor(session, owner.id, CreateMonitor.model_validate(monitored)).monitor
    session.commit()
    return {
        "file_id": public_id("file", make_file(session, owner).id),
        "upload_id": public_id("upload", upload.id),
        "fine_tuning_job_id": public_id("job", job.id),
        "run_id": public_id("run", run.id),
        "decision_id": public_id("decision", run.id),
        "model": version.name,
        "benchmark": public_id("benchmark", benchmark.benchmark_id),
        "monitor_id": public_id("monitor", monitor.id),
        "registered_model": "their-bot",
        "registered_model_id": deployed.registered_id,
        "version": "1",
        "alias": "production",
        "webhook_endpoint_id": public_id("webhook_endpoint", endpoint.id),
        "delivery_id": public_id("webhook_delivery", rows[0][0].id),
    }


def routes(api: Api) -> list[tuple[str, str]]:
    """Method and path of every documented route."""
    paths: dict[str, dict[str, Any]] = api.app.openapi()["paths"]
    return [(method.upper(), path) for path, item in paths.items() for method in item]


def body_for(path: str) -> dict[str, Any]:
    """A body that a route takes."""
    if path.endswith("/publish"):
        return {"alpha": 0.5}
    if path.endswith(("/baseline", "/evaluations")):
        scores = [{"benchmark": "b", "items": [{"id": "1", "score": 1}]}]
        return {"scores": scores} | ({"step": 1} if path.endswith("/evaluations") else {})
    if path.endswith("/complete"):
        return {"part_ids": ["part_x"]}
    if path.endswith("/acknowledge"):
        return {"step": 1}
    if path.endswith("/override"):
        return {"action": "stop", "reason": "r"}
    if path.endswith("/versions"):
        return {"model": "m"}
    if path.endswith(("/promote", "/aliases/{alias}")):
        return {"version": 1}
    return {"name": "n"} if path.endswith("{webhook_endpoint_id}") else {}


def test_foreign_ids_are_404_on_every_route(api: Api, foreign: dict[str, str]) -> None:
    tried = 0
    for method, path in routes(api):
        if "{" not in path:
            continue
        url = re.sub(r"\{(\w+)(:path)?\}", lambda found: foreign[found[1]], path)
        body = body_for(path) if method in {"POST", "PUT", "PATCH"} else None
        answer = api.client.request(method, url, json=body)
        assert answer.status_code == 404, (method, path, answer.text)
        tried += 1
    assert tried > 20


def test_nothing_foreign_is_listed(api: Api, foreign: dict[str, str]) -> None:
    for method, path in routes(api):
        if method == "GET" and "{" not in path and path.startswith("/v1/") and "types" not in path:
            found = api.client.get(path).json()["data"]
            assert not {item["id"] for item in found} & set(foreign.values()), path
    cursors = {
        "/v1/files": "file_id",
        "/v1/fine_tuning/jobs": "fine_tuning_job_id",
        "/v1/benchmarks": "benchmark",
        "/v1/registered_models": "registered_model_id",
        "/v1/monitors": "monitor_id",
        "/v1/runs": "run_id",
        "/v1/webhook_endpoints": "webhook_endpoint_id",
    }
    for path, name in cursors.items():
        assert api.client.get(path, params={"after": foreign[name]}).status_code == 404, path
    results = api.client.get("/v1/benchmark_results", params={"subject_id": foreign["model"]})
    assert results.status_code == 404


def test_every_route_wants_a_key(api: Api) -> None:
    anonymous = TestClient(api.app)
    for method, path in routes(api):
        if path in OPEN:
            continue
        for headers in (
            {},
            {"authorization": "Bearer rt_live_aaaaaaaa_x"},
            {"authorization": "Basic x"},
        ):
            answer = anonymous.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_every_route_wants_one_scope(api: Api) -> None:
    powerless = api.client_of(api.project, Scope.KEYS_ADMIN)
    for method, path in routes(api):
        if path not in OPEN:
            body = {"alpha": 1} if method == "POST" else None
            answer = powerless.request(method, path, json=body)
            assert answer.status_code == 403, (method, path, answer.text)
            assert answer.json()["error"]["code"] == "insufficient_scope"


@pytest.mark.parametrize("scope", DEFAULT_SCOPES)
def test_each_scope_opens_something(api: Api, scope: Scope) -> None:
    client = api.client_of(api.project, scope)
    if scope is Scope.RESULTS_ACT:
        return  # it widens what results:write does
    answers = [
        client.request(method, path, json={}) for method, path in routes(api) if path not in OPEN
    ]
    assert any(answer.status_code != 403 for answer in answers)


def test_a_foreign_file_is_404_naming_the_field(
    api: Api, base: Any, foreign: dict[str, str]
) -> None:
    own = api.upload([CHAT]).json()["id"]
    theirs = foreign["file_id"]
    for body, param in (
        ({"training_file": theirs}, "training_file"),
        ({"training_file": own, "validation_file": theirs}, "validation_file"),
        ({"training_file": own, "retention": {"general_data": theirs}}, "retention.general_data"),
    ):
        answer = api.submit(**body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, param)
    made = api.client.post("/v1/benchmarks", json={"name": "b", "file": theirs, "scorer": "nll"})
    assert (made.status_code, made.json()["error"]["param"]) == (404, "file")


def test_the_schema_describes_every_answer(api: Api) -> None:
    schema = api.app.openapi()
    assert json.dumps(schema)
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            if path.endswith("/content"):
                continue
            content = operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert "$ref" in content, (method, path)
            assert operation["summary"]

"""Every route wants a key with its scope, and shows nothing of another project."""

import json
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db.models import AuditEntry, Evaluation
from app.domain.external import CreateRun
from app.domain.identifiers import public_id
from app.domain.monitors import CreateMonitor
from app.domain.scopes import DEFAULT_SCOPES, Scope
from app.domain.states import JobState
from app.domain.uploads import CreateUpload
from app.services.external_runs import register_run
from app.services.monitors import create_monitor
from app.services.uploads import create_upload
from app.services.webhook_deliveries import list_deliveries
from app.services.webhooks import create_endpoint, emit_event
from tests.app.api.conftest import CHAT, Api
from tests.app.api.surface import body_for, every_endpoint
from tests.deployed import make_deployed
from tests.factories import (
    make_benchmark,
    make_checkpoint,
    make_file,
    make_job,
    make_key,
    make_model_version,
    make_project,
)

OPEN = {"/healthz", "/readyz"}
PAGES = {"/", "/docs", "/assets/{name}"}  # no data in them
RESULT = {"benchmark": "b", "metric": "accuracy", "value": 0.5}


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
    reading = Evaluation(
        project_id=owner.id,
        subject_type="model",
        subject_key=version.name,
        model_version_id=version.id,
        benchmark_version_id=benchmark.id,
        benchmark="theirs",
        metric="accuracy",
        purpose="monitor",
        source="external",
        value=0.5,
    )
    session.add(reading)
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
    noted = AuditEntry(
        project_id=owner.id, actor="a", method="POST", route="r", object_ids=[], status=200
    )
    session.add(noted)
    session.commit()
    return {
        "audit_entry_id": public_id("audit_entry", noted.id),
        "file_id": public_id("file", make_file(session, owner).id),
        "upload_id": public_id("upload", upload.id),
        "fine_tuning_job_id": public_id("job", job.id),
        "run_id": public_id("run", run.id),
        "decision_id": public_id("decision", run.id),
        "model": version.name,
        "evaluation_id": public_id("evaluation", reading.id),
        "benchmark": public_id("benchmark", benchmark.benchmark_id),
        "monitor_id": public_id("monitor", monitor.id),
        "registered_model": "their-bot",
        "registered_model_id": deployed.registered_id,
        "version": "1",
        "alias": "production",
        "webhook_endpoint_id": public_id("webhook_endpoint", endpoint.id),
        "delivery_id": public_id("webhook_delivery", rows[0][0].id),
        "api_key_id": public_id("api_key", make_key(session, owner).id),
        "project_id": public_id("project", owner.id),
    }


def routes(api: Api) -> list[tuple[str, str]]:
    """Method and path of every route of the API, hidden ones included."""
    return [
        (endpoint.method, endpoint.path)
        for endpoint in every_endpoint(api.app)
        if endpoint.path not in PAGES
    ]


#: Bodies that name something foreign, with the field that a 404 has to name, for each route that makes something.
#: An empty list: nothing in its body can name what another project owns.
MAKERS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "/v1/files": [],
    "/v1/uploads": [],
    "/v1/fine_tuning/jobs": [
        ({"training_file": "{file_id}"}, "training_file"),
        ({"validation_file": "{file_id}"}, "validation_file"),
        ({"retention": {"general_data": "{file_id}"}}, "retention.general_data"),
        (
            {"retention": {"policy": {"benchmarks": [{"name": "theirs"}]}}},
            "retention.policy.benchmarks.0.name",
        ),
    ],
    "/v1/fine_tuning/estimates": [
        ({"training_file": "{file_id}"}, "training_file"),
        ({"validation_file": "{file_id}"}, "validation_file"),
    ],
    "/v1/registered_models": [],
    "/v1/monitors": [({"model": "their-bot@production"}, "model")],
    "/v1/benchmarks": [({"file": "{file_id}"}, "file")],
    "/v1/benchmark_results": [
        ({"results": [RESULT | {"subject": {"type": "model", "id": "{model}"}}]}, "subject.id"),
        (
            {
                "results": [
                    RESULT | {"subject": {"type": "fine_tuning.job", "id": "{fine_tuning_job_id}"}}
                ]
            },
            "subject.id",
        ),
    ],
    "/v1/runs": [({"policy": {"benchmarks": [{"name": "theirs"}]}}, "policy.benchmarks.0.name")],
    "/v1/webhook_endpoints": [],
    "/v1/api_keys": [],
}


def test_every_route_is_documented(api: Api) -> None:
    documented = {
        (method.upper(), path)
        for path, item in api.app.openapi()["paths"].items()
        for method in item
    }
    served = {(method, path.replace(":path}", "}")) for method, path in routes(api)}
    assert served == documented


def test_a_body_that_names_something_foreign_is_404_naming_the_field(
    api: Api, base: Any, foreign: dict[str, str]
) -> None:
    own = api.upload([CHAT] * 20).json()["id"]
    makers = {path for method, path in routes(api) if method == "POST" and "{" not in path}
    missing = makers - set(MAKERS)
    assert not missing, f"say in MAKERS what of other projects a body of {missing} can name"
    for path in sorted(makers):
        for body, param in MAKERS[path]:
            named = json.loads(
                re.sub(r"{(\w+)}", lambda found: foreign[found[1]], json.dumps(body))
            )
            standard = {"training_file": own} if path.startswith("/v1/fine_tuning/") else {}
            answer = api.client.post(path, json=body_for(path) | standard | named)
            assert answer.status_code == 404, (path, named, answer.text)
            assert answer.json()["error"]["param"].endswith(param), (path, named, answer.text)


def test_foreign_ids_are_404_on_every_route(api: Api, foreign: dict[str, str]) -> None:
    tried, admin = 0, api.client_of(api.project, *Scope)
    for method, path in routes(api):
        if "{" not in path:
            continue
        unknown = set(re.findall(r"\{(\w+)", path)) - set(foreign)
        assert not unknown, f"{path}: have `foreign` make one of another project for {unknown}"
        url = re.sub(r"\{(\w+)(:path)?\}", lambda found: foreign[found[1]], path)
        body = body_for(path) if method in {"POST", "PUT", "PATCH"} else None
        answer = admin.request(method, url, json=body)
        assert answer.status_code == 404, (method, path, answer.text)
        tried += 1
    assert tried > 20


def test_nothing_foreign_is_listed(api: Api, foreign: dict[str, str]) -> None:
    admin = api.client_of(api.project, *Scope)
    for method, path in routes(api):
        if method == "GET" and "{" not in path and path.startswith("/v1/") and "types" not in path:
            found = admin.get(path).json()["data"]
            assert not {item["id"] for item in found} & set(foreign.values()), path
    cursors = {
        "/v1/files": "file_id",
        "/v1/fine_tuning/jobs": "fine_tuning_job_id",
        "/v1/benchmarks": "benchmark",
        "/v1/registered_models": "registered_model_id",
        "/v1/monitors": "monitor_id",
        "/v1/runs": "run_id",
        "/v1/webhook_endpoints": "webhook_endpoint_id",
        "/v1/api_keys": "api_key_id",
        "/v1/benchmark_results": "evaluation_id",
        "/v1/audit_log": "audit_entry_id",
    }
    paged = {
        endpoint.path
        for endpoint in every_endpoint(api.app)
        if endpoint.method == "GET"
        and "{" not in endpoint.path
        and re.search(r"name='after'", repr(endpoint.route.dependant))
    }
    assert len(paged) > 7
    assert paged <= set(cursors), "say whose foreign id these lists must not take as a cursor"
    for path in sorted(paged):
        cursor = {"after": foreign[cursors[path]]}
        assert admin.get(path, params=cursor).status_code == 404, path
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
    powerless = api.client_of(api.project, Scope.MODELS_FORCE)  # which only widens models:write
    for method, path in routes(api):
        if path not in OPEN:
            body = {"alpha": 1} if method == "POST" else None
            answer = powerless.request(method, path, json=body)
            assert answer.status_code == 403, (method, path, answer.text)
            assert answer.json()["error"]["code"] == "insufficient_scope"


@pytest.mark.parametrize("scope", [*DEFAULT_SCOPES, Scope.KEYS_ADMIN])
def test_each_scope_opens_something(api: Api, scope: Scope) -> None:
    client = api.client_of(api.project, scope)
    if scope is Scope.RESULTS_ACT:
        return  # it widens what results:write does
    answers = [
        client.request(method, path, json={}) for method, path in routes(api) if path not in OPEN
    ]
    assert any(answer.status_code != 403 for answer in answers)


def test_the_schema_describes_every_answer(api: Api) -> None:
    schema = api.app.openapi()
    assert json.dumps(schema)
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            if path.endswith("/content"):
                continue
            content = operation["responses"]["200"]["content"]["application/json"]["schema"]
            for shape in content.get("anyOf", [content]):
                assert "$ref" in shape, (method, path)
            assert operation["summary"]

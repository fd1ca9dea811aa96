"""The OpenAPI document is whole: a new route without words, examples, errors or a link fails here by its name."""

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from fastapi import FastAPI

from app.api.openapi import list_operations
from app.api.openapi_examples import REQUESTS
from app.api.openapi_links import MAKERS, STEPS
from app.main import create_app
from app.settings import Settings
from tests.app.api.surface import every_endpoint

OPEN = {"health_healthz", "health_readyz"}
#: Of files: JSON has no example to show there.
BYTES = {"application/octet-stream", "text/event-stream", "multipart/form-data"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    settings = Settings(data_dir=tmp_path_factory.mktemp("data"))
    return create_app(settings, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {operation["operationId"]: operation for _, _, operation in list_operations(document)}


def contents(operation: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every media type of a body and of the answers, by what it is."""
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"body {media}", content
    for status, response in operation["responses"].items():
        for media, content in response.get("content", {}).items():
            yield f"{status} {media}", content


def test_every_route_has_an_operation_with_words(
    app: FastAPI, document: dict[str, Any], operations: dict[str, Any]
) -> None:
    described = {(method.upper(), path) for path, method, _ in list_operations(document)}
    served = {
        (method, path.replace(":path", ""))
        for method, path, route in every_endpoint(app)
        if route.include_in_schema
    }
    assert described == served
    assert len(operations) == len(described), "two operations have one id"
    tags = {tag["name"] for tag in document["tags"]}
    for name, operation in operations.items():
        assert operation["summary"], name
        assert operation["description"].endswith("."), name
        assert set(operation["tags"]) <= tags, f"{name}: describe its tag in app/api/openapi.py"
        assert bool(operation["security"]) == (name not in OPEN), name


def test_every_error_is_described_with_the_envelope(
    document: dict[str, Any], operations: dict[str, Any]
) -> None:
    for name, operation in operations.items():
        statuses = set(operation["responses"])
        parameters = {parameter["name"] for parameter in operation["parameters"]}
        if name in OPEN:
            continue
        assert statuses >= {"200", "401", "403", "429", "503"}, name
        if "idempotency-key" in parameters:
            assert statuses >= {"400", "409", "413", "422"}, name
        assert ("412" in statuses) == ("if-match" in parameters), name
    for name, response in document["components"]["responses"].items():
        media = response["content"]["application/json"]
        assert media["schema"]["$ref"].endswith("/ErrorBody"), name
        assert set(media["example"]["error"]) == {"message", "type", "param", "code"}


def test_every_answer_has_its_headers(document: dict[str, Any], operations: dict[str, Any]) -> None:
    for name, operation in operations.items():
        for status, response in operation["responses"].items():
            component = response.get("$ref", "").rsplit("/", 1)[-1]
            shown = document["components"]["responses"][component] if component else response
            assert "x-request-id" in shown["headers"], (name, status)
        if name not in OPEN:
            assert "x-ratelimit-limit-requests" in operation["responses"]["200"]["headers"], name
    for status in ("TooManyRequests", "ServiceUnavailable"):
        assert "retry-after" in document["components"]["responses"][status]["headers"]


def test_every_example_is_there_and_valid(
    document: dict[str, Any], operations: dict[str, Any]
) -> None:
    places = [
        (f"{name}: {place}", content)
        for name, operation in operations.items()
        for place, content in contents(operation)
    ] + [
        (name, response["content"]["application/json"])
        for name, response in document["components"]["responses"].items()
    ]
    for name, content in places:
        if name.rsplit(" ", 1)[-1] in BYTES:
            continue
        assert "example" in content, f"{name} has no example: see app/api/openapi_examples.py"
        schema = content["schema"] | {"components": document["components"]}
        problems = [
            f"{list(problem.instance_path)}: {problem.message}"
            for problem in jsonschema_rs.validator_for(schema).iter_errors(content["example"])
        ]
        assert not problems, (name, problems)
    assert set(REQUESTS) <= set(operations), "examples of operations that are gone"


def test_links_lead_from_what_is_made_to_all_that_can_be_done_with_it(
    document: dict[str, Any], operations: dict[str, Any]
) -> None:
    for source in {*MAKERS, *(step.source for step in STEPS)}:
        for target, link in operations[source]["responses"]["200"]["links"].items():
            assert link["operationId"] in operations, (source, target)
            known = {parameter["name"] for parameter in operations[target]["parameters"]}
            assert set(link.get("parameters", {})) <= known, (source, target)
    job = operations["fine_tuning_create_job"]["responses"]["200"]["links"]
    for target in ("retrieve_job", "cancel_job", "list_events", "list_checkpoints"):
        assert f"fine_tuning_{target}" in job
    linked = {
        target
        for operation in operations.values()
        for target in operation["responses"].get("200", {}).get("links", {})
    }
    on_one_thing = {
        operation["operationId"]
        for path, _, operation in list_operations(document)
        if path.count("{") == 1
    }
    assert on_one_thing <= linked, "nothing leads there: name its maker in app/api/openapi_links.py"

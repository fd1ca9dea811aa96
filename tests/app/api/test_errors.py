"""The envelope stands on every error, and the table knows every error there is."""

import importlib
import pickle
import pkgutil
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

import app
from app.api.errors import STATUS_BY_ERROR, describe_invalid, status_of
from app.errors import Conflict, RetainError
from app.main import create_app
from app.services.keys import PREFIX
from app.settings import Settings
from tests.app.api.conftest import Api


def every_error() -> list[type[RetainError]]:
    for module in pkgutil.walk_packages(app.__path__, "app."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, left = [], [RetainError]
    while left:
        kind = left.pop()
        found.append(kind)
        left += kind.__subclasses__()
    return found


def test_every_error_of_the_tree_is_in_the_table() -> None:
    kinds = every_error()
    assert {kind for kind in kinds if kind.__module__ == "app.errors"} == set(STATUS_BY_ERROR)
    assert all(400 <= status_of(kind("m")) < 600 for kind in kinds)


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_errors_survive_pickling(kind: type[RetainError]) -> None:
    error = pickle.loads(pickle.dumps(kind("the text", "a.b", "own_code")))
    assert (str(error), error.param, error.code) == ("the text", "a.b", "own_code")
    assert pickle.loads(pickle.dumps(kind("t"))).code == kind.code


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in every_error()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("PUT", "/v1/files", 405, "method_not_allowed"),
        ("GET", "/v1/fine_tuning/jobs?limit=0", 400, "invalid_request"),
        ("GET", "/v1/fine_tuning/jobs?limit=x", 400, "invalid_request"),
        ("GET", "/v1/fine_tuning/jobs/x", 404, "not_found"),
        ("GET", "/v1/models/a%00b", 400, None),
    ],
)
def test_the_envelope_is_on_every_error(
    api: Api, method: str, path: str, status: int, code: str | None
) -> None:
    answer = api.client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_query_error_names_the_parameter(api: Api) -> None:
    error = api.client.get("/v1/fine_tuning/jobs?limit=0").json()["error"]
    assert error["param"] == "limit"
    assert error["message"].startswith("limit: ")


def test_a_bug_shows_its_id_and_nothing_else(api: Api) -> None:
    @api.app.get("/broken")
    def broken() -> None:
        raise ZeroDivisionError("secret detail")

    answer = api.client.get("/broken")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "server_error"
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert "secret" not in answer.text


def test_genuine_conflicts_are_not_to_be_sent_again(api: Api) -> None:
    @api.app.get("/conflict")
    def conflict() -> None:
        raise Conflict("no")

    answer = api.client.get("/conflict")
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")


def test_without_a_database_the_answer_is_503_and_worth_sending_again(settings: Settings) -> None:
    engine = create_engine(
        "postgresql+psycopg://u:p@127.0.0.1:9/none", connect_args={"connect_timeout": 1}
    )
    client = TestClient(create_app(settings, sessionmaker(engine)))
    answer = client.get("/v1/models", headers={"authorization": f"Bearer {PREFIX}_aaaaaaaa_x"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert client.get("/healthz").status_code == 200
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "down")


def test_of_a_union_the_branch_that_got_furthest_speaks() -> None:
    body = {"retention": {"strategies": [{"type": "ewc", "strength": -1}]}}
    errors: list[dict[str, Any]] = [
        {
            "loc": ("body", "retention", "strategies", "tuple[x]", 0, "ewc", "strength"),
            "msg": "too small",
            "type": "ge",
        },
        {
            "loc": ("body", "retention", "strategies", "literal['auto']"),
            "msg": "not auto",
            "type": "literal_error",
        },
    ]
    assert describe_invalid(errors, body) == (
        "retention.strategies.0.strength: too small",
        "retention.strategies.0.strength",
    )


def test_a_missing_field_is_named() -> None:
    errors: list[dict[str, Any]] = [
        {"loc": ("body", "model"), "msg": "Field required", "type": "missing"}
    ]
    assert describe_invalid(errors, {}) == ("model: Field required", "model")

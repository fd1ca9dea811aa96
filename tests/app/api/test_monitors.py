"""Monitors over HTTP: made, changed, read; and the whole way from a posted regression to a new job."""

import time
from typing import Any

import pytest
from sqlalchemy import select

from app.db.models import (
    BaseModel,
    Job,
    OutboxMessage,
    WebhookDelivery,
    WebhookEvent,
)
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import parse_id
from app.domain.scopes import DEFAULT_SCOPES, Scope
from app.domain.states import JobState
from app.main import create_app
from app.settings import Settings
from tests.app.api.conftest import Api
from tests.deployed import items, make_deployed, store_items
from tests.factories import make_benchmark, make_project, make_suite

PRODUCTION = "/v1/registered_models/support-bot/aliases/production"


@pytest.fixture
def deployed(api: Api) -> Any:
    found = make_deployed(api.session, project=api.project)
    store_items(api.session, api.storage, found.benchmark)
    api.session.commit()
    return found


def body_of(deployed: Any, **fields: Any) -> dict[str, Any]:
    return {
        "model": "support-bot@production",
        "benchmarks": [{"name": deployed.benchmark_name}],
        "sources": ["nightly"],
    } | fields


def error(answer: Any, status: int) -> tuple[str | None, str]:
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    return found["param"], found["code"]


def test_a_posted_regression_rolls_back_tells_and_trains_within_five_seconds(
    committed_factory: SessionFactory, settings: Settings
) -> None:
    """Through HTTP on a database of its own, with real commits: everything is there when the answer is."""
    app = create_app(settings, committed_factory)
    with committed_factory() as session:
        api = Api(app, session, make_project(session, name="acme"))
        found = make_deployed(session, project=api.project)
        store_items(session, api.storage, found.benchmark)
        session.commit()
        client = api.client_of(api.project, *DEFAULT_SCOPES)
    hook = client.post(
        "/v1/webhook_endpoints",
        json={
            "url": "https://example.com/hook",
            "event_types": ["monitor.regression_detected", "registered_model.alias_moved"],
        },
    )
    assert hook.status_code == 200, hook.text
    monitor = client.post("/v1/monitors", json=body_of(found)).json()
    assert monitor["status"] == "waiting"
    result = {
        "subject": {"type": "model", "id": "support-bot@production"},
        "benchmark": found.benchmark_name,
        "items": items(lost=120),
        "source": "nightly",
        "suite_sha256": found.benchmark.items_sha256,
    }
    started = time.perf_counter()
    answer = client.post("/v1/benchmark_results", json=result)
    alias = client.get(PRODUCTION).json()
    seconds = time.perf_counter() - started
    assert answer.status_code == 200, answer.text
    assert seconds < 5.0, f"{seconds:.2f} s"
    (look,) = answer.json()["data"]
    (outcome,) = look["monitors"]
    assert (look["verdict"], outcome["rolled_back_to"], outcome["monitor_id"]) == (
        "regress",
        1,
        monitor["id"],
    )
    assert (alias["version"], alias["model"]) == (1, found.models[0].name)
    (line, *_) = client.get(f"{PRODUCTION}/history").json()["data"]
    assert (line["action"], line["actor"]) == ("regression_rollback", monitor["id"])
    assert line["compensation_job_id"] == outcome["compensation_job_id"]
    assert line["details"]["reading"]["drop"] == pytest.approx(0.1)
    job = client.get(f"/v1/fine_tuning/jobs/{line['compensation_job_id']}").json()
    assert job["status"] == "queued"
    (strategy,) = job["retention"]["strategies"]
    assert (strategy["type"], strategy["strength"]) == ("ewc", 4.0)
    with transaction(committed_factory) as session:
        key = parse_id("job", line["compensation_job_id"])
        assert session.get_one(Job, key).state is JobState.QUEUED
        assert session.scalars(select(OutboxMessage).where(OutboxMessage.job_id == key)).one()
        sent = session.scalars(
            select(WebhookEvent.type)
            .join(WebhookDelivery, WebhookDelivery.event_id == WebhookEvent.id)
            .order_by(WebhookEvent.seq)
        ).all()
    assert sent == ["registered_model.alias_moved", "monitor.regression_detected"]
    looks = client.get(f"/v1/monitors/{monitor['id']}/looks").json()["data"]
    assert [(seen["verdict"], seen["look"], seen["source"]) for seen in looks] == [
        ("regress", 1, "nightly")
    ]
    assert looks[0]["outcome"]["compensation_job_id"] == line["compensation_job_id"]
    again = client.post(
        "/v1/benchmark_results",
        json=result | {"subject": {"type": "model", "id": found.models[1].name}},
    ).json()["data"][0]
    assert again["monitors"][0]["is_replay"]
    assert again["results"][0]["id"] == look["results"][0]["id"]
    assert len(client.get(f"{PRODUCTION}/history").json()["data"]) == 3


def test_a_monitor_is_made_read_changed_and_ended(api: Api, deployed: Any) -> None:
    client = api.client
    made = client.post(
        "/v1/monitors",
        json=body_of(deployed, schedule={"every_hours": 12}, stale_after_hours=24),
    ).json()
    assert made["id"].startswith("mon_")
    assert made["benchmarks"][0]["name"] == f"{deployed.benchmark_name}@1"
    assert (made["version"], made["points_at"]) == (2, deployed.models[1].name)
    assert made["next_evaluation_at"] is not None
    path = f"/v1/monitors/{made['id']}"
    assert client.get(path).json() == made
    assert [row["id"] for row in client.get("/v1/monitors").json()["data"]] == [made["id"]]
    changed = client.patch(
        path,
        json={
            "schedule": None,
            "limits": {"max_drop": 0.1},
            "on_regression": {"compensate": False},
        },
    ).json()
    assert (changed["schedule"], changed["next_evaluation_at"]) == (None, None)
    assert changed["limits"] == {"max_drop": 0.1, "max_nll_increase": 0.05}
    assert (changed["sources"], changed["stale_after_hours"]) == (["nightly"], 24)
    assert error(client.patch(path, json={"sources": []}), 400) == ("sources", "invalid_request")
    busy = client.delete(PRODUCTION)
    assert error(busy, 409) == ("alias", "alias_is_monitored")
    assert client.delete(path).json() == {
        "id": made["id"],
        "object": "monitor.deleted",
        "deleted": True,
    }
    assert error(client.get(path), 404) == ("monitor_id", "monitor_not_found")
    assert client.delete(PRODUCTION).status_code == 200


def test_without_benchmarks_the_bases_suite_is_watched(api: Api, deployed: Any) -> None:
    plain = {"model": "support-bot@production", "sources": ["s"]}
    assert error(api.client.post("/v1/monitors", json=plain), 400) == (
        "benchmarks",
        "nothing_to_watch",
    )
    base = deployed.models[0].base_model_id
    make_suite(api.session, api.session.get_one(BaseModel, base), [deployed.benchmark])
    api.session.commit()
    made = api.client.post("/v1/monitors", json=plain).json()
    assert [found["name"] for found in made["benchmarks"]] == [f"{deployed.benchmark_name}@1"]


def test_a_key_without_the_scope_only_records(api: Api, deployed: Any) -> None:
    api.client.post("/v1/monitors", json=body_of(deployed))
    writer = api.client_of(api.project, Scope.RESULTS_WRITE)
    (look,) = writer.post(
        "/v1/benchmark_results",
        json={
            "subject": {"type": "model", "id": deployed.models[1].name},
            "benchmark": deployed.benchmark_name,
            "value": 0.1,
            "stderr": 0.01,
            "n_samples": 2000,
            "source": "nightly",
        },
    ).json()["data"]
    assert look["verdict"] == "regress"
    assert not look["monitors"][0]["acted"]
    assert "results:act" in look["monitors"][0]["why"]
    assert api.client.get(PRODUCTION).json()["version"] == 2


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "support-bot"}, 400, "model"),
        ({"model": "support-bot@nobody"}, 404, "alias"),
        ({"model": "nobody@production"}, 404, "registered_model"),
        ({"benchmarks": [{"name": "nothing"}]}, 404, "benchmarks.0.name"),
        ({"benchmarks": [{"name": "learned"}]}, 400, "benchmarks.0.name"),
        ({"benchmarks": [{"name": "b", "weight": 0}]}, 400, "benchmarks.0.weight"),
        ({"limits": {"max_drop": 2}}, 400, "limits.max_drop"),
        ({"schedule": {"every_hours": 0}}, 400, "schedule.every_hours"),
        ({"schedule": {}}, 400, "schedule.every_hours"),
        ({"stale_after_hours": 0}, 400, "stale_after_hours"),
        ({"on_regression": {"shout": True}}, 400, "on_regression.shout"),
        ({"policy": "rp_1"}, 400, "policy"),
    ],
)
def test_bad_input_names_its_field(
    api: Api, deployed: Any, fields: dict[str, Any], status: int, param: str
) -> None:
    make_benchmark(api.session, api.project, name="learned", kind="domain")
    api.session.commit()
    answer = api.client.post("/v1/monitors", json=body_of(deployed, **fields))
    assert error(answer, status)[0] == param
    assert api.client.get("/v1/monitors").json()["data"] == []


def test_a_benchmark_is_watched_once(api: Api, deployed: Any) -> None:
    twice = [{"name": deployed.benchmark_name}, {"name": f"{deployed.benchmark_name}@1"}]
    answer = api.client.post("/v1/monitors", json=body_of(deployed, benchmarks=twice))
    assert error(answer, 400)[0] == "benchmarks.1.name"
    made = api.client.post("/v1/monitors", json=body_of(deployed)).json()
    assert (
        error(api.client.post("/v1/monitors", json=body_of(deployed)), 409)[1] == "monitor_exists"
    )
    answer = api.client.patch(f"/v1/monitors/{made['id']}", json={"benchmarks": twice})
    assert error(answer, 400)[0] == "benchmarks.1.name"

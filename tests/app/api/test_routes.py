"""What the routes answer beyond what the openai client's own test sees."""

import base64
import json
import time
from dataclasses import replace
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from sqlalchemy import select

from app.db.models import BaseModel, Evaluation, Job, OutboxMessage
from app.domain.identifiers import parse_id, public_id
from app.domain.states import JobKind, JobState
from app.services.decisions import START
from app.services.evaluations import pack_bytes
from tests.app.api.conftest import CHAT, Api
from tests.factories import make_checkpoint, make_job, make_project

ITEMS = [{"id": f"i{n}", "question": "q", "choices": ["a", "b"], "answer": 0} for n in range(6)]
FRONTIER = [{"alpha": 0.0, "general": 0.9, "domain": 0.1, "valid_loss": 3.0, "benchmarks": {}}]


def add_benchmark(api: Api, **fields: Any) -> dict[str, Any]:
    file_id = api.upload(ITEMS, "evals").json()["id"]
    body = {"name": "mc", "file": file_id, "scorer": "multiple_choice"} | fields
    answer = api.client.post("/v1/benchmarks", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_benchmarks_get_versions_and_are_found_by_name(api: Api) -> None:
    first, second = add_benchmark(api), add_benchmark(api, kind="domain")
    assert (first["id"], first["version"], second["version"]) == (second["id"], 1, 2)
    assert (second["num_items"], second["chance"], second["kind"]) == (6, 0.5, "domain")
    for reference, version in (("mc", 2), ("mc@1", 1), (first["id"], 2)):
        assert api.client.get(f"/v1/benchmarks/{reference}").json()["version"] == version
    versions = api.client.get("/v1/benchmarks/mc/versions").json()["data"]
    assert [v["version"] for v in versions] == [2, 1]
    other = add_benchmark(api, name="other")
    page = api.client.get("/v1/benchmarks", params={"limit": 1}).json()
    assert ([b["id"] for b in page["data"]], page["has_more"]) == ([other["id"]], True)
    rest = api.client.get("/v1/benchmarks", params={"after": page["last_id"]}).json()
    assert ([b["id"] for b in rest["data"]], rest["has_more"]) == ([first["id"]], False)
    for missing in ("nope", "mc@3", "mc@x"):
        assert api.client.get(f"/v1/benchmarks/{missing}").status_code == 404


def test_results_are_posted_and_read_back(api: Api) -> None:
    job = make_job(api.session, api.project)
    api.session.commit()
    job_id = public_id("job", job.id)
    one = {
        "subject": {"type": "fine_tuning.job", "id": job_id},
        "benchmark": "mine",
        "value": 0.5,
        "step": 3,
    }
    posted = api.client.post("/v1/benchmark_results", json=one)
    assert posted.status_code == 200, posted.text
    look = posted.json()["data"][0]
    assert (look["verdict"], look["decision"], look["results"][0]["value"]) == (None, None, 0.5)
    batch = {"results": [one | {"benchmark": "b", "step": 4}, one | {"benchmark": "c", "step": 4}]}
    assert (
        len(api.client.post("/v1/benchmark_results", json=batch).json()["data"][0]["results"]) == 2
    )
    page = api.client.get("/v1/benchmark_results", params={"subject_id": job_id, "limit": 2}).json()
    assert ([r["benchmark"] for r in page["data"]], page["has_more"]) == (["c", "b"], True)
    rest = api.client.get("/v1/benchmark_results", params={"after": page["last_id"]}).json()
    assert [r["benchmark"] for r in rest["data"]] == ["mine"]
    upward = api.client.get(
        "/v1/benchmark_results", params={"order": "asc", "benchmark": "c"}
    ).json()
    assert [(r["benchmark"], r["subject"]["id"]) for r in upward["data"]] == [("c", job_id)]
    shortcut = api.client.get(f"/v1/fine_tuning/jobs/{job_id}/benchmark_results").json()
    assert len(shortcut["data"]) == 3
    bad = api.client.post("/v1/benchmark_results", json=one | {"value": "x"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "value")
    worse = api.client.post("/v1/benchmark_results", json={"results": [one | {"stderr": -1}]})
    assert worse.json()["error"]["param"] == "results.0.stderr"


def test_items_come_with_a_result_when_asked_for(api: Api, base: BaseModel) -> None:
    made = add_benchmark(api)
    version = parse_id("benchmark_version", made["version_id"])
    scores = np.array([1, 0, np.nan, 1, 0, 1], dtype=np.float32)
    for project_id, kind, key in (
        (None, "base_model", f"{base.sha256}/own"),
        (api.project.id, "model", "m"),
    ):
        api.session.add(
            Evaluation(
                project_id=project_id,
                subject_type=kind,
                subject_key=key,
                benchmark_version_id=version,
                benchmark="mc@1",
                metric="multiple_choice",
                purpose="baseline",
                source="run",
                value=float("nan"),
                scores=pack_bytes(scores),
            )
        )
    api.session.commit()
    query = {"subject_id": "tiny", "benchmark": "mc", "purpose": "baseline"}
    for include in ({"include": "items"}, {"include[]": "items"}):
        found = api.client.get("/v1/benchmark_results", params=query | include).json()["data"]
        assert len(found) == 1
        assert found[0]["subject"] == {"type": "base_model", "id": "tiny"}
        assert found[0]["value"] is None  # JSON has no NaN
        assert [(i["id"], i["score"]) for i in found[0]["items"]] == [
            ("i0", 1),
            ("i1", 0),
            ("i3", 1),
            ("i4", 0),
            ("i5", 1),
        ]
    assert api.client.get("/v1/benchmark_results", params={"include": "x"}).status_code == 400
    rival = api.client_of(make_project(api.session))
    assert rival.get("/v1/benchmark_results", params={"subject_id": "tiny"}).json()["data"] == []


def ended_job(api: Api, base: BaseModel, **fields: Any) -> Job:
    job = make_job(
        api.session, api.project, base_model_id=base.id, state=JobState.SUCCEEDED, suffix="bot"
    )
    checkpoint = make_checkpoint(api.session, job)
    job.report = {"checkpoint_id": str(checkpoint.id), "frontier": FRONTIER} | fields
    api.session.commit()
    return job


def test_a_point_of_the_frontier_is_published_as_a_pending_version(
    api: Api, base: BaseModel
) -> None:
    job = ended_job(api, base)
    path = f"/v1/fine_tuning/jobs/{public_id('job', job.id)}"
    assert api.client.get(f"{path}/frontier").json()["data"] == FRONTIER
    headers = {"idempotency-key": "k"}
    answer = api.client.post(f"{path}/publish", json={"alpha": 0.6}, headers=headers)
    assert answer.status_code == 200, answer.text
    model = answer.json()
    assert (model["status"], model["alpha"], model["root"]) == ("pending", 0.6, "tiny")
    assert model["id"].startswith("ft:tiny:acme:bot:")
    again = api.client.post(f"{path}/publish", json={"alpha": 0.6}, headers=headers)
    assert (again.json(), again.headers["idempotent-replayed"]) == (model, "true")
    export = api.session.scalars(select(Job).where(Job.kind == JobKind.EXPORT)).one()
    assert (export.state, export.spec["alpha"]) == (JobState.QUEUED, 0.6)
    assert model["export_job_id"] == public_id("export", export.id)
    assert api.session.scalars(select(OutboxMessage).where(OutboxMessage.job_id == export.id)).all()
    assert [j["id"] for j in api.client.get("/v1/fine_tuning/jobs").json()["data"]] == [
        public_id("job", job.id)
    ]
    assert api.client.get(f"/v1/models/{model['id']}").json()["status"] == "pending"
    pending = api.client.delete(f"/v1/models/{model['id']}")
    assert (pending.status_code, pending.json()["error"]["code"]) == (409, "model_pending")


@pytest.mark.parametrize(("alpha", "status"), [(0, 400), (1.1, 400), (1, 200)])
def test_the_base_itself_is_never_published(
    api: Api, base: BaseModel, alpha: float, status: int
) -> None:
    job = ended_job(api, base)
    path = f"/v1/fine_tuning/jobs/{public_id('job', job.id)}/publish"
    assert api.client.post(path, json={"alpha": alpha}).status_code == status


@pytest.mark.parametrize("told", [None, START, str(UUID(int=1))])
def test_without_a_tuned_checkpoint_nothing_is_published(
    api: Api, base: BaseModel, told: str | None
) -> None:
    job = ended_job(api, base, checkpoint_id=told)
    path = f"/v1/fine_tuning/jobs/{public_id('job', job.id)}/publish"
    answer = api.client.post(path, json={"alpha": 0.5})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_checkpoint")
    running = make_job(api.session, api.project, base_model_id=base.id)
    api.session.commit()
    path = f"/v1/fine_tuning/jobs/{public_id('job', running.id)}/publish"
    assert api.client.post(path, json={"alpha": 0.5}).json()["error"]["code"] == "job_not_ended"


def test_webhook_endpoints(api: Api) -> None:
    body = {
        "url": "https://example.com/hook",
        "event_types": ["fine_tuning.job.succeeded"],
        "name": "n",
    }
    headers = {"idempotency-key": "w"}
    made = api.client.post("/v1/webhook_endpoints", json=body, headers=headers).json()
    assert len(base64.b64decode(made["signing_secret"].removeprefix("whsec_"), validate=True)) == 32
    replay = api.client.post("/v1/webhook_endpoints", json=body, headers=headers).json()
    assert replay["id"] == made["id"]
    assert "signing_secret" not in replay  # never kept in plain text
    path = f"/v1/webhook_endpoints/{made['id']}"
    assert "signing_secret" not in api.client.get(path).json()
    assert api.client.post(path, json={"name": "new"}).json()["name"] == "new"
    rotation = f"{path}/rotate_secret"
    keeping = {"keep_old_secret_active_for_24_hours": True}
    rotated = api.client.post(rotation, json=keeping).json()
    assert rotated["signing_secret"] not in {None, made["signing_secret"]}
    refused = api.client.post(rotation)
    assert (refused.status_code, refused.json()["error"]["param"]) == (409, "force")
    assert api.client.post(rotation, json={"force": True}).status_code == 200
    assert api.client.get(f"{path}/deliveries").json()["data"] == []
    assert [e["id"] for e in api.client.get("/v1/webhook_endpoints").json()["data"]] == [made["id"]]
    assert "fine_tuning.job.succeeded" in api.client.get("/v1/webhook_event_types").json()["data"]
    for url, param in (("http://127.0.0.1/", "url"), ("ftp://x", "url")):
        refused = api.client.post("/v1/webhook_endpoints", json=body | {"url": url})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    deleted = api.client.delete(path).json()
    assert deleted == {"id": made["id"], "object": "webhook_endpoint.deleted", "deleted": True}
    assert api.client.get(path).status_code == 404


def test_a_job_shows_what_is_going_on(api: Api, base_with_general_data: BaseModel) -> None:
    made = api.submit(metadata={"a": "b"}).json()
    assert (
        made["retention"]["general_data"] is None
    )  # the operator's file is not the project's to name
    job = api.session.get_one(Job, parse_id("job", made["id"]))
    api.session.refresh(job)
    job.progress = {"step": 7, "finish_at": time.time() + 12.5, "phase": "training"}
    job.state, job.worker_id, job.lease_expires_at, job.attempt = (
        JobState.RUNNING,
        "w",
        job.created_at,
        1,
    )
    api.session.commit()
    shown = api.client.get(f"/v1/fine_tuning/jobs/{made['id']}").json()
    total = shown["training"]["total_steps"]
    assert shown["progress"] == {
        "step": 7,
        "total_steps": total,
        "percentage_done": pytest.approx(700 / total),
        "seconds_remaining": pytest.approx(12.0, abs=1),
        "phase": "training",
    }
    assert 11 < shown["estimated_finish"] - time.time() < 14
    job.progress = job.progress | {"finish_at": time.time() - 60}
    api.session.commit()
    overdue = api.client.get(f"/v1/fine_tuning/jobs/{made['id']}").json()
    assert overdue["estimated_finish"] >= time.time() - 1
    assert overdue["progress"]["seconds_remaining"] == 0
    job.move_to(JobState.QUEUED)
    job.worker_id = job.lease_expires_at = None
    api.session.commit()
    queued = api.client.get(f"/v1/fine_tuning/jobs/{made['id']}").json()
    assert queued["estimated_finish"] is queued["progress"]["seconds_remaining"] is None


def test_an_upload_with_a_key_is_kept_once(api: Api) -> None:
    answers = [
        api.client.post(
            "/v1/files",
            files={"file": ("f.jsonl", (json.dumps(CHAT) + "\n").encode())},
            data={"purpose": "fine-tune"},
            headers={"idempotency-key": "u"},
        )
        for _ in range(2)
    ]
    assert answers[0].json() == answers[1].json()
    assert len(api.stored_files()) == 1


def test_readiness_names_its_components(api: Api, redis_url: str) -> None:
    assert api.client.get("/readyz").json() == {"status": "ok", "components": {"database": "ok"}}
    for url, status in ((redis_url, "ok"), ("redis://127.0.0.1:9", "degraded")):
        told = api.settings.model_copy(update={"redis_url": url})
        old = api.app.state.resources
        api.app.state.resources = replace(old, settings=told)
        answer = api.client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (200, status)

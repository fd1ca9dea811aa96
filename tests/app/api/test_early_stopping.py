"""Early stopping on a benchmark through HTTP: asked for, refused, and told to trainers."""

import json
from typing import Any

import pytest
from sqlalchemy import select

from app.db.models import File, JobOrder
from app.domain.benchmarks import Scorer
from app.domain.identifiers import public_id
from app.domain.messages import Order
from app.domain.policy import EarlyStopping, Policy
from app.services.monitoring import record_evaluation
from tests.app.api.conftest import Api
from tests.external import point, registration, scores, store_benchmark
from tests.histories import ITEMS, evaluated, save_checkpoint, start_job


@pytest.mark.parametrize(("scorer", "better"), [("multiple_choice", -6), ("nll", 4)])
def test_a_run_whose_benchmark_stalls_is_told_to_stop(api: Api, scorer: str, better: int) -> None:
    store_benchmark(api.session, api.storage, api.project, "skill", scorer=scorer)
    stopping = {"metric": "skill", "patience": 2}
    policy = {"benchmarks": [{"name": "skill"}], "early_stopping": stopping}
    made = api.client.post("/v1/runs", json=registration(policy=policy)).json()
    assert made["policy"]["early_stopping"]["metric"] == "skill@1"
    path = f"/v1/runs/{made['id']}"

    def scored(by: int) -> dict[str, Any]:
        if scorer == "multiple_choice":
            return scores("skill", by) if by >= 0 else improved(-by)
        items = [{"id": f"i{n}", "score": 300.0 - by, "tokens": 100} for n in range(1000)]
        return {"benchmark": "skill", "items": items}

    def improved(by: int) -> dict[str, Any]:
        items = [{"id": f"i{n}", "score": float(n < 600 + by)} for n in range(1000)]
        return {"benchmark": "skill", "items": items}

    api.client.post(f"{path}/baseline", json={"scores": [scored(0)]})
    told = [
        api.client.post(
            f"{path}/evaluations",
            json=point(10 * number, valid_loss=9 - number) | {"scores": [scored(by)]},
        ).json()
        for number, by in enumerate([0, better, better, 0], start=1)
    ]
    assert [row["action"] for row in told] == ["keep", "keep", "keep", "stop"]
    assert told[-1]["code"] == "early_stopping"
    assert told[-1]["instructions"] == [{"type": "stop"}]


def test_results_posted_for_a_job_use_its_patience_up(api: Api) -> None:
    policy = Policy(early_stopping=EarlyStopping(metric="exact_match", patience=2))
    job, versions = start_job(
        api.session, project=api.project, scorers=(Scorer.EXACT_MATCH,), policy=policy
    )
    lines = (json.dumps({"id": f"i{n}", "question": "?"}) for n in range(ITEMS))
    file = api.session.get_one(File, versions[0].file_id)
    api.storage.put_bytes("\n".join(lines).encode(), file.path)
    save_checkpoint(api.session, job, 30)
    record_evaluation(api.session, job.id, 1, evaluated(versions))
    api.session.commit()
    result = {
        "subject": {"type": "fine_tuning.job", "id": public_id("job", job.id)},
        "benchmark": "exact_match",
        "items": [{"id": f"i{n}", "score": float(n < 1200)} for n in range(ITEMS)],
    }
    for step in (40, 50):
        answer = api.client.post(
            "/v1/benchmark_results", json={"results": [result | {"step": step}]}
        )
        assert answer.status_code == 200, answer.text
    shown = api.client.get(f"/v1/fine_tuning/jobs/{public_id('job', job.id)}/decisions").json()
    assert [row["code"] for row in shown["data"]] == ["early_stopping"] + ["within_limit"] * 2
    assert Order.model_validate(api.session.scalars(select(JobOrder)).one().order).stop


def test_a_metric_that_a_run_does_not_watch_is_refused(api: Api) -> None:
    store_benchmark(api.session, api.storage, api.project)
    policy = {"benchmarks": [{"name": "general"}], "early_stopping": {"metric": "skill"}}
    answer = api.client.post("/v1/runs", json=registration(policy=policy))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (
        400,
        "policy.early_stopping.metric",
        "unknown_metric",
    )
    assert api.client.get("/v1/runs").json()["data"] == []

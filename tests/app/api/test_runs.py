"""External runs over HTTP: scored as a job's own evaluations are, told what to do, and nobody else's business."""

from typing import Any

import pytest
from sqlalchemy import func, select

from app.db.models import BaseModel, DecisionRow, Evaluation, Job, WebhookEvent
from app.domain.scopes import Scope
from app.services.monitoring import replay_decision
from app.services.watched import require_benchmark
from tests.app.api.conftest import Api
from tests.external import point, registration, scores, store_benchmark
from tests.factories import make_project


@pytest.fixture
def benchmark(api: Api) -> Any:
    return store_benchmark(api.session, api.storage, api.project)


def register(api: Api, **rest: Any) -> Any:
    return api.client.post("/v1/runs", json=registration(**rest))


@pytest.fixture
def run(api: Api, benchmark: Any) -> str:
    """The path of a run whose baseline is posted."""
    path = f"/v1/runs/{register(api).json()['id']}"
    assert api.client.post(f"{path}/baseline", json={"scores": [scores()]}).status_code == 200
    return path


def evaluate(api: Api, run: str, *arguments: Any, **rest: Any) -> dict[str, Any]:
    answer = api.client.post(f"{run}/evaluations", json=point(*arguments, **rest))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(answer: Any) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


def test_a_run_is_registered_and_its_baseline_says_what_can_be_seen(
    api: Api, benchmark: Any
) -> None:
    made = register(api, name="nightly", total_steps=500, metadata={"team": "a"}).json()
    assert (made["object"], made["status"], made["model"]) == (
        "retention.run",
        "running",
        "our-own-7b",
    )
    (watched,) = made["policy"]["benchmarks"]
    assert (watched["name"], watched["weight"]) == ("general@1", 1.0)
    assert made["strengths"] == {"ewc": 1.0, "kl": 0.0}
    assert made["power"] is None
    path = f"/v1/runs/{made['id']}"
    body = {"scores": [scores()]}
    posted = api.client.post(f"{path}/baseline", json=body).json()
    assert 0 < posted["power"]["mean"]["regress_at_80"] < 0.5
    again = api.client.post(f"{path}/baseline", json=body)
    assert again.json()["power"] == posted["power"]
    assert api.client.get(path).json()["metadata"] == {"team": "a"}
    row = api.session.scalars(select(Evaluation)).one()
    assert (row.purpose, row.value, row.project_id) == ("baseline", 0.6, api.project.id)
    (job,) = api.session.scalars(select(Job)).all()
    assert (job.worker_id, job.lease_expires_at) == (None, None)
    assert api.client.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_drops_raise_then_roll_back_and_a_stop_ends_it(api: Api, run: str) -> None:
    kept = evaluate(api, run, 100)
    assert (kept["action"], kept["instructions"], kept["trigger"]["verdict"]) == (
        "keep",
        [],
        "pass",
    )
    raised = evaluate(api, run, 200, 42)
    assert raised["action"] == "raise_strength"
    assert raised["instructions"] == [{"type": "set_strength", "strategy": "ewc", "strength": 2.0}]
    assert raised["trigger"]["lower"] > raised["trigger"]["limit"]
    assert raised["alternatives"][0] == {
        "action": "repair",
        "why_not": "not possible for this run",
    }
    back = evaluate(api, run, 300, 200)
    assert back["code"] == "severe_drop"
    assert back["instructions"] == [
        {"type": "roll_back", "step": 100, "branch": 1},
        {"type": "set_strength", "strategy": "ewc", "strength": 8.0},
        {"type": "set_strength", "strategy": "kl", "strength": 0.0},
        {"type": "set_learning_rate", "scale": 0.5},
    ]
    shown = api.client.get(run).json()
    assert (shown["branch"], shown["step"], shown["strengths"]["ewc"]) == (1, 100, 8.0)
    missed = evaluate(api, run, 310)  # the trainer did not hear of it: branch 0 still
    assert missed["id"] == back["id"]
    gone = evaluate(api, run, 200, 200, branch=1, checkpoints=[])
    assert (gone["action"], gone["code"]) == ("stop", "could_not_hold")
    assert gone["instructions"] == [{"type": "stop"}]
    looks = api.session.scalars(select(DecisionRow.look).order_by(DecisionRow.seq)).all()
    assert looks == [1, 2, 3, 4]
    for row in api.session.scalars(select(DecisionRow)):
        assert replay_decision(row).model_dump(mode="json") == row.decision
    events = api.session.scalars(select(WebhookEvent).order_by(WebhookEvent.seq)).all()
    assert [event.type for event in events] == [
        "retention.regression_detected",
        "retention.strength_raised",
        "retention.regression_detected",
        "retention.rolled_back",
        "retention.regression_detected",
        "retention.stopped",
    ]
    assert all(event.payload["data"]["id"] == run.rpartition("/")[2] for event in events)
    messages = [event["message"] for event in api.client.get(f"{run}/events").json()["data"]]
    assert any(message.startswith("Step 300: roll_back.") for message in messages)


def test_what_lay_after_a_rollbacks_target_is_never_gone_back_to(api: Api, run: str) -> None:
    for step in (100, 200):
        evaluate(api, run, step)
    first = evaluate(api, run, 300, 200, checkpoints=[0, 100, 300])  # 200 was deleted
    assert first["instructions"][0] == {"type": "roll_back", "step": 100, "branch": 1}
    second = evaluate(api, run, 150, 200, branch=1)
    assert second["instructions"][0] == {"type": "roll_back", "step": 100, "branch": 2}
    third = evaluate(api, run, 160, 200, branch=2, checkpoints=[0])
    assert third["instructions"][0] == {"type": "roll_back", "step": 0, "branch": 3}


def test_an_armed_lever_is_activated_when_it_is_first(api: Api, benchmark: Any) -> None:
    policy = {"benchmarks": [{"name": "general"}], "lever": "kl"}
    path = f"/v1/runs/{register(api, policy=policy).json()['id']}"
    api.client.post(f"{path}/baseline", json={"scores": [scores()]})
    told = [evaluate(api, path, step, 42)["instructions"] for step in (10, 20)]
    assert told == [
        [{"type": "set_strength", "strategy": "kl", "strength": 0.5}],
        [{"type": "set_strength", "strategy": "kl", "strength": 1.0}],
    ]


def test_a_dry_run_tells_its_trainer_nothing_until_somebody_accepts(
    api: Api, benchmark: Any
) -> None:
    policy = {"benchmarks": [{"name": "general"}], "dry_run": True}
    path = f"/v1/runs/{register(api, policy=policy).json()['id']}"
    api.client.post(f"{path}/baseline", json={"scores": [scores()]})
    evaluate(api, path, 10)
    proposed = evaluate(api, path, 20, 200)
    assert (proposed["action"], proposed["state"], proposed["instructions"]) == (
        "roll_back",
        "proposed",
        [],
    )
    evaluate(api, path, 30)
    assert api.client.get(path).json()["branch"] == 0
    accept = f"{path}/decisions/{proposed['id']}/accept"
    made = api.client.post(accept, json={"reason": "do it"}).json()
    assert made["instructions"][0] == {"type": "roll_back", "step": 10, "branch": 1}
    assert made["ordered"]["reason"] == "do it"
    rows = api.client.get(f"{path}/decisions", params={"after": proposed["id"]}).json()["data"]
    assert [row["action"] for row in rows] == ["keep", "roll_back"]
    assert evaluate(api, path, 40)["id"] == made["id"]  # a trainer that did not hear of it
    order = {"action": "roll_back", "step": 30, "reason": "it was fine"}
    gone = api.client.post(f"{path}/decisions/{made['id']}/override", json=order)
    assert refused(gone) == (409, "step", "no_such_target")
    start = api.client.post(f"{path}/decisions/{made['id']}/override", json=order | {"step": 0})
    assert start.json()["instructions"][0] == {"type": "roll_back", "step": 0, "branch": 2}


def test_the_same_point_again_is_no_new_look(api: Api, run: str) -> None:
    first = evaluate(api, run, 100, 42)
    again = evaluate(api, run, 100, 200)  # whatever it says now
    assert again == first
    assert api.session.scalar(select(func.count()).select_from(DecisionRow)) == 1
    gates = select(func.count()).where(Evaluation.purpose == "gate")
    assert api.session.scalar(gates) == 1


def test_a_point_is_decided_on_once_with_all_its_benchmarks(api: Api, run: str) -> None:
    store_benchmark(api.session, api.storage, api.project, "second")
    policy = {"benchmarks": [{"name": "general"}, {"name": "second"}]}
    path = f"/v1/runs/{register(api, policy=policy).json()['id']}"
    both = [scores(), scores("second")]
    api.client.post(f"{path}/baseline", json={"scores": both})
    assert evaluate(api, path, 10)["trigger"]["verdict"] == "inconclusive"  # one is missing
    later = {"step": 10, "scores": [scores("second")]}
    answer = api.client.post(f"{path}/evaluations", json=later)
    assert refused(answer) == (409, "scores.0.benchmark", "point_already_decided")
    assert evaluate(api, path, 20, scores=both)["trigger"]["verdict"] == "pass"


def test_scores_that_are_no_numbers_and_nats_of_texts(api: Api) -> None:
    store_benchmark(api.session, api.storage, api.project, "texts", scorer="nll", chance=0.0)
    policy = {"benchmarks": [{"name": "texts"}]}
    path = f"/v1/runs/{register(api, policy=policy).json()['id']}"

    def nats(more: float, *, with_tokens: bool) -> dict[str, Any]:
        items = [{"id": f"i{n}", "score": 300 + n % 7 + more} for n in range(1000)]
        return {
            "benchmark": "texts",
            "items": [item | ({"tokens": 100} if with_tokens else {}) for item in items],
        }

    bare = api.client.post(f"{path}/baseline", json={"scores": [nats(0, with_tokens=False)]})
    assert refused(bare)[:2] == (400, "scores.0.items")
    api.client.post(f"{path}/baseline", json={"scores": [nats(0, with_tokens=True)]})
    passed = evaluate(api, path, 10, scores=[nats(0.5, with_tokens=False)])
    assert passed["trigger"] | {"alpha": 0} == passed["trigger"] | {"alpha": 0, "of": "texts@1"}
    assert passed["trigger"]["verdict"] == "pass"
    risen = evaluate(api, path, 20, scores=[nats(8, with_tokens=True)])
    assert (risen["trigger"]["verdict"], risen["action"]) == ("regress", "raise_strength")
    broken = nats(0, with_tokens=True)
    broken["items"][3]["score"] = None
    assert evaluate(api, path, 42, scores=[broken])["code"] == "not_finite"


def test_a_later_run_may_use_an_earlier_ones_baseline(api: Api, run: str) -> None:
    later = register(api, baseline=run.rpartition("/")[2]).json()
    assert later["power"] is not None
    assert evaluate(api, f"/v1/runs/{later['id']}", 10, 42)["action"] == "raise_strength"
    answer = api.client.post(f"/v1/runs/{later['id']}/baseline", json={"scores": [scores()]})
    assert refused(answer) == (409, "scores", "baseline_fixed")


def test_the_base_models_own_baseline_serves_once_it_is_known(
    api: Api, benchmark: Any, base: BaseModel
) -> None:
    answer = register(api, model="tiny", baseline="base_model")
    assert refused(answer) == (400, "baseline", "baseline_unknown")
    assert api.session.scalar(select(func.count()).select_from(Job)) == 0


def test_decisions_are_read_from_a_cursor_and_acknowledged(api: Api, run: str) -> None:
    first, second = evaluate(api, run, 100), evaluate(api, run, 200, 42)
    page = api.client.get(f"{run}/decisions").json()
    assert [row["id"] for row in page["data"]] == [first["id"], second["id"]]
    rest = api.client.get(f"{run}/decisions", params={"after": first["id"]}).json()
    assert [row["id"] for row in rest["data"]] == [second["id"]]
    empty = api.client.get(f"{run}/decisions", params={"after": second["id"]}).json()
    assert (empty["data"], empty["last_id"]) == ([], second["id"])
    path = f"{run}/decisions/{second['id']}/acknowledge"
    assert api.client.post(path, json={"step": 201}).json()["step"] == 201
    assert api.client.post(path, json={"step": 999}).json()["step"] == 201
    again = api.client.get(f"{run}/decisions", params={"include": "evidence"}).json()["data"]
    assert [row["acknowledged_step"] for row in again] == [None, 201]
    assert again[1]["evidence"]["look"]["step"] == 200
    nothing = api.client.post(f"{run}/decisions/{first['id']}/acknowledge", json={"step": 1})
    assert refused(nothing) == (409, "decision_id", "nothing_to_acknowledge")


def test_a_runs_scores_are_read_back_as_other_results_are(api: Api, run: str) -> None:
    evaluate(api, run, 10, 42)
    name = run.rpartition("/")[2]
    query = {"subject_id": name, "include": "items"}
    found = api.client.get("/v1/benchmark_results", params=query).json()["data"]
    assert [(row["purpose"], row["step"]) for row in found] == [("gate", 10), ("baseline", 0)]
    assert all(row["subject"] == {"type": "external_run", "id": name} for row in found)
    assert len(found[0]["items"]) == 1000
    assert len(api.client.get("/v1/benchmark_results").json()["data"]) == 2
    rival = api.client_of(make_project(api.session))
    assert rival.get("/v1/benchmark_results", params=query).status_code == 404
    assert rival.get("/v1/benchmark_results").json()["data"] == []


def test_what_the_project_requires_is_watched_by_its_runs_too(api: Api, benchmark: Any) -> None:
    store_benchmark(api.session, api.storage, api.project, "safety")
    require_benchmark(api.session, api.project.id, "safety", weight=2.0, limit=0.02)
    api.session.commit()
    made = register(api).json()
    names = {row["name"]: row["max_drop"] for row in made["policy"]["benchmarks"]}
    assert names == {"general@1": None, "safety@1": 0.02}


def test_a_finished_run_keeps_its_last_reading_and_takes_no_more(api: Api, run: str) -> None:
    evaluate(api, run, 100)
    done = api.client.post(f"{run}/finish", json={}).json()
    assert (done["status"], done["verdict"]["verdict"]) == ("succeeded", "pass")
    assert done["finished_at"] is not None
    assert api.client.post(f"{run}/finish", json={}).json() == done
    assert evaluate(api, run, 100)["action"] == "keep"  # what was decided is still told
    for path, body in (
        ("finish", {"status": "failed"}),
        ("evaluations", point(200)),
        ("baseline", {"scores": [scores()]}),
    ):
        answer = api.client.post(f"{run}/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "run_already_ended")


def test_runs_are_listed_newest_first_and_only_to_their_project(api: Api, run: str) -> None:
    second = register(api).json()["id"]
    page = api.client.get("/v1/runs", params={"limit": 1}).json()
    assert ([row["id"] for row in page["data"]], page["has_more"]) == ([second], True)
    rest = api.client.get("/v1/runs", params={"after": second}).json()
    assert [row["id"] for row in rest["data"]] == [run.rpartition("/")[2]]
    rival = api.client_of(make_project(api.session))
    assert rival.get("/v1/runs").json()["data"] == []
    assert rival.post("/v1/runs", json=registration()).status_code == 404  # no such benchmark there
    decision = evaluate(api, run, 10, 42)["id"]
    store_benchmark(api.session, api.storage, None, "shared")
    for method, path, body in (
        ("GET", run, None),
        ("GET", f"{run}/events", None),
        ("GET", f"{run}/decisions", None),
        ("POST", f"{run}/baseline", {"scores": [scores()]}),
        ("POST", f"{run}/evaluations", point(10)),
        ("POST", f"{run}/finish", {}),
        ("POST", f"{run}/decisions/{decision}/acknowledge", {"step": 1}),
    ):
        answer = rival.request(method, path, json=body)
        assert refused(answer)[:2] == (404, "run_id"), (method, path)
    policy = {"benchmarks": [{"name": "shared"}]}
    stolen = registration(policy=policy, baseline=run.rpartition("/")[2])
    assert refused(rival.post("/v1/runs", json=stolen)) == (404, "baseline", "baseline_unknown")
    results = rival.get("/v1/benchmark_results").json()["data"]
    assert results == []


def test_scopes_are_asked_for(api: Api, run: str) -> None:
    reader = api.client_of(api.project, Scope.JOBS_READ)
    assert reader.get(run).status_code == 200
    writer = api.client_of(api.project, Scope.JOBS_WRITE, Scope.RESULTS_WRITE)
    for path, body in (("baseline", {"scores": [scores()]}), ("evaluations", point(10))):
        answer = writer.post(f"{run}/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")
    assert reader.post(f"{run}/finish", json={}).status_code == 403
    assert reader.post("/v1/runs", json=registration()).status_code == 403
    assert writer.get(run).status_code == 403


def test_an_idempotency_key_registers_and_records_once(api: Api, run: str) -> None:
    head = {"idempotency-key": "k1"}
    one = api.client.post("/v1/runs", json=registration(), headers=head)
    two = api.client.post("/v1/runs", json=registration(), headers=head)
    assert one.json() == two.json()
    assert two.headers["idempotent-replayed"] == "true"
    other = api.client.post("/v1/runs", json=registration(name="x"), headers=head)
    assert other.status_code == 422


BAD_RUNS = [
    ({"model": ""}, "model"),
    ({"levers": [{"type": "ewc"}]}, "levers.0"),
    ({"levers": [{"type": "a b", "strength": 1}]}, "levers.0.type"),
    ({"levers": [{"type": "ewc", "strength": 1}] * 2}, "levers.1.type"),
    ({"levers": [{"type": "ewc", "strength": -1}]}, "levers.0.strength"),
    ({"levers": [{"type": "ewc", "strength": 2, "cap": 1}]}, "levers.0"),
    ({"levers": [{"type": "ewc", "armed": True}]}, "levers.0"),
    ({"policy": {"benchmarks": [{"name": "general"}], "lever": "mas"}}, "policy.lever"),
    ({"policy": {"benchmarks": [{"name": "general"}] * 2}}, "policy.benchmarks.1.name"),
    ({"policy": {"benchmarks": []}}, "policy.benchmarks"),
    ({"policy": {"max_drop": 2}}, "policy.max_drop"),
    ({"policy": None}, "policy.benchmarks"),
    ({"baseline": "other"}, "baseline"),
    ({"baseline": "base_model"}, "baseline"),
    ({"total_steps": 0}, "total_steps"),
    ({"surprise": 1}, "surprise"),
]


@pytest.mark.parametrize(("change", "param"), BAD_RUNS)
def test_what_cannot_be_registered_names_its_field(
    api: Api, benchmark: Any, change: dict[str, Any], param: str
) -> None:
    assert refused(register(api, **change))[:2] == (400, param)
    assert api.session.scalar(select(func.count()).select_from(Job)) == 0


def test_an_unknown_benchmark_or_baseline_is_a_404(api: Api, benchmark: Any) -> None:
    policy = {"benchmarks": [{"name": "nobody"}]}
    assert refused(register(api, policy=policy)) == (
        404,
        "policy.benchmarks.0.name",
        "benchmark_not_found",
    )
    assert refused(register(api, baseline="run_" + "0" * 32))[:2] == (404, "baseline")


BAD_SCORES: list[tuple[dict[str, Any], int, str]] = [
    ({"scores": []}, 400, "scores"),
    ({"scores": [scores("nobody")]}, 400, "scores.0.benchmark"),
    ({"scores": [scores(), scores("general@1")]}, 400, "scores.1.benchmark"),
    (
        {"scores": [{"benchmark": "general", "items": [{"id": "zz", "score": 1}]}]},
        400,
        "scores.0.items",
    ),
    (
        {"scores": [{"benchmark": "general", "items": [{"id": "i1", "score": 80}]}]},
        400,
        "scores.0.items",
    ),
    (
        {"scores": [{"benchmark": "general", "items": [{"id": "i1", "score": 1}] * 2}]},
        400,
        "scores.0",
    ),
    ({"scores": [{"benchmark": "general", "items": []}]}, 400, "scores.0.items"),
    ({"scores": [scores(suite_sha256="0" * 64)]}, 409, "scores.0.suite_sha256"),
]


@pytest.mark.parametrize(("change", "status", "param"), BAD_SCORES)
def test_scores_that_cannot_be_taken_name_their_field(
    api: Api, run: str, change: dict[str, Any], status: int, param: str
) -> None:
    fresh = f"/v1/runs/{register(api).json()['id']}"
    assert refused(api.client.post(f"{fresh}/baseline", json=change))[:2] == (status, param)
    body = {"step": 10} | change
    assert refused(api.client.post(f"{run}/evaluations", json=body))[:2] == (status, param)
    assert api.session.scalar(select(func.count()).select_from(DecisionRow)) == 0


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"step": 0}, 400, "step"),
        ({"branch": -1}, 400, "branch"),
        ({"branch": 1}, 409, "branch"),
        ({"valid_loss": "x"}, 400, "valid_loss"),
        ({"checkpoints": [-1]}, 400, "checkpoints.0"),
    ],
)
def test_points_that_cannot_be_name_their_field(
    api: Api, run: str, change: dict[str, Any], status: int, param: str
) -> None:
    answer = api.client.post(f"{run}/evaluations", json=point(10) | change)
    assert refused(answer)[:2] == (status, param)


def test_order_of_things_is_kept(api: Api, run: str) -> None:
    fresh = f"/v1/runs/{register(api).json()['id']}"
    early = api.client.post(f"{fresh}/evaluations", json=point(10))
    assert refused(early) == (409, "scores", "baseline_missing")
    null = {"benchmark": "general", "items": [{"id": "i1", "score": None}]}
    assert refused(api.client.post(f"{fresh}/baseline", json={"scores": [null]}))[:2] == (
        400,
        "scores.0.items",
    )
    other = api.client.post(f"{run}/baseline", json={"scores": [scores(lost=5)]})
    assert refused(other) == (409, "scores.0.items", "baseline_differs")
    evaluate(api, run, 10)
    late = api.client.post(f"{run}/baseline", json={"scores": [scores()]})
    assert refused(late) == (409, "scores", "baseline_closed")


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ({"wait": "-1"}, 400, "wait"),
        ({"wait": "x"}, 400, "wait"),
        ({"limit": 0}, 400, "limit"),
        ({"after": "x"}, 404, "after"),
        ({"after": "rdec_" + "0" * 32}, 404, "after"),
        ({"include": "all"}, 400, "include"),
    ],
)
def test_bad_queries_name_their_parameter(
    api: Api, run: str, query: dict[str, Any], status: int, param: str
) -> None:
    assert refused(api.client.get(f"{run}/decisions", params=query))[:2] == (status, param)

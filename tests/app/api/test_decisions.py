"""Decisions as people read them, order otherwise, and accept them."""

from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from app.db.models import DecisionRow, Job, JobOrder, WebhookEvent
from app.domain.decisions import Diagnosis
from app.domain.identifiers import public_id
from app.domain.messages import Order
from app.domain.policy import EarlyStopping, Ladder, Policy
from app.domain.replay import replay
from app.domain.scopes import Scope
from app.services.monitoring import record_evaluation
from tests.app.api.conftest import Api
from tests.factories import make_job, make_project
from tests.histories import POLICY, evaluated, save_checkpoint, start_job


class Told:
    """A running job of the client's project, and what its trainer was answered."""

    def __init__(self, api: Api, policy: Policy = POLICY) -> None:
        self.api, self.session = api, api.session
        self.job, self.versions = start_job(self.session, project=api.project, policy=policy)
        self.session.commit()
        self.path = f"/v1/fine_tuning/jobs/{public_id('job', self.job.id)}/decisions"

    def evaluate(self, step: int, lost: int = 0, *, branch: int = 0, **rest: Any) -> str:
        """A look; gives the decision's path."""
        save_checkpoint(self.session, self.job, step, branch=branch)
        message = evaluated(self.versions, step, branch=branch, lost=lost, **rest)
        record_evaluation(self.session, self.job.id, 1, message)
        self.job.step = max(self.job.step, step)
        self.session.commit()
        return f"{self.path}/{self.api.client.get(self.path).json()['data'][0]['id']}"

    def orders(self) -> list[Order]:
        rows = self.session.scalars(select(JobOrder).order_by(JobOrder.version))
        return [Order.model_validate(row.order) for row in rows]


@pytest.fixture
def told(api: Api) -> Told:
    return Told(api)


def order(told: Told, path: str, **body: Any) -> Any:
    return told.api.client.post(f"{path}/override", json={"reason": "I know better"} | body)


def refused(answer: Any) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


def test_a_decision_shows_what_set_it_off_and_what_else_was_open(told: Told) -> None:
    decision = told.evaluate(30, 80).rpartition("/")[2]
    shown = told.api.client.get(f"/v1/decisions/{decision}").json()
    assert shown["subject_id"] == public_id("job", told.job.id)
    trigger = shown["trigger"]
    assert (trigger["of"], trigger["verdict"], trigger["look"]) == ("general_mean", "regress", 1)
    assert trigger["lower"] > trigger["limit"] == 0.03
    assert trigger["drop"] == pytest.approx(80 / 1200)
    assert shown["alternatives"] == [
        {"action": "repair", "why_not": "off by policy"},
        {"action": "roll_back", "why_not": None},
    ]
    assert (shown["lever"], shown["ordered"], shown["evidence"]) == ("ewc", None, None)
    whole = told.api.client.get(f"/v1/decisions/{decision}", params={"include": "evidence"}).json()
    assert replay(whole["evidence"]).model_dump(mode="json") == whole["decision"]
    rival = told.api.client_of(make_project(told.session))
    assert rival.get(f"/v1/decisions/{decision}").status_code == 404


def test_a_diagnosis_is_shown_told_and_replayed(api: Api) -> None:
    told = Told(api, Policy())
    found = Diagnosis(
        benchmarks=("multiple_choice",),
        n_items=400,
        drop=2.2,
        share=0.1,
        lower=0.0,
        upper=0.2,
        steps=8,
        rows=128,
        rate=1.0,
        held_before=2.0,
        held_after=1.5,
        seconds=3.0,
    )
    path = told.evaluate(30, 80, diagnosis=found)
    shown = api.client.get(path.replace(told.path, "/v1/decisions")).json()
    assert shown["action"] == "raise_strength"  # with the same policy repair comes first without it
    assert shown["diagnosis"] == {"kind": "knowledge", **found.model_dump(mode="json")}
    assert shown["details"] == {}
    assert "Diagnosis: knowledge, 10% of the drop came back" in shown["reason"]
    whole = api.client.get(f"/v1/decisions/{shown['id']}", params={"include": "evidence"}).json()
    assert replay(whole["evidence"]).model_dump(mode="json") == whole["decision"]
    (event,) = [
        e
        for e in api.client.get(told.path.replace("decisions", "events")).json()["data"]
        if e["data"].get("code") == "decision"
    ]
    assert event["data"]["decision"]["diagnosis"]["kind"] == "knowledge"
    assert "Diagnosis: knowledge" in event["message"]


def test_without_a_regression_no_diagnosis_is_kept(told: Told) -> None:
    path = told.evaluate(30, 0, diagnosis=Diagnosis(reason="the scores were read otherwise"))
    shown = told.api.client.get(path.replace(told.path, "/v1/decisions")).json()
    assert (shown["action"], shown["diagnosis"]) == ("keep", None)


def test_a_strength_is_set_by_a_person_and_told_to_the_trainer(told: Told) -> None:
    path = told.evaluate(30, 80)
    answer = order(told, path, action="set_strength", strategy="ewc", strength=0.25)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    key = told.api.client.headers["authorization"].split("_")[2]
    assert made["origin"] == f"override:{key}:1"
    assert made["ordered"] == {
        "by": key,
        "reason": "I know better",
        "decision_id": path.rpartition("/")[2],
    }
    assert (made["action"], made["before"]["strengths"], made["after"]["strengths"]) == (
        "lower_strength",
        {"ewc": 2.0},
        {"ewc": 0.25},
    )
    (given,) = told.orders()
    assert (given.version, given.branch, given.state.strengths) == (1, 0, {"ewc": 0.25})
    assert (given.stop, given.roll_back) == (False, None)
    listed = told.api.client.get(told.path).json()["data"]
    assert [(row["action"], row["state"]) for row in listed] == [
        ("lower_strength", "applied"),
        ("raise_strength", "overridden"),
    ]
    events = told.session.scalars(select(WebhookEvent.type).order_by(WebhookEvent.seq)).all()
    assert events[-2:] == ["retention.overridden", "retention.strength_lowered"]
    assert events.count("retention.regression_detected") == 1
    told.evaluate(60, 80)  # an order is no look, and the controller goes on from it
    rows = told.session.scalars(select(DecisionRow).order_by(DecisionRow.seq)).all()
    assert [row.look for row in rows] == [1, 1, 2]
    assert rows[2].decision["state"]["strengths"] == {"ewc": 0.5}
    for row in rows:
        assert replay(row.evidence).model_dump(mode="json") == row.decision


def test_a_raise_is_undone_while_it_is_still_in_force(told: Told) -> None:
    raised = told.evaluate(30, 80)
    made = order(told, raised, action="keep_training").json()
    assert (made["action"], made["after"]["strengths"]) == ("keep", {"ewc": 1.0})
    assert told.orders()[0].state.strengths == {"ewc": 1.0}
    again = order(told, raised, action="keep_training")
    assert refused(again) == (409, "action", "changed_since")
    calm = told.evaluate(60)
    assert refused(order(told, calm, action="keep_training")) == (
        409,
        "action",
        "nothing_to_change",
    )


def test_a_job_is_sent_back_to_a_valid_checkpoint_and_its_trainer_catches_up(told: Told) -> None:
    told.evaluate(30)
    path = told.evaluate(60)
    (first, second) = told.api.client.get(
        told.path.replace("decisions", "checkpoints"), params={"order": "asc"}
    ).json()["data"][::-1]
    made = order(told, path, action="roll_back", checkpoint=first["id"]).json()
    assert (made["action"], made["target_checkpoint_id"]) == ("roll_back", first["id"])
    told.session.refresh(told.job)
    assert (told.job.branch, told.job.step) == (1, 30)
    (given,) = told.orders()
    assert given.roll_back is not None
    assert (given.roll_back.step, given.roll_back.branch, given.branch) == (30, 1, 0)
    assert given.roll_back.checkpoint_directory
    late = record_evaluation(told.session, told.job.id, 1, evaluated(told.versions, 90))
    assert late.roll_back == given.roll_back
    answer = order(told, path, action="roll_back", checkpoint=second["id"])
    assert refused(answer) == (409, "checkpoint", "no_such_target")  # it is superseded
    start = order(told, path, action="roll_back", step=0).json()
    assert (start["after"]["branch"], start["target_checkpoint_id"]) == (2, None)
    undo = order(told, f"{told.path}/{start['id']}", action="keep_training")
    assert refused(undo) == (409, "action", "cannot_be_undone")


def test_a_job_is_stopped_and_what_ended_takes_no_orders(told: Told) -> None:
    path = told.evaluate(30)
    made = order(told, path, action="stop").json()
    assert (made["action"], made["code"], told.orders()[0].stop) == ("stop", "override_stop", True)
    other = make_job(told.session, told.api.project)
    told.session.commit()
    foreign = path.replace(public_id("job", told.job.id), public_id("job", other.id))
    assert refused(order(told, foreign, action="stop"))[:2] == (404, "decision_id")
    told.session.execute(
        text("UPDATE jobs SET state = 'queued', worker_id = NULL, lease_expires_at = NULL")
    )
    told.session.commit()
    assert refused(order(told, path, action="stop")) == (409, "status", "not_running")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"action": "fly"}, 400, "action"),
        ({}, 400, "action"),
        ({"action": "stop", "reason": ""}, 400, "reason"),
        ({"action": "stop", "reason": None}, 400, "reason"),
        ({"action": "stop", "strength": 1}, 400, "strength"),
        ({"action": "set_strength", "strength": 1}, 400, "strategy"),
        ({"action": "set_strength", "strategy": "ewc", "strength": -1}, 400, "strength"),
        ({"action": "set_strength", "strategy": "mas", "strength": 1}, 400, "strategy"),
        ({"action": "set_strength", "strategy": "ewc", "strength": 1e9}, 400, "strength"),
        ({"action": "set_strength", "strategy": "ewc", "strength": 1}, 409, "strength"),
        ({"action": "roll_back"}, 400, None),
        ({"action": "roll_back", "step": 1, "checkpoint": "x"}, 400, None),
        ({"action": "roll_back", "step": 31}, 409, "step"),
        ({"action": "roll_back", "checkpoint": "ftckpt_x"}, 404, "checkpoint"),
        ({"action": "roll_back", "checkpoint": "ftckpt_" + "0" * 32}, 409, "checkpoint"),
    ],
)
def test_an_order_that_cannot_be_names_its_field(
    told: Told, body: dict[str, Any], status: int, param: str | None
) -> None:
    path = told.evaluate(30)
    assert refused(order(told, path, **body))[:2] == (status, param)
    assert told.orders() == []


def test_orders_want_the_right_to_change_jobs(told: Told) -> None:
    path = told.evaluate(30)
    reader = told.api.client_of(told.api.project, Scope.JOBS_READ)
    for word, body in (("override", {"action": "stop", "reason": "r"}), ("accept", {})):
        assert reader.post(f"{path}/{word}", json=body).status_code == 403
    head = {"idempotency-key": "once"}
    body = {"action": "stop", "reason": "r"}
    one = told.api.client.post(f"{path}/override", json=body, headers=head).json()
    assert told.api.client.post(f"{path}/override", json=body, headers=head).json() == one
    assert len(told.orders()) == 1


def test_what_was_decided_cannot_be_rewritten(told: Told) -> None:
    told.evaluate(30, 80)
    for change in ("SET reason = 'x'", "SET evidence = '{}'", "SET look = 9"):
        with pytest.raises(IntegrityError, match="written for good"), told.session.begin_nested():
            told.session.execute(text(f"UPDATE decisions {change}"))
    with pytest.raises(IntegrityError, match="written for good"), told.session.begin_nested():
        told.session.execute(text("DELETE FROM decisions"))


def test_what_was_applied_is_no_proposal(told: Told) -> None:
    path = told.evaluate(30, 80)
    answer = told.api.client.post(f"{path}/accept", json={})
    assert refused(answer) == (409, "decision_id", "not_proposed")
    assert told.session.get_one(Job, told.job.id).order_version == 0


DRY = Policy(ladder=Ladder(repair=False), dry_run=True)


@pytest.fixture
def dry(api: Api) -> Told:
    return Told(api, DRY)


def test_a_dry_run_only_proposes(dry: Told) -> None:
    raised = dry.evaluate(30, 80)
    back = dry.evaluate(60, 300)
    dry.session.refresh(dry.job)
    assert (dry.job.branch, dry.job.order_version) == (0, 0)
    assert dry.job.controller_state is not None
    assert dry.job.controller_state["strengths"] == {"ewc": 1.0}
    assert (dry.job.controller_state["evals"], dry.job.controller_state["rollbacks"]) == (2, 0)
    rows = dry.session.scalars(select(DecisionRow).order_by(DecisionRow.seq)).all()
    assert [(row.action, row.state, row.reply["action"]) for row in rows] == [
        ("raise_strength", "proposed", "keep"),
        ("roll_back", "proposed", "keep"),
    ]
    assert all(row.reply["roll_back"] is None and not row.reply["finish"] for row in rows)
    assert rows[0].reply["state"]["strengths"] == {"ewc": 1.0}
    assert rows[1].target_checkpoint_id is None
    for row in rows:
        assert replay(row.evidence).model_dump(mode="json") == row.decision
    shown = dry.api.client.get(dry.path).json()["data"]
    assert [(row["state"], row["after"]["strengths"]["ewc"]) for row in shown] == [
        ("proposed", 4.0),
        ("proposed", 2.0),
    ]
    events = dry.session.scalars(select(WebhookEvent.type).order_by(WebhookEvent.seq)).all()
    assert events == ["retention.regression_detected", "retention.proposed"] * 2
    log = dry.api.client.get(dry.path.replace("decisions", "events")).json()["data"]
    assert any(event["message"].startswith("Step 30: proposed raise_strength.") for event in log)
    assert raised != back


def test_a_dry_run_proposes_an_early_stop_once_and_it_can_be_accepted(api: Api) -> None:
    dry = Told(api, DRY.model_copy(update={"early_stopping": EarlyStopping(patience=2)}))
    paths = [dry.evaluate(step) for step in (30, 60)]
    paths += [dry.evaluate(90, 80)]  # a raise is proposed, and the look counts
    paths += [dry.evaluate(step) for step in (120, 150)]
    shown = api.client.get(dry.path).json()["data"][::-1]
    assert [(row["action"], row["state"]) for row in shown] == [
        ("keep", "applied"),
        ("keep", "applied"),
        ("raise_strength", "proposed"),
        ("stop", "proposed"),
        ("keep", "applied"),
    ]
    assert "for 3 evaluations. A dry run: training goes on" in shown[3]["reason"]
    rows = dry.session.scalars(select(DecisionRow).order_by(DecisionRow.seq)).all()
    assert not any(row.reply["finish"] for row in rows)
    events = dry.session.scalars(select(WebhookEvent.type).order_by(WebhookEvent.seq)).all()
    assert events.count("retention.proposed") == 2
    answer = api.client.post(f"{paths[3]}/accept", json={})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["action"], answer.json()["code"]) == ("stop", "early_stopping")
    assert [order.stop for order in dry.orders()] == [True]
    for row in dry.session.scalars(select(DecisionRow)):
        assert replay(row.evidence).model_dump(mode="json") == row.decision


def test_a_proposal_is_accepted_while_it_applies(dry: Told) -> None:
    first = dry.evaluate(30, 80)
    second = dry.evaluate(60, 80)
    answer = dry.api.client.post(f"{first}/accept", json={"reason": "yes"})
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert (made["action"], made["state"], made["after"]["strengths"]) == (
        "raise_strength",
        "applied",
        {"ewc": 2.0},
    )
    assert made["origin"].startswith("accept:")
    assert made["ordered"]["reason"] == "yes"
    (given,) = dry.orders()
    assert (given.state.strengths, given.roll_back) == ({"ewc": 2.0}, None)
    again = dry.api.client.post(f"{first}/accept", json={})
    assert refused(again) == (409, "decision_id", "not_proposed")
    stale = dry.api.client.post(f"{second}/accept", json={})  # made at strength 1
    assert refused(stale) == (409, "decision_id", "not_applicable")
    rows = dry.session.scalars(select(DecisionRow).order_by(DecisionRow.seq)).all()
    assert [(row.state, row.look) for row in rows] == [
        ("accepted", 1),
        ("proposed", 2),
        ("applied", 1),
    ]
    for row in rows:
        assert replay(row.evidence).model_dump(mode="json") == row.decision
    dry.evaluate(90, 80)
    newest = dry.session.scalars(select(DecisionRow).order_by(DecisionRow.seq.desc())).first()
    assert newest is not None
    assert (newest.look, newest.evidence["state"]["strengths"]) == (3, {"ewc": 2.0})


def test_a_proposed_rollback_is_accepted_and_voids_what_was_proposed_on_the_branch(
    dry: Told,
) -> None:
    dry.evaluate(30)
    raised, back = dry.evaluate(60, 80), dry.evaluate(90, 300)
    made = dry.api.client.post(f"{back}/accept", json={}).json()
    dry.session.refresh(dry.job)
    assert (made["action"], dry.job.branch, dry.job.step) == ("roll_back", 1, 30)
    (given,) = dry.orders()
    assert given.roll_back is not None
    assert (given.roll_back.step, given.state.strengths) == (30, {"ewc": 4.0})
    late = record_evaluation(dry.session, dry.job.id, 1, evaluated(dry.versions, 120))
    assert late.roll_back == given.roll_back
    answer = dry.api.client.post(f"{raised}/accept", json={})
    assert refused(answer) == (409, "decision_id", "not_applicable")


def test_a_proposal_to_go_back_to_what_is_gone_is_refused(dry: Told) -> None:
    good = dry.evaluate(30)
    back = dry.evaluate(90, 300)
    dry.session.execute(text("UPDATE checkpoints SET corrupt = true WHERE step = 30"))
    dry.session.commit()
    answer = dry.api.client.post(f"{back}/accept", json={})
    assert refused(answer) == (409, "decision_id", "not_applicable")
    calm = dry.api.client.post(f"{good}/accept", json={})
    assert refused(calm) == (409, "decision_id", "not_proposed")
    long = dry.api.client.post(f"{back}/accept", json={"reason": "x" * 1001})
    assert refused(long)[:2] == (400, "reason")

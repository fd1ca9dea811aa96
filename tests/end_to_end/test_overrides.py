"""People against the controller, through HTTP and a real worker: a proposal accepted, a strength set, a stop."""

import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import httpx
import pytest

from app.db.models import Checkpoint, JobOrder
from app.db.session import transaction
from app.domain.configs.quadratic import L2SpConfig
from app.domain.identifiers import public_id
from app.domain.policy import EarlyStopping, Ladder, Policy, WatchedBenchmark
from app.domain.scopes import DEFAULT_SCOPES
from app.domain.states import JobState
from app.embedded import Endpoints
from app.services.keys import create_key
from tests.end_to_end.stack import Stack, running_stack
from tests.factories import make_spec, make_training
from tests.serving import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with running_stack(servers, template_url, tmp_path_factory.mktemp("overrides")) as stack:
        yield stack


def submit(stack: Stack) -> UUID:
    """A job that forgets at once, under a policy that only proposes."""
    policy = Policy(
        benchmarks=(WatchedBenchmark(name=stack.benchmark),),
        eval_interval=10,
        gate_items=20,
        ladder=Ladder(
            repair=False, rollback_strength_factor=1000.0, rollback_learning_rate_factor=0.01
        ),
        early_stopping=EarlyStopping(enabled=False),
        dry_run=True,
    )
    training = make_training(
        total_steps=20_000,
        learning_rate=1e-2,
        batch_size=16,
        max_seq_length=128,
        max_tokens_per_micro_batch=2048,
    )
    spec = make_spec(training=training, strategies=(L2SpConfig(strength=0.01),), policy=policy)
    return stack.submit(spec)


def test_a_proposal_is_accepted_a_strength_set_and_the_job_stopped(stack: Stack) -> None:
    job_id = submit(stack)
    with transaction(stack.factory) as session:
        project = stack.job(job_id).project_id
        key = create_key(session, project_id=project, name="k", scopes=DEFAULT_SCOPES).text
    head = {"authorization": f"Bearer {key}"}
    with (
        serving(stack.settings, stack.factory) as url,
        httpx.Client(base_url=f"{url}/v1", headers=head, timeout=30) as client,
    ):
        path = f"/fine_tuning/jobs/{public_id('job', job_id)}/decisions"

        def decisions() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = client.get(path, params={"limit": 100}).json()["data"]
            return found

        def ask(decision: str, word: str, **body: Any) -> dict[str, Any]:
            answer = client.post(f"{path}/{decision}/{word}", json=body)
            assert answer.status_code == 200, answer.text
            made: dict[str, Any] = answer.json()
            return made

        def took_effect(version: int) -> JobOrder | None:
            orders = {row.version: row for row in stack.rows(JobOrder, job_id)}
            order: JobOrder | None = orders.get(version)
            return order if order is not None and order.effective_step is not None else None

        proposed = stack.wait(lambda: decisions()[-1:], "a decision")[0]
        assert (proposed["action"], proposed["state"]) == ("roll_back", "proposed")
        stack.wait(lambda: len(decisions()) > 2, "the job to train on")
        assert stack.job(job_id).branch == 0

        # The trainer hears of it as an order, or as the answer to the evaluation it is in.
        accepted = ask(proposed["id"], "accept", reason="it is right")
        assert stack.job(job_id).branch == 1
        assert accepted["after"]["strengths"]["l2sp"] == pytest.approx(10)

        latest = stack.wait(
            lambda: [row for row in decisions() if row["branch"] == 1 and row["origin"] == "run"],
            "a look on the new branch",
        )[0]
        assert latest["before"]["strengths"]["l2sp"] == pytest.approx(10)
        ask(
            latest["id"],
            "override",
            action="set_strength",
            strategy="l2sp",
            strength=3.0,
            reason="less will do",
        )
        stack.wait(lambda: took_effect(2), "the strength")
        now = stack.wait(
            lambda: [row for row in decisions() if row["before"]["strengths"]["l2sp"] == 3.0],
            "a look at that strength",
        )[0]
        began = time.monotonic()
        ask(now["id"], "override", action="stop", reason="enough")
        job = stack.ends(job_id)
        assert time.monotonic() - began < 60
    assert job.state in {JobState.SUCCEEDED, JobState.FAILED}
    assert job.step < 20_000
    assert all(
        row.superseded for row in stack.rows(Checkpoint, job_id) if row.branch == 0 and row.step
    )

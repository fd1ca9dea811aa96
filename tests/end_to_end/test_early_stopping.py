"""A benchmark that stalls stops a real job after exactly its patience, though its trainer is killed between looks."""

import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from app.db.session import transaction
from app.domain.configs.quadratic import L2SpConfig
from app.domain.identifiers import public_id
from app.domain.policy import EarlyStopping, Ladder, Policy, WatchedBenchmark
from app.domain.scopes import DEFAULT_SCOPES
from app.domain.states import JobState
from app.embedded import Endpoints
from app.services.keys import create_key
from tests.end_to_end.stack import Stack, running_stack, trainers
from tests.factories import make_spec, make_training
from tests.serving import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PATIENCE = 6


@pytest.fixture
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with running_stack(servers, template_url, tmp_path_factory.mktemp("stopping")) as stack:
        yield stack


def test_a_stalled_benchmark_stops_a_job_whose_trainer_was_killed(stack: Stack) -> None:
    policy = Policy(
        benchmarks=(WatchedBenchmark(name=stack.benchmark),),
        max_nll_increase=1e6,
        eval_interval=10,
        gate_items=20,
        ladder=Ladder(repair=False, lower_factor=1.0),
        # No look after the first is better by so much, so how fast the model learns does not matter here.
        early_stopping=EarlyStopping(metric="digits", patience=PATIENCE, min_delta=1e3),
    )
    training = make_training(
        total_steps=20_000,
        learning_rate=1e-3,
        batch_size=16,
        max_seq_length=128,
        max_tokens_per_micro_batch=2048,
    )
    spec = make_spec(training=training, strategies=(L2SpConfig(strength=0.1),), policy=policy)
    job_id = stack.submit(spec)
    with transaction(stack.factory) as session:
        project = stack.job(job_id).project_id
        key = create_key(session, project_id=project, name="k", scopes=DEFAULT_SCOPES).text
    head = {"authorization": f"Bearer {key}"}
    with (
        serving(stack.settings, stack.factory) as url,
        httpx.Client(base_url=f"{url}/v1", headers=head, timeout=30) as client,
    ):
        path = f"/fine_tuning/jobs/{public_id('job', job_id)}/decisions"
        query: dict[str, str] = {"limit": "100", "include": "evidence"}
        stack.wait(lambda: client.get(path).json()["data"], "a decision")
        for pid in trainers(job_id):
            os.kill(pid, signal.SIGKILL)
        job = stack.ends(job_id)
        made = client.get(path, params=query).json()["data"][::-1]
    assert job.state is JobState.SUCCEEDED, job.error
    stack.check_history(job_id, attempts=2)
    assert [row["step"] for row in made] == [10 * number for number in range(1, PATIENCE + 2)]
    assert [row["action"] for row in made] == ["keep"] * PATIENCE + ["stop"]
    assert made[-1]["code"] == "early_stopping"
    assert f"for {PATIENCE} evaluations" in made[-1]["reason"]
    metrics = [row["evidence"]["look"]["metric"] for row in made]
    assert {(one["name"], one["higher_is_better"]) for one in metrics} == {("digits@1", False)}
    assert job.step < 20_000

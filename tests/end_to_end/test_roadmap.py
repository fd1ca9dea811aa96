"""The roadmap preset from submit to a published student, by real workers, and killed in its later phases."""

import json
import os
import signal
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from app.db.models import BaseModel, Checkpoint, DecisionRow, File, Job, JobEvent, ModelVersion
from app.db.session import transaction
from app.domain.identifiers import public_id
from app.domain.spec import CreateJob, JobSpec
from app.domain.states import JobState
from app.embedded import Endpoints
from app.services.control import request_cancel
from app.services.storage import Storage
from app.services.submission import submit_job
from tests.end_to_end.stack import Stack, running_stack, trainers

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with running_stack(servers, template_url, tmp_path_factory.mktemp("roadmap")) as stack:
        yield stack


def submit(stack: Stack) -> UUID:
    with transaction(stack.factory) as session:
        files = {
            name: public_id("file", stack.ids[name]) for name in ("rows", "validation", "general")
        }
        body = {
            "model": session.get_one(BaseModel, stack.ids["base"]).name,
            "training_file": files["rows"],
            "validation_file": files["validation"],
            "preset": "roadmap",
            "hyperparameters": {"n_epochs": 3, "batch_size": 20},
            "seed": 3,
            "training": {
                "type": "full",
                "learning_rate": 1e-3,
                "max_seq_length": 128,
                "checkpoint_interval": 4,
            },
            "retention": {
                "general_data": files["general"],
                "policy": {
                    "benchmarks": [{"name": stack.benchmark}],
                    "eval_interval": 10,
                    "gate_items": 20,
                    "max_nll_increase": 3.0,
                    "on_inconclusive": "publish",
                },
            },
            "resources": {"num_gpus": 0},
        }
        return submit_job(session, stack.ids["project"], CreateJob.model_validate(body)).id


def outcome(stack: Stack, job_id: UUID) -> dict[str, Any]:
    job = stack.ends(job_id)
    assert job.state is JobState.SUCCEEDED, (job.error, stack.log.read_text()[-4000:])
    with transaction(stack.factory) as session:
        version = session.get_one(ModelVersion, job.model_version_id)
    storage = Storage(stack.settings.storage_root)
    return {
        "weights": storage.read_bytes(f"{version.path}/model.safetensors"),
        "config": json.loads(storage.read_bytes(f"{version.path}/config.json")),
        "kind": version.kind,
        "retention": version.retention,
    }


@pytest.fixture(scope="module")
def finished(stack: Stack) -> tuple[UUID, dict[str, Any]]:
    job_id = submit(stack)
    return job_id, outcome(stack, job_id)


def test_every_phase_is_gated_and_the_student_is_published(
    stack: Stack, finished: tuple[UUID, dict[str, Any]]
) -> None:
    job_id, found = finished
    job = stack.job(job_id)
    spec = JobSpec.model_validate(job.spec)
    ends = [20, 30]
    assert [s.name for s in spec.stages] == ["regularised", "adapter"]
    decisions = {(d.branch, d.step): d for d in stack.rows(DecisionRow, job_id)}
    assert {step for _, step in decisions} >= set(ends)
    looks = [d.evidence["look"] for d in decisions.values()]
    assert all([s["last_step"] for s in look["stages"]] == ends for look in looks)
    codes = {(e.data or {}).get("code"): e.data for e in stack.rows(JobEvent, job_id)}
    assert codes["base_snapshot"]["sha256"]
    facts = codes.get("student_distilled")
    assert facts is not None, codes.keys()
    assert facts["parameters"]["student"] < facts["parameters"]["teacher"]
    assert (found["kind"], found["config"]["num_hidden_layers"]) == ("full", 1)
    assert found["retention"] in {"held", "unproven"}
    saved = {c.step for c in stack.rows(Checkpoint, job_id)}
    assert saved >= set(ends)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["adapter", "student"])
def test_a_roadmap_killed_in_a_late_phase_ends_as_if_nothing_had_been(
    stack: Stack, finished: tuple[UUID, dict[str, Any]], phase: str
) -> None:
    job_id = submit(stack)
    if phase == "adapter":
        stack.saves(job_id, 24, branch=0)
    else:
        stack.wait(
            lambda: (stack.job(job_id).progress or {}).get("phase") == "student", "the student"
        )
    for pid in trainers(job_id):
        os.kill(pid, signal.SIGKILL)
    assert outcome(stack, job_id) == finished[1]
    assert stack.job(job_id).attempt == 2


def test_a_stages_file_cannot_be_deleted_while_its_job_waits(stack: Stack) -> None:
    from app.db.repositories.files import FileRepository

    job_id = submit(stack)
    with transaction(stack.factory) as session:
        file = session.get_one(File, stack.ids["rows"])
        job = session.get_one(Job, job_id)
        job.training_file_id = stack.ids["validation"]  # the stages alone name it now
        session.flush()
        use = f"jobs that have not ended: {public_id('job', job_id)}"
        assert FileRepository(session).find_use(file) == use
        job.training_file_id = stack.ids["rows"]
        request_cancel(session, project_id=job.project_id, job_id=job_id)
    stack.ends(job_id)

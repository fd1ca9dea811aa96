"""The official openai client against a real server on loopback: nothing in it is changed or patched."""

import io
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import openai
import pytest
import uvicorn
from openai.types.fine_tuning import FineTuningJob

from app.db.models import Job, Project
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import parse_id, public_id
from app.domain.states import CheckpointStatus, JobState
from app.main import create_app
from app.services.engine import claim_job
from app.services.events import add_job_event
from app.services.keys import create_key
from app.settings import Settings
from tests.factories import (
    make_base_model,
    make_checkpoint,
    make_file,
    make_job,
    make_model_version,
    make_project,
)

ROWS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
    for n in range(40)
]
MANY = b"x" * 70_000


class Stand(NamedTuple):
    """A running server with a project's client, and what stands behind it."""

    client: openai.OpenAI
    factory: SessionFactory
    project_id: UUID
    base_url: str
    settings: Settings


@pytest.fixture
def stand(committed_factory: SessionFactory, settings: Settings) -> Iterator[Stand]:
    limited = settings.model_copy(update={"max_upload_bytes": 200_000})
    app = create_app(limited, committed_factory)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    base_url = f"http://127.0.0.1:{port}/v1"
    with transaction(committed_factory) as session:
        project = make_project(session)
        make_base_model(session, name="org/tiny", general_file_id=make_file(session).id)
        key = create_key(session, project_id=project.id, name="client").text
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
    try:
        yield Stand(client, committed_factory, project.id, base_url, limited)
    finally:
        client.close()
        server.should_exit = True
        thread.join(10)


def upload(stand: Stand, rows: list[dict[str, Any]] = ROWS, purpose: Any = "fine-tune") -> str:
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return stand.client.files.create(file=("rows.jsonl", body), purpose=purpose).id


def submit(stand: Stand, **overrides: Any) -> FineTuningJob:
    fields = {"model": "org/tiny", "training_file": upload(stand)} | overrides
    return stand.client.fine_tuning.jobs.create(**fields)


def change(stand: Stand, job_id: str, **columns: Any) -> None:
    """Does to a job's row what a worker would."""
    with transaction(stand.factory) as session:
        job = session.get_one(Job, parse_id("job", job_id))
        for name, value in columns.items():
            setattr(job, name, value)


def start(stand: Stand) -> None:
    with transaction(stand.factory) as session:
        assert claim_job(session, worker_id="w", free_slots=1, queues=["default"], ttl=60)


def test_a_file_goes_up_and_comes_back(stand: Stand) -> None:
    file_id = upload(stand)
    file = stand.client.files.wait_for_processing(file_id)
    assert (file.status, file.filename, file.purpose) == ("processed", "rows.jsonl", "fine-tune")
    assert file.model_extra is not None
    assert file.model_extra["report"]["num_rows"] == len(ROWS)
    content = stand.client.files.content(file_id).read()
    assert [json.loads(line) for line in content.splitlines()] == ROWS
    assert [f.id for f in stand.client.files.list(purpose="fine-tune")] == [file_id]
    assert stand.client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError) as found:
        stand.client.files.retrieve(file_id)
    assert found.value.param == "file_id"


def test_a_job_is_made_with_every_required_field_and_resolved_numbers(stand: Stand) -> None:
    job = submit(
        stand,
        suffix="bot",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        extra_body={"training": {"type": "full"}, "resources": {"num_gpus": 0}, "priority": 3},
    )
    assert job.id.startswith("ftjob-")
    assert (job.status, job.model, job.seed, job.metadata) == (
        "queued",
        "org/tiny",
        7,
        {"team": "a"},
    )
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    assert job.result_files == []
    assert job.error is None
    assert job.model_extra is not None
    assert [s["type"] for s in job.model_extra["retention"]["strategies"]] == ["ewc", "replay"]
    assert job.model_extra["training"]["total_steps"] == 20
    assert job.model_extra["progress"]["total_steps"] == 20
    assert [w["code"] for w in job.model_extra["warnings"]] == ["retention_unwatched"]
    strict = openai.OpenAI(
        base_url=stand.base_url,
        api_key=stand.client.api_key,
        max_retries=0,
        _strict_response_validation=True,
    )
    with strict:
        assert strict.fine_tuning.jobs.retrieve(job.id).id == job.id
        assert strict.files.retrieve(job.training_file).id == job.training_file
        assert [model.id for model in strict.models.list()] == ["org/tiny"]


def test_pages_end_and_hold_every_job_once(stand: Stand) -> None:
    training_file = upload(stand)
    made = [submit(stand, training_file=training_file, metadata={"n": str(n)}).id for n in range(5)]
    listed = [job.id for job in stand.client.fine_tuning.jobs.list(limit=2)]
    assert listed == made[::-1]
    third = stand.client.fine_tuning.jobs.list(metadata={"n": "2"})
    assert [job.id for job in third] == [made[2]]
    change(stand, made[0], metadata_=None)
    without = stand.client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in without] == [made[0]]
    stray = openai.BadRequestError, openai.NotFoundError
    with pytest.raises(stray):
        list(stand.client.fine_tuning.jobs.list(after="ftjob-nope"))


def test_events_and_checkpoints_come_newest_first_in_pages(stand: Stand) -> None:
    job = submit(stand)
    with transaction(stand.factory) as session:
        row = session.get_one(Job, parse_id("job", job.id))
        for n in range(7):
            add_job_event(session, row, level="info", message=f"m{n}", data={"n": n})
        for step in (10, 20, 30):
            make_checkpoint(
                session,
                row,
                step=step,
                status=CheckpointStatus.GOOD,
                metrics={"train_loss": 1.5},
                valid_loss=2.0,
            )
    events = list(stand.client.fine_tuning.jobs.list_events(job.id, limit=3))
    assert [event.message for event in events][:7] == [f"m{n}" for n in range(6, -1, -1)]
    sequences = [event.model_extra["sequence"] for event in events if event.model_extra]
    assert sequences == list(range(len(events), 0, -1))
    checkpoints = list(stand.client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [c.step_number for c in checkpoints] == [30, 20, 10]
    assert checkpoints[0].metrics.train_loss == 1.5
    assert checkpoints[0].metrics.full_valid_loss == 2.0
    assert checkpoints[0].fine_tuned_model_checkpoint.endswith(":ckpt-step-30")


def test_cancel_pause_and_resume(stand: Stand) -> None:
    job = submit(stand)
    start(stand)
    assert str(stand.client.fine_tuning.jobs.pause(job.id).status) == "pausing"  # not in its enum
    change(
        stand,
        job.id,
        state=JobState.PAUSED,
        worker_id=None,
        lease_expires_at=None,
        stop_requested=None,
    )
    assert stand.client.fine_tuning.jobs.resume(job.id).status == "queued"
    start(stand)
    cancelled = stand.client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "running"  # until its worker has stopped
    assert cancelled.model_extra is not None
    assert cancelled.model_extra["stop_requested"] == "cancel"
    waiting = submit(stand)
    assert stand.client.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"
    with pytest.raises(openai.ConflictError) as ended:
        stand.client.with_options(max_retries=5).fine_tuning.jobs.resume(waiting.id)
    assert ended.value.response.headers["x-should-retry"] == "false"
    assert ended.value.request_id is not None
    found = [event.data for event in stand.client.fine_tuning.jobs.list_events(job.id)]
    told = [data["status"] for data in found if isinstance(data, dict) and "status" in data]
    assert set(told) == {"queued", "running", "pausing"}


def test_models_are_listed_retrieved_and_deleted(stand: Stand) -> None:
    with transaction(stand.factory) as session:
        project = session.get_one(Project, stand.project_id)
        job = make_job(session, project)
        version = make_model_version(session, job, name="ft:org/tiny:p:bot:00000001")
        name, job_id = version.name, public_id("job", job.id)
    ids = {model.id for model in stand.client.models.list()}
    assert {"org/tiny", name} <= ids
    assert stand.client.models.retrieve("org/tiny").owned_by == "retain"
    model = stand.client.models.retrieve(name)
    assert model.model_extra is not None
    assert (model.model_extra["retention"], model.model_extra["fine_tuning_job_id"]) == (
        "held",
        job_id,
    )
    assert stand.client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        stand.client.models.retrieve(name)
    assert gone.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError):
        stand.client.models.delete("org/tiny")


def test_errors_are_the_classes_of_the_client_and_name_the_field(stand: Stand) -> None:
    with pytest.raises(openai.AuthenticationError):
        stand.client.with_options(api_key="rt_live_aaaaaaaa_x").models.list()
    with pytest.raises(openai.NotFoundError) as unknown:
        submit(stand, model="nope")
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    assert "model" in str(unknown.value)
    with pytest.raises(openai.BadRequestError) as wrong:
        submit(stand, extra_body={"retention": {"strategies": [{"type": "ewc", "strength": -1}]}})
    assert wrong.value.param == "retention.strategies.0.strength"
    assert "retention.strategies.0.strength" in str(wrong.value)
    with pytest.raises(openai.BadRequestError) as line:
        upload(stand, [ROWS[0], {"messages": [{"role": "user", "content": "no answer"}]}])
    assert "line 2" in str(line.value)
    with pytest.raises(openai.APIStatusError) as large:
        stand.client.files.create(file=("big.jsonl", MANY * 4), purpose="fine-tune")
    assert (large.value.status_code, large.value.param) == (413, "file")
    assert list(Path(stand.settings.scratch_root, "uploads").iterdir()) == []


class Zeros(io.RawIOBase):
    """So many bytes that are nowhere."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self.at)
        buffer[:count] = bytes(count)
        self.at += count
        return count


def test_an_upload_of_600_mb_is_413_and_never_in_memory(
    stand: Stand,
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(openai.APIStatusError) as large:
        stand.client.files.create(
            file=("big.jsonl", io.BufferedReader(Zeros(600 * 10**6), 2**20)), purpose="fine-tune"
        )
    assert (large.value.status_code, large.value.param) == (413, "file")
    assert "file" in str(large.value)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 100 * 2**20
    assert list(Path(stand.settings.scratch_root).glob("uploads/*")) == []
    assert list(stand.client.files.list()) == []


def test_a_key_used_twice_makes_one_job(stand: Stand) -> None:
    training_file = upload(stand)
    headers = {"Idempotency-Key": "0b7b4d4c"}
    first = submit(stand, training_file=training_file, extra_headers=headers)
    again = submit(stand, training_file=training_file, extra_headers=headers)
    assert again.id == first.id
    assert len(list(stand.client.fine_tuning.jobs.list())) == 1
    with pytest.raises(openai.UnprocessableEntityError) as other:
        submit(stand, training_file=training_file, seed=1, extra_headers=headers)
    assert other.value.code == "idempotency_key_reused"


def test_waiting_ends_when_the_status_changes(stand: Stand) -> None:
    job = submit(stand)
    timer = threading.Timer(0.3, start, [stand])
    timer.start()
    began = time.monotonic()
    seen = stand.client.fine_tuning.jobs.retrieve(job.id, extra_query={"wait": 20})
    assert seen.status == "running"
    assert 0.2 < time.monotonic() - began < 5
    timer.join()
    began = time.monotonic()
    header = {"Prefer": "wait=1"}
    same = stand.client.fine_tuning.jobs.retrieve(job.id, extra_headers=header)
    assert same.status == "running"
    assert 0.9 < time.monotonic() - began < 3


def test_the_server_is_small_and_starts_without_torch(database: str, tmp_path: Path) -> None:
    """The real process, as `retain up` starts it: under 170 MB also after a few hundred requests and the schema."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "app.main:create_app_from_environment"]
    environment = os.environ | {
        "RETAIN_DATABASE_URL": database,
        "RETAIN_DATA_DIR": str(tmp_path / "data"),
    }
    with subprocess.Popen(
        [*command, "--factory", "--port", str(port), "--log-level", "warning"],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
    ) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                wait_until_ready(client)
                with ThreadPoolExecutor(16) as pool:
                    answers = list(
                        pool.map(lambda _: client.get("/v1/models").status_code, range(300))
                    )
                assert set(answers) == {401}
                assert client.get("/openapi.json").status_code == 200
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            status = Path(f"/proc/{process.pid}/status").read_text()
        finally:
            process.terminate()
    assert "libtorch" not in maps
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) * 1024 < 170 * 10**6


def wait_until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")

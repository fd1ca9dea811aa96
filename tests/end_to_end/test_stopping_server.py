"""A server that is told to stop while clients wait: each is told, and the process ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from app.domain.states import JobState
from app.embedded.processes import find_free_port
from app.services.keys import create_key
from tests.factories import make_job, make_project


@pytest.fixture
def served(database: str, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A server process and its address."""
    port = find_free_port("127.0.0.1")
    environment = os.environ | {
        "RETAIN_DATABASE_URL": database,
        "RETAIN_DATA_DIR": str(tmp_path / "data"),
        "RETAIN_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    server = ("uvicorn", "app.main:create_app_from_environment", "--factory", "--port", str(port))
    process = subprocess.Popen(
        [sys.executable, "-m", *server, "--log-level", "warning"], env=environment
    )
    url = f"http://127.0.0.1:{port}"
    try:
        ends_at = time.monotonic() + 60
        while time.monotonic() < ends_at:
            try:
                httpx.get(f"{url}/healthz", timeout=2)
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait()


def test_a_stopping_server_tells_those_who_wait(
    served: tuple["subprocess.Popen[bytes]", str], committed_factory: SessionFactory
) -> None:
    process, url = served
    with transaction(committed_factory) as session:
        project = make_project(session)
        job = make_job(session, project, state=JobState.RUNNING)
        key = create_key(session, project_id=project.id, name="key").text
    path = f"{url}/v1/fine_tuning/jobs/{public_id('job', job.id)}"
    head = {"authorization": f"Bearer {key}"}
    with ThreadPoolExecutor() as pool, httpx.Client(headers=head, timeout=60) as client:
        waiting = pool.submit(client.get, path, params={"wait": 60})
        streaming = pool.submit(client.get, f"{path}/events", params={"stream": "true"})
        time.sleep(1)
        assert not waiting.done()
        assert not streaming.done()
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        answer, stream = waiting.result(10), streaming.result(10)
        status = process.wait(10)
    assert time.monotonic() - began < 4
    assert status in {0, -signal.SIGTERM}  # uvicorn raises its signal again when all is over
    assert answer.json()["status"] == "running"
    last = stream.text.splitlines()[-2].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "service_unavailable"

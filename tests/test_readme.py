"""The examples of the README are run as they stand; only addresses, keys, ids and files are put in."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from standardwebhooks import Webhook

from app.embedded.processes import find_free_port
from tests.databases import ROOT
from tests.fuzz.server import ROWS, Target, running_target

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
CURL = [code for _, code in BLOCKS if code.lstrip().startswith("curl ")]
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with running_target(tmp_path_factory.mktemp("readme")) as running:
        yield running


def fill_in(code: str, target: Target) -> str:
    """An example with what its reader has to put in."""
    for old, new in (
        ("http://127.0.0.1:8000", target.url),
        ("rt_live_...", target.key),
        ("whsec_...", SECRET),
        ("file-...", target.ids["file_id"]),
    ):
        code = code.replace(old, new)
    return code


def run(code: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_readme_has_the_examples_that_are_run_here() -> None:
    assert sum("fine_tuning.jobs.create" in code for code in PYTHON) == 1
    assert sum("webhooks.unwrap" in code for code in PYTHON) == 1
    assert len(CURL) >= 2
    for code in PYTHON:
        compile(code, "README.md", "exec")
    for language, code in BLOCKS:
        if language == "json":
            json.loads("{" + code + "}" if code.lstrip().startswith('"') else code)


@pytest.mark.slow
def test_the_openai_client_submits_and_follows_a_job(target: Target, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(ROWS)
    code = next(code for code in PYTHON if "fine_tuning.jobs.create" in code)
    ran = run(fill_in(code, target) + "\nprint(job.status, job.id)\n", tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    status, job_id = ran.stdout.split()[-2:]
    assert status == "queued"
    headers = {"authorization": f"Bearer {target.key}"}
    shown = httpx.get(f"{target.url}/v1/fine_tuning/jobs/{job_id}", headers=headers).json()
    assert [strategy["type"] for strategy in shown["retention"]["strategies"]] == ["ewc", "replay"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("number", range(len(CURL)))
def test_curl(target: Target, tmp_path: Path, number: int) -> None:
    code = fill_in(CURL[number], target).replace(
        "$(uuidgen)", "0f8fad5b-d9cb-469f-a165-7085bd2c3a1f"
    )
    environment = os.environ | {"RETAIN_API_KEY": target.key}
    ran = subprocess.run(
        ["bash", "-c", code],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    answer = json.loads(ran.stdout)
    assert "error" not in answer or answer["error"] is None, answer
    assert answer["object"] in {"fine_tuning.job", "fine_tuning.estimate"}


@pytest.mark.slow
def test_the_receiver_takes_a_signed_event_and_refuses_a_forged_one(
    target: Target, tmp_path: Path
) -> None:
    code = next(code for code in PYTHON if "webhooks.unwrap" in code)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 16, "longer than it is said to be"
    port = find_free_port()
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", fill_in(code, target).replace("9000", str(port))],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        body = json.dumps(
            {
                "id": "evt_1",
                "object": "event",
                "type": "fine_tuning.job.succeeded",
                "created_at": 1,
                "data": {"id": "ftjob-1"},
            }
        )
        now = datetime.now(UTC)
        signed = {
            "webhook-id": "evt_1",
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(SECRET).sign("evt_1", now, body),
        }
        assert post(port, body, signed) == 200
        with pytest.raises(httpx.TransportError):  # it answers nothing
            post(port, body.replace("ftjob-1", "ftjob-2"), signed)
        assert process.stdout is not None
        timer = threading.Timer(20, process.kill)
        timer.start()
        assert process.stdout.readline().split() == ["fine_tuning.job.succeeded", "ftjob-1"]
        timer.cancel()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def post(port: int, body: str, headers: dict[str, str]) -> int:
    """Sends an event, once the receiver listens."""
    until = time.monotonic() + 60
    while True:
        try:
            return httpx.post(
                f"http://127.0.0.1:{port}/", content=body, headers=headers
            ).status_code
        except httpx.ConnectError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)

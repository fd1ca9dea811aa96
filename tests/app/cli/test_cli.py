"""The `retain` command: the stack it runs, operator commands, and commands over HTTP."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from app.cli import main
from app.cli.jobs import set_path
from app.cli.models import parse_weight
from app.errors import BadRequest
from app.settings import load_settings

RETAIN = [sys.executable, "-m", "app.cli"]
KEY = re.compile(r"rt_live_[a-z0-9]{8}_[\w-]{43}")


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RETAIN_")}
    return kept | {"COLUMNS": "200", "NO_COLOR": "1"} | changes


def retain(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, as a fresh interpreter costs seconds on a busy machine."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment(**changes))
        patch.setattr(sys, "argv", ["retain", *arguments])
        load_settings.cache_clear()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
    load_settings.cache_clear()
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def retain_process(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own."""
    return subprocess.run(
        [*RETAIN, *arguments],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class Up:
    """A `retain up` that is ready."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.process = subprocess.Popen(
            [*RETAIN, "up", "--data-dir", str(data_dir), "--port", "0", "--workers", "0"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.removeprefix("ready ").strip()

    def family(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def child(self, text: str) -> psutil.Process | None:
        for process in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):  # it has just died
                if text in " ".join(process.cmdline()):
                    return process
        return None

    def end(self, number: signal.Signals) -> str:
        """Sends a signal, waits, and returns what it had printed besides the first line."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=30)
        return out


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("up") / "data"


@pytest.fixture(scope="module")
def up(data_dir: Path) -> Iterator[Up]:
    running = Up(data_dir)
    yield running
    if running.process.poll() is None:
        running.end(signal.SIGTERM)
    for stream in (running.process.stdout, running.process.stderr):
        assert stream is not None
        stream.close()


@pytest.fixture(scope="module")
def key(up: Up) -> str:
    done = retain("keys", "create", "ci", RETAIN_DATA_DIR=str(up.data_dir))
    assert KEY.fullmatch(done.stdout.strip()), done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def over_http(up: Up, key: str) -> dict[str, str]:
    return {"RETAIN_BASE_URL": up.url, "RETAIN_API_KEY": key}


def test_it_says_ready_once_it_serves(up: Up) -> None:
    assert re.fullmatch(r"ready http://127\.0\.0\.1:\d+\n", up.line)
    assert httpx.get(f"{up.url}/healthz", trust_env=False).status_code == 200


def test_a_second_one_on_the_same_directory_is_refused(up: Up) -> None:
    done = retain_process("up", "--port", "0", RETAIN_DATA_DIR=str(up.data_dir))
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: Retain is already running on ")
    assert str(up.process.pid) in line


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = retain_process("up", "--port", port, RETAIN_DATA_DIR=str(tmp_path))
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_keys_are_made_listed_and_revoked_while_it_runs(up: Up) -> None:
    here = {"RETAIN_DATA_DIR": str(up.data_dir)}
    made = retain("keys", "create", "narrow", "--project", "team", "--scope", "jobs:read", **here)
    text = made.stdout.strip()
    client = {"RETAIN_BASE_URL": up.url, "RETAIN_API_KEY": text}
    assert retain("jobs", "list", **client).returncode == 0
    refused = retain("jobs", "cancel", "ftjob-" + "0" * 32, **client)
    assert (refused.returncode, "jobs:write" in refused.stderr) == (1, True)
    listed = retain("keys", "list", "--project", "team", **here).stdout
    assert text[8:16] in listed
    assert text[17:] not in listed
    new = retain("keys", "rotate", text, "--overlap-hours", "1", **here).stdout.strip()
    for key in (text, new):
        assert retain("jobs", "list", **client | {"RETAIN_API_KEY": key}).returncode == 0
    assert retain("keys", "revoke", text[8:16], **here).returncode == 0
    revoked_at = time.monotonic()
    while "401" not in retain("jobs", "list", **client).stderr:
        assert time.monotonic() - revoked_at < 5
        time.sleep(0.1)
    assert "revoked" in retain("keys", "list", **here).stdout


def test_the_operator_gives_projects_quotas(up: Up) -> None:
    here = {"RETAIN_DATA_DIR": str(up.data_dir)}
    given = ("--max-queued-jobs", "7", "--max-storage-bytes", "5000")
    assert retain("projects", "set", "limited", *given, **here).returncode == 0
    row = re.search(r"limited .*", retain("projects", "list", **here).stdout)
    assert row is not None
    assert re.split(r"\s{2,}", row[0].strip()) == ["limited", "0 of 7", "0", "0 of 5,000"]
    assert (
        retain("projects", "set", "limited", "--max-storage-bytes", "default", **here).returncode
        == 0
    )
    assert "5,000" not in retain("projects", "list", **here).stdout
    for wrong in (["--max-queued-jobs", "0"], ["--max-running-jobs", "many"], []):
        refused = retain("projects", "set", "limited", *wrong, **here)
        assert (refused.returncode, "max_" in refused.stderr or "--max" in refused.stderr) == (
            1,
            True,
        )


def test_benchmarks_are_added_over_http(over_http: dict[str, str], tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    item = {"id": "a", "question": "?", "choices": ["x", "y"], "answer": 1}
    items.write_text(json.dumps(item) + "\n" + json.dumps(item | {"id": "b"}) + "\n")
    added = retain(
        "benchmarks", "add", "tiny", str(items), "--scorer", "multiple_choice", **over_http
    )
    assert added.returncode == 0, added.stderr
    rows = json.loads(retain("benchmarks", "list", "--json", **over_http).stdout)
    assert [(row["name"], row["num_items"]) for row in rows] == [("tiny", 2)]
    assert "tiny" in retain("benchmarks", "list", **over_http).stdout
    items.write_text("{}\n")
    refused = retain("benchmarks", "add", "tiny", str(items), "--scorer", "nll", **over_http)
    assert refused.returncode == 1
    assert "line 1" in refused.stderr


def test_a_job_of_an_unknown_model_is_refused_with_the_servers_words(
    over_http: dict[str, str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    done = retain("jobs", "submit", "none", str(rows), "--no-retention", **over_http)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "model" in done.stderr
    missing = retain("jobs", "submit", "none", str(tmp_path / "none.jsonl"), **over_http)
    assert "No such file" in missing.stderr
    assert retain("models", "list", **over_http).returncode == 0
    assert "404" in retain("jobs", "show", "ftjob-1", **over_http).stderr


@pytest.mark.parametrize("part", ["uvicorn", "app.control", "redis-server"])
def test_what_dies_is_started_again(up: Up, part: str) -> None:
    before = up.child(part)
    assert before is not None
    before.kill()
    deadline = time.monotonic() + 30
    while (found := up.child(part)) is None or found.pid == before.pid or not answers(up):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(up: Up) -> bool:
    try:
        return httpx.get(f"{up.url}/readyz", trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_nothing_outlives_a_kill_or_a_stop_and_the_data_stays(up: Up, key: str) -> None:
    family = up.family()
    assert len(family) >= 4
    up.end(signal.SIGKILL)
    assert psutil.wait_procs(family, timeout=10)[1] == []
    again = Up(up.data_dir)
    family = again.family()
    client = {"RETAIN_BASE_URL": again.url, "RETAIN_API_KEY": key}
    assert retain("jobs", "list", **client).returncode == 0
    began = time.monotonic()
    assert again.end(signal.SIGINT) == ""  # the ready line was all
    assert time.monotonic() - began < 15
    assert again.process.returncode == 0
    assert psutil.wait_procs(family, timeout=1)[1] == []
    made = retain("keys", "create", "later", RETAIN_DATA_DIR=str(up.data_dir))
    assert KEY.fullmatch(made.stdout.strip()), made.stderr


def test_commands_over_http_say_what_is_missing() -> None:
    assert "RETAIN_API_KEY is not set" in retain("jobs", "list").stderr
    away = retain("jobs", "list", RETAIN_API_KEY="x", RETAIN_BASE_URL="http://127.0.0.1:9")
    assert (away.returncode, "retain up" in away.stderr) == (1, True)


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["jobs", "list", "--limit", "none"], ["keys", "create"]]
)
def test_wrong_usage_is_status_2(arguments: Sequence[str]) -> None:
    assert retain(*arguments).returncode == 2


def test_help_names_every_command() -> None:
    text = retain("--help").stdout
    for word in ("up", "keys", "models", "jobs", "benchmarks", "RETAIN_API_KEY", "RETAIN_DATA_DIR"):
        assert word in text


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["training.learning_rate=1e-4"], {"training": {"learning_rate": 1e-4}}),
        (["suffix=my-bot"], {"suffix": "my-bot"}),
        (["retention=null"], {"retention": None}),
        (
            [
                "retention.strategies.0.type=ewc",
                "retention.strategies.0.strength=1",
                'retention.strategies.1={"type": "replay"}',
                "retention.policy.max_drop=0.02",
            ],
            {
                "retention": {
                    "strategies": [{"type": "ewc", "strength": 1}, {"type": "replay"}],
                    "policy": {"max_drop": 0.02},
                }
            },
        ),
        (["a.0=1", "a.0=2"], {"a": [2]}),
        (["a=x=y"], {"a": "x=y"}),
    ],
)
def test_any_field_can_be_set_by_its_path(assignments: Sequence[str], expected: Any) -> None:
    request: dict[str, Any] = {}
    for assignment in assignments:
        set_path(request, assignment)
    assert request == expected


@pytest.mark.parametrize("assignment", ["a", "=1", "a..b=1", "a.5=1", "model.x=1"])
def test_a_path_that_leads_nowhere_is_refused(assignment: str) -> None:
    with pytest.raises(BadRequest, match="--set"):
        set_path({"model": "base"}, assignment)


def test_benchmarks_of_a_suite_may_carry_weights() -> None:
    assert parse_weight("arc") == ("arc", 1.0)
    assert parse_weight("arc=2.5") == ("arc", 2.5)
    for text in ("arc=0", "arc=-1", "arc=x", "arc=inf", "arc=nan"):
        with pytest.raises(BadRequest, match="weight"):
            parse_weight(text)

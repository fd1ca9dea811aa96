"""Embedded Postgres and Redis: any user, any directory, any kind of earlier death."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from app.embedded import (
    DataDirectoryInUse,
    EmbeddedServices,
    Endpoints,
    operator_database,
    postgres,
)
from app.embedded.postgres import EmbeddedPostgres
from app.embedded.processes import Identity, process_lines
from app.settings import Settings

HOLDER = """
import sys, time
from pathlib import Path
from app.embedded import EmbeddedServices
services = EmbeddedServices(Path(sys.argv[1]), is_durable=False)
print(services.start().database_url, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs the services on `tmp_path / "data"`; the fixture waits until they are up."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "data")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("postgresql://")
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def ask(url: str, query: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(query).fetchone()
        assert row is not None
        return row[0]


def ping(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        return bool(client.ping())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def servers_of(data_dir: Path) -> list[int]:
    """Process ids of the servers that work in the directory."""
    found = []
    for pid, _ in process_lines():
        with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
            if Path(f"/proc/{pid}/cwd").readlink().is_relative_to(data_dir.resolve()):
                found.append(pid)
    return found


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} still run"
        time.sleep(0.05)


def test_starts_in_seconds_and_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    services = EmbeddedServices(tmp_path, is_durable=False)
    began = time.monotonic()
    first = services.start()
    assert time.monotonic() - began < 30
    with psycopg.connect(first.database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    assert ping(first.redis_url)
    pids = servers_of(tmp_path)
    assert len(pids) >= 2
    services.stop()
    wait_until_gone(pids)
    with EmbeddedServices(tmp_path, is_durable=False) as again:
        found = again.directory.find_endpoints()
        assert found is not None
        assert ask(found.database_url, "SELECT answer FROM kept") == 42


def test_a_password_is_needed_and_is_nowhere_to_be_read(tmp_path: Path) -> None:
    with EmbeddedServices(tmp_path, is_durable=False) as services:
        found = services.directory.find_endpoints()
        assert found is not None
        secret = found.database_url.split(":")[2].split("@")[0]
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(found.database_url.replace(secret, "wrong"))
        redis_secret = found.redis_url.split(":")[2].split("@")[0]
        with pytest.raises(redis.AuthenticationError):
            ping(found.redis_url.replace(redis_secret, "wrong"))
        assert not any(secret in line or redis_secret in line for _, line in process_lines())
        for path in tmp_path.rglob("*"):
            is_open = stat.S_IMODE(path.stat().st_mode) & (stat.S_IRGRP | stat.S_IROTH)
            if path.is_file() and is_open and path.parent.name != "logs":
                assert secret not in path.read_text(errors="replace")
                assert redis_secret not in path.read_text(errors="replace")


def test_redis_refuses_to_forget_and_postgres_speaks_utf8(tmp_path: Path) -> None:
    with EmbeddedServices(tmp_path, is_durable=False) as services:
        found = services.directory.find_endpoints()
        assert found is not None
        with redis.Redis.from_url(found.redis_url, decode_responses=True) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert ask(found.database_url, "SHOW server_encoding") == "UTF8"


@pytest.mark.usefixtures("holder")
def test_a_second_run_on_the_same_directory_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataDirectoryInUse, match=r"already running on .*data \(process \d+\)"
    ) as caught:
        EmbeddedServices(tmp_path / "data").start()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the parent-death signal")
def test_the_servers_die_with_a_killed_run_and_the_next_run_takes_over(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    pids = servers_of(tmp_path / "data")
    holder.kill()
    holder.wait()
    wait_until_gone(pids)
    with EmbeddedServices(tmp_path / "data", is_durable=False) as services:
        assert services.directory.find_endpoints() is not None


def test_servers_that_outlived_a_killed_run_are_ended_first(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    pids = servers_of(tmp_path / "data")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that they cannot act on the parent's death
    try:
        holder.kill()
        holder.wait()
        assert all(is_running(pid) for pid in pids)
        with EmbeddedServices(tmp_path / "data", is_durable=False) as services:
            found = services.directory.find_endpoints()
            assert found is not None
            assert ask(found.database_url, "SELECT 1") == 1
            assert ping(found.redis_url)
            assert not any(is_running(pid) for pid in pids)
    finally:  # a frozen server would outlive a failure of this test
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_crashed_server_comes_back_where_it_was(tmp_path: Path) -> None:
    with EmbeddedServices(tmp_path, is_durable=False) as services:
        found = services.directory.find_endpoints()
        assert found is not None
        assert not services.revive()
        for pid in servers_of(tmp_path):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not services.revive():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        while services.revive():
            time.sleep(0.02)
        assert ask(found.database_url, "SELECT 1") == 1
        assert ping(found.redis_url)


def test_a_lock_file_that_names_a_living_stranger_is_no_obstacle(tmp_path: Path) -> None:
    with EmbeddedServices(tmp_path, is_durable=False):
        pass
    stale = tmp_path / "postgres" / "data" / "postmaster.pid"
    stale.write_text(f"1\n{stale.parent}\n0\n5432\n\n127.0.0.1\n0 0\nready\n")
    with EmbeddedServices(tmp_path, is_durable=False) as services:
        assert services.directory.find_endpoints() is not None


def test_an_interrupted_initialisation_starts_over(tmp_path: Path) -> None:
    half = tmp_path / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with EmbeddedServices(tmp_path, is_durable=False) as services:
        found = services.directory.find_endpoints()
        assert found is not None
        assert ask(found.database_url, "SELECT 1") == 1
    assert not half.exists()


def test_given_urls_replace_the_servers(tmp_path: Path) -> None:
    services = EmbeddedServices(tmp_path, database_url="postgresql://db", redis_url="redis://r")
    assert services.start() == Endpoints("postgresql://db", "redis://r")
    assert not (tmp_path / "postgres").exists()
    services.stop()


@pytest.mark.usefixtures("holder")
def test_a_command_uses_the_running_database(tmp_path: Path) -> None:
    before = servers_of(tmp_path / "data")
    with operator_database(Settings(data_dir=tmp_path / "data")) as url:
        assert ask(url, "SELECT 1") == 1
        assert servers_of(tmp_path / "data") == before
    assert servers_of(tmp_path / "data") == before


def test_a_command_starts_a_stopped_database_and_stops_it_again(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    with operator_database(settings) as url:
        assert ask(url, "SELECT 1") == 1
        pids = servers_of(tmp_path)
        assert pids
    wait_until_gone(pids)
    with operator_database(settings) as url:
        assert ask(url, "SELECT 1") == 1


def test_a_command_leaves_a_replaced_database_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "none", database_url="postgresql://db")
    with operator_database(settings) as url:
        assert url == "postgresql://db"
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("mode", ["userns", "setuid"])
def test_root_runs_it_below_a_directory_that_nobody_else_may_enter(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(tempfile.mkdtemp(prefix="retain-home-"))
    home.chmod(0o700)
    wheel = postgres.WHEEL  # the virtual environment lies there too
    assert wheel is not None
    for part in (wheel, wheel.with_name(wheel.name + ".libs")):
        subprocess.run(["cp", "-r", str(part), str(home)], check=True)
    monkeypatch.setattr(postgres, "WHEEL", home / wheel.name)
    identity = Identity(mode, 65534, 0 if mode == "userns" else 65534)
    server = EmbeddedPostgres(
        home / "x" / "postgres", home / "log", is_durable=False, identity=identity
    )
    (home / "x").mkdir()
    try:
        assert ask(server.start(), "SELECT current_user") == "retain"
        assert (home / "x" / "postgres" / "data").stat().st_uid == identity.owner
        server.stop()
        # The mode may change between runs, as when a container gets other rights.
        other = EmbeddedPostgres(home / "x" / "postgres", home / "log", is_durable=False)
        assert ask(other.start(), "SELECT 1") == 1
        other.stop()
    finally:
        server.stop()
        subprocess.run(["rm", "-rf", str(home)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_ordinary_user_runs_it_as_itself(tmp_path: Path) -> None:
    theirs = Path(tempfile.mkdtemp(prefix="retain-user-"))
    os.chown(theirs, 1234, 1234)
    # The interpreter may lie in root's home here, hence the one capability to read everything.
    command = [
        "setpriv",
        "--reuid=1234",
        "--regid=1234",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
    ]
    command += [
        "--ambient-caps=+dac_read_search",
        sys.executable,
        "-c",
        HOLDER,
        str(theirs / "data"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert ask(url, "SELECT 1") == 1
        assert (theirs / "data" / "postgres" / "data").stat().st_uid == 1234
        pids = servers_of(theirs / "data")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    wait_until_gone(pids)
    subprocess.run(["rm", "-rf", str(theirs)], check=True)

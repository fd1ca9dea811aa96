"""The supervisor with a real child that speaks the protocol: every way in which an attempt can go."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import OperationalError

from app.db.models import Checkpoint, File, Job, JobEvent, JobOrder, ModelVersion, Worker
from app.db.session import SessionFactory, transaction
from app.domain.decisions import ControllerState
from app.domain.messages import Order
from app.domain.states import JobState
from app.services.control import request_cancel, request_pause, resume_job
from app.services.engine import CrashRules, claim_job
from app.services.reaping import reap
from app.services.storage import Storage
from app.settings import Settings
from tests.factories import make_job, make_project, make_spec, make_training
from tests.stored import store_base_model, store_file
from workers.supervisor import Node
from workers.supervisor.channel import PREFIX, Channel, clear_sockets
from workers.supervisor.database import Database, is_outage
from workers.supervisor.scratch import clear_scratch, using
from workers.supervisor.slots import Slot, Slots

SCRIPT = Path(__file__).with_name("scripted_trainer.py")
WAIT_SECONDS = 30.0


def eventually(holds: Callable[[], Any], what: str = "") -> Any:
    """Waits until it holds; returns what it gave."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        found = holds()
        if found:
            return found
        time.sleep(0.03)
    raise AssertionError(f"never: {what or holds}")


@dataclass
class World:
    """A database and a store with one job."""

    factory: SessionFactory
    settings: Settings
    storage: Storage
    job_id: UUID

    def node(self, scenario: str, **changes: Any) -> Node:
        settings = self.settings.model_copy(update=changes)
        slots = Slots([Slot(0, None, None)], "cpu")
        return Node(settings, slots, command=[sys.executable, str(SCRIPT), scenario])

    def run(self, scenario: str, **changes: Any) -> Job:
        """Serves until nothing is left, and through crashes; the job as it then is."""
        node = self.node(scenario, **changes)
        node.serve()
        while self.job().state is JobState.QUEUED:
            time.sleep(0.05)
            node.serve()
        node.stop()
        return self.job()

    @contextmanager
    def running(self, scenario: str, **changes: Any) -> Iterator[Node]:
        """A node at work in the background."""
        node = self.node(scenario, **changes)
        thread = threading.Thread(target=node.serve)
        thread.start()
        try:
            yield node
        finally:
            node.drain()
            thread.join()
            node.stop()

    def job(self) -> Job:
        with transaction(self.factory) as session:
            return session.get_one(Job, self.job_id)

    def rows(self, kind: type[Any]) -> list[Any]:
        with transaction(self.factory) as session:
            return list(session.scalars(select(kind).order_by(kind.seq)))

    def notes(self, code: str) -> list[Any]:
        return [row for row in self.rows(JobEvent) if (row.data or {}).get("code") == code]

    def reaches(self, step: int) -> None:
        eventually(lambda: self.job().step >= step, f"step {step}")


@pytest.fixture
def world(committed_factory: SessionFactory, database: str, settings: Settings, tmp_path: Path):
    quick = settings.model_copy(
        update={
            "database_url": database,
            "lease_ttl_seconds": 2.0,
            "beat_seconds": 0.3,
            "stop_grace_seconds": 1.5,
            "poll_seconds": 0.2,
        }
    )
    storage = Storage(quick.storage_root)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    with transaction(committed_factory) as session:
        project = make_project(session)
        rows = store_file(session, storage, project, '{"text": "a"}\n', tmp_path / "rows")
        job = make_job(
            session,
            project,
            base_model_id=store_base_model(session, storage, base).id,
            training_file_id=rows.id,
            spec=make_spec(training=make_training(total_steps=30)).model_dump(mode="json"),
        )
    return World(committed_factory, quick, storage, job.id)


class TestWholeRuns:
    def test_a_run_is_published(self, world: World):
        job = world.run("whole")
        assert job.state is JobState.SUCCEEDED, job.error
        assert (job.attempt, job.trained_tokens, job.step) == (1, 300, 30)
        [version] = world.rows(ModelVersion)
        assert version.id == job.model_version_id
        assert (version.status, version.kind, version.retention) == ("ready", "full", "off")
        assert world.storage.read_bytes(f"{version.path}/model.safetensors") == (
            b"weights of step 30"
        )
        result = next(row for row in world.rows(File) if row.id == job.result_file_id)
        assert world.storage.read_bytes(result.path).startswith(b"step,train_loss")
        assert [event.sequence for event in world.rows(JobEvent)] == list(
            range(1, job.event_count + 1)
        )
        assert not (world.settings.scratch_root / "jobs" / job.id.hex / "a1").exists()

    def test_the_trainer_sees_no_secrets_and_dies_with_its_slot_locked(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("RETAIN_DATABASE_URL", world.settings.database_url or "")
        monkeypatch.setenv("RETAIN_SECRET_KEY", "secret")
        monkeypatch.setenv("HF_TOKEN", "secret")
        lock = tmp_path / "gpu.lock"
        slots = Slots([Slot(0, "3", lock)], "gpu")
        node = Node(world.settings, slots, command=[sys.executable, str(SCRIPT), "shows_itself"])
        node.serve()
        node.stop()
        [note] = world.notes("self")
        environment = note.data["environment"]
        assert not [name for name in environment if name.startswith("RETAIN_")]
        assert "secret" not in environment.values()
        assert environment["CUDA_VISIBLE_DEVICES"] == "3"
        assert environment["HF_HUB_OFFLINE"] == "1"
        assert str(lock) in note.data["files"]

    def test_metrics_become_events_and_progress_is_kept(self, world: World):
        job = world.run("whole")
        metrics = [row for row in world.rows(JobEvent) if row.type == "metrics"]
        assert {row.data["step"] for row in metrics} >= set(range(1, 31))
        assert job.progress is not None
        assert job.progress["total_steps"] == 30


class TestCrashes:
    def test_a_killed_trainer_goes_on_from_its_last_checkpoint(self, world: World):
        job = world.run("dies_once")
        assert job.state is JobState.SUCCEEDED, job.error
        assert job.attempt == 2
        assert job.run_plan is not None
        assert job.run_plan["resume"]["step"] == 10
        [crash] = world.notes("crashed")
        assert crash.message.startswith("The trainer was ended by signal 9.")

    def test_a_poisoned_job_fails_after_three_crashes(self, world: World):
        job = world.run("dies_always")
        assert (job.state, job.attempt) == (JobState.FAILED, 3)
        assert job.error is not None
        assert job.error["code"] == "too_many_crashes"
        assert "RuntimeError: the reason" in job.error["message"]

    def test_a_silent_trainer_is_ended(self, world: World):
        job = world.run("falls_silent", stall_seconds=0.6, max_crashes=1)
        assert job.error is not None
        assert "silent for 1 s" in job.error["message"]

    @pytest.mark.parametrize(
        ("scenario", "word"), [("babbles", "sent no message"), ("lies", "ValueError")]
    )
    def test_a_trainer_that_breaks_the_rules_is_ended(self, world: World, scenario: str, word: str):
        job = world.run(scenario, max_crashes=1)
        assert job.error is not None
        assert word in job.error["message"]

    def test_a_failure_is_final_with_its_param(self, world: World):
        job = world.run("fails")
        assert (job.state, job.attempt) == (JobState.FAILED, 1)
        assert job.error == {
            "code": "bad_rows",
            "message": "Line 3 has no messages.",
            "param": "training_file",
        }

    def test_a_device_that_fails_twice_gets_no_more_jobs(self, world: World):
        node = world.node("loses_its_device", max_crashes=9)
        eventually(lambda: node.serve() == 0 and node.slots.num_free == 0)
        node.stop()
        assert (world.job().state, world.job().attempt) == (JobState.QUEUED, 2)

    def test_a_flipped_byte_falls_back_to_the_checkpoint_before(self, world: World):
        node = world.node("dies_once")
        node.serve()
        [last] = [row for row in world.rows(Checkpoint) if row.step == 10]
        path = Path(world.settings.storage_root) / last.path / "model.safetensors"
        path.chmod(0o644)
        path.write_bytes(path.read_bytes().replace(b"10", b"11"))
        eventually(lambda: node.serve() > 0)
        node.stop()
        job = world.job()
        assert job.state is JobState.SUCCEEDED, job.error
        assert job.run_plan is not None
        assert job.run_plan["resume"]["step"] == 0
        assert [row.step for row in world.rows(Checkpoint) if row.corrupt] == [10]

    def test_a_checkpoint_that_the_trainer_refuses_is_not_used_again(self, world: World):
        job = world.run("finds_damage")
        assert job.state is JobState.SUCCEEDED, job.error
        assert job.attempt == 3
        assert job.run_plan is not None
        assert job.run_plan["resume"]["step"] == 0

    def test_without_any_valid_checkpoint_the_job_fails_loudly(self, world: World):
        node = world.node("dies_once")
        node.serve()
        for row in world.rows(Checkpoint):
            world.storage.delete(row.path)
        eventually(lambda: node.serve() > 0)
        node.stop()
        job = world.job()
        assert job.error is not None
        assert job.error["code"] == "no_valid_checkpoint"


class TestStops:
    def test_pause_saves_and_resume_goes_on_from_there(self, world: World):
        with world.running("stops"):
            world.reaches(3)
            with transaction(world.factory) as session:
                request_pause(session, project_id=world.job().project_id, job_id=world.job_id)
            eventually(lambda: world.job().state is JobState.PAUSED)
            paused_at = world.job().step
            with transaction(world.factory) as session:
                resume_job(session, project_id=world.job().project_id, job_id=world.job_id)
        job = world.run("stops")
        assert job.state is JobState.SUCCEEDED, job.error
        assert job.run_plan is not None
        assert job.run_plan["resume"]["step"] == paused_at > 0
        assert job.crashes_without_progress == 0

    def test_cancel_ends_a_run_at_the_next_heartbeat(self, world: World):
        with world.running("stops"):
            world.reaches(1)
            with transaction(world.factory) as session:
                request_cancel(session, project_id=world.job().project_id, job_id=world.job_id)
            eventually(lambda: world.job().state is JobState.CANCELLED)

    def test_a_trainer_that_does_not_stop_is_killed_and_the_job_still_cancelled(self, world: World):
        with world.running("never_stops"):
            world.reaches(1)
            with transaction(world.factory) as session:
                request_cancel(session, project_id=world.job().project_id, job_id=world.job_id)
            eventually(lambda: world.job().state is JobState.CANCELLED)

    def test_drain_saves_and_gives_the_job_back_unblamed(self, world: World):
        with world.running("stops") as node:
            world.reaches(2)
            node.drain()
            eventually(lambda: world.job().state is JobState.QUEUED)
        job = world.job()
        assert job.crashes_without_progress == 0
        [last] = [row for row in world.rows(Checkpoint) if row.id == job.ckpt_id]
        assert last.step == job.step > 0

    def test_an_order_from_outside_reaches_the_trainer_and_its_step_is_kept(self, world: World):
        with world.running("obeys"):
            world.reaches(2)
            with transaction(world.factory) as session:
                order = Order(version=1, branch=0, state=ControllerState(strengths={"ewc": 2.0}))
                session.add(
                    JobOrder(
                        job_id=world.job_id,
                        version=1,
                        branch=0,
                        order=order.model_dump(mode="json"),
                    )
                )
                session.execute(update(Job).values(order_version=1))
            eventually(lambda: world.job().state is JobState.SUCCEEDED)
        [row] = world.rows(JobOrder)
        assert row.effective_step is not None
        assert row.order["effective_step"] == row.effective_step


class TestFences:
    def test_an_attempt_that_lost_its_job_ends_and_writes_nothing(self, world: World):
        with world.running("never_stops"):
            world.reaches(3)
            with transaction(world.factory) as session:
                session.execute(update(Job).values(attempt=2, worker_id="another", step=1))
            before = len(world.rows(JobEvent))
            scratch = world.settings.scratch_root / "jobs" / world.job_id.hex / "a1"
            eventually(lambda: not scratch.exists(), "the scratch directory is removed")
        assert world.job().attempt == 2
        assert world.job().step == 1
        assert len(world.rows(JobEvent)) == before

    def test_a_frozen_worker_comes_back_to_a_lost_job(self, world: World):
        """SIGSTOP for longer than the lease, then SIGCONT: its first write is refused."""
        worker = start_worker(world, "never_stops")
        try:
            world.reaches(2)
            os.killpg(worker.pid, signal.SIGSTOP)
            rules = CrashRules(3, world.settings.lease_ttl_seconds)

            def taken() -> bool:
                with transaction(world.factory) as session:
                    return bool(reap(session, rules=rules).reaped)

            eventually(taken, "the lease runs out")
            with transaction(world.factory) as session:
                session.execute(update(Job).values(queue="elsewhere"))
            before = len(world.rows(JobEvent))
            os.killpg(worker.pid, signal.SIGCONT)
            scratch = world.settings.scratch_root / "jobs" / world.job_id.hex / "a1"
            eventually(lambda: not scratch.exists(), "the zombie stops")
            assert len(world.rows(JobEvent)) == before
            assert world.job().state is JobState.QUEUED
        finally:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()

    def test_a_killed_worker_takes_its_trainer_with_it(self, world: World):
        worker = start_worker(world, "never_stops")
        try:
            world.reaches(1)
            children = [
                int(pid)
                for pid in Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
                .read_text()
                .split()
            ] or find_children(worker.pid)
            assert children
        finally:
            worker.kill()
            worker.wait()
        began = time.monotonic()
        eventually(lambda: not any(is_alive(pid) for pid in children), "the trainer is gone")
        assert time.monotonic() - began < 1


class TestOutages:
    def test_training_goes_on_while_the_database_is_away(self, world: World):
        with world.running("goes_on_alone"):
            world.reaches(5)
            with database_away(world.settings.database_url or ""):
                time.sleep(1.0)  # several checkpoints long, shorter than the lease
            eventually(lambda: world.job().state is JobState.SUCCEEDED)
        job = world.job()
        assert (job.attempt, job.crashes_without_progress) == (1, 0)
        assert [row.step for row in world.rows(Checkpoint)] == [0, 10, 20, 30]
        [slowest] = world.notes("slowest")
        assert slowest.data["seconds"] < 1

    def test_after_the_grace_a_cut_off_worker_stops(self, world: World):
        with world.running("never_stops", partition_grace_seconds=1.0):
            world.reaches(1)
            scratch = world.settings.scratch_root / "jobs" / world.job_id.hex / "a1"
            with database_away(world.settings.database_url or ""):
                eventually(lambda: not scratch.exists(), "the attempt ends")
        assert world.job().state is JobState.RUNNING  # until the reaper comes

    def test_a_stalled_connection_is_cut_and_made_anew(self, database: str):
        with Proxy(database) as proxy:
            line = Database(proxy.url, application="test", limit_seconds=0.5)
            with line.transaction() as session:
                assert session.scalar(text("SELECT 1")) == 1
            proxy.stall()
            began = time.monotonic()
            with pytest.raises(OperationalError) as caught, line.transaction() as session:
                session.scalar(text("SELECT 1"))
            assert is_outage(caught.value)
            assert time.monotonic() - began < 3
            proxy.resume()
            with line.transaction() as session:
                assert session.scalar(text("SELECT 2")) == 2
            line.close()

    def test_a_full_store_costs_a_checkpoint_and_not_the_run(self, world: World):
        worker = start_worker(world, "saves_too_much", max_file_bytes=100_000)
        assert worker.wait(60) == 0
        job = world.job()
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1), job.error
        assert [row.step for row in world.rows(Checkpoint)] == [0, 20, 30]
        [note] = world.notes("disk_full")
        assert note.data["step"] == 10
        names = world.storage.list_names(f"jobs/{job.id.hex}/checkpoints/a1/b0")
        assert names == ["step-0", "step-20", "step-30"]


class TestScratch:
    def test_what_a_killed_worker_left_is_cleared_and_what_is_in_use_is_not(self, tmp_path: Path):
        left, held = tmp_path / "jobs/x/a1", tmp_path / "jobs/x/a2"
        left.mkdir(parents=True)
        (left / ".lock").touch()
        old, new = tmp_path / "inputs/old", tmp_path / "inputs/new"
        for path in (old, new):
            path.mkdir(parents=True)
        os.utime(old, (0, 0))
        with using(held):
            assert sorted(clear_scratch(tmp_path)) == sorted([left, old])
            assert held.exists()
            assert new.exists()
            assert not left.exists()
        assert not held.exists()

    def test_sockets_of_killed_workers_are_removed_and_others_are_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(tempfile, "tempdir", "/tmp")
        left = Path(tempfile.mkdtemp(prefix=PREFIX))
        live = Channel()
        clear_sockets()
        assert not left.exists()
        assert Path(live.path).exists()
        live.close()
        assert not Path(live.path).exists()


class TestNode:
    def test_it_finds_jobs_without_a_bell_and_is_on_the_roll(self, world: World):
        node = world.node("whole")
        node.start()
        eventually(lambda: world.job().state is JobState.SUCCEEDED)
        with transaction(world.factory) as session:
            assert session.scalars(select(Worker.id)).all() == [node.worker_id]
        node.stop()
        with transaction(world.factory) as session:
            assert session.scalar(select(func.count()).select_from(Worker)) == 0

    def test_a_claim_whose_reply_was_lost_is_taken_up(self, world: World):
        node = world.node("whole")
        with transaction(world.factory) as session:
            claim_job(session, worker_id=node.worker_id, free_slots=1, queues=("default",), ttl=60)
        node._may_hold_unknown = True
        assert node.serve() == 1
        node.stop()
        assert (world.job().state, world.job().attempt) == (JobState.SUCCEEDED, 1)

    def test_a_slot_that_another_process_holds_is_not_given(self, tmp_path: Path):
        lock = tmp_path / "gpu-0.lock"
        mine, other = (Slots([Slot(0, "0", lock)], "gpu") for _ in range(2))
        taken = mine.take_free()
        assert len(taken) == 1
        assert other.take_free() == []
        mine.give_back(taken)
        taken = other.take_free()
        assert len(taken) == 1
        other.give_back(taken)


def start_worker(
    world: World, scenario: str, *, max_file_bytes: int = -1
) -> "subprocess.Popen[bytes]":
    """A worker process of its own, in its own process group."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({max_file_bytes}, -1));"
        " import sys; from app.settings import load_settings;"
        " from workers.supervisor import Node; from workers.supervisor.slots import Slot, Slots;"
        " Node(load_settings(), Slots([Slot(0, None, None)], 'cpu'),"
        f" command=[sys.executable, {str(SCRIPT)!r}, {scenario!r}]).serve()"
    )
    settings = world.settings
    environment = os.environ | {
        "RETAIN_DATABASE_URL": settings.database_url or "",
        "RETAIN_DATA_DIR": str(settings.data_dir),
        "RETAIN_LEASE_TTL_SECONDS": str(settings.lease_ttl_seconds),
        "RETAIN_BEAT_SECONDS": str(settings.beat_seconds),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if max_file_bytes > 0 else None,
    )


def find_children(pid: int) -> list[int]:
    """Children of any of a process's threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except FileNotFoundError:
        return False
    return not status.startswith("Z")


@contextmanager
def database_away(url: str) -> Iterator[None]:
    """No connection to a database lives or can be made."""
    server, _, name = url.rpartition("/")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        switch = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
        connection.execute(switch.format(sql.Identifier(name), sql.SQL("false")))
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        try:
            yield
        finally:
            connection.execute(switch.format(sql.Identifier(name), sql.SQL("true")))


class Proxy:
    """A TCP proxy before a database that can stop passing bytes on while it still accepts them."""

    def __init__(self, url: str) -> None:
        head, _, tail = url.rpartition("@")
        host, _, port = tail.partition("/")[0].partition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = []
        self.url = f"{head}@127.0.0.1:{self._server.getsockname()[1]}/{tail.partition('/')[2]}"

    def stall(self) -> None:
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._flowing.set()
        self._server.close()
        for peer in self._sockets:
            peer.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            upstream = socket.create_connection(self._target)
            self._sockets += [client, upstream]
            for source, sink in ((client, upstream), (upstream, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._flowing.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

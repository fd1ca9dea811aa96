"""Scheduled evaluations: queued by the scheduler, measured by a worker, judged by the monitor."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select

from app.control.monitors import sweep
from app.db.models import (
    BaseModel,
    BenchmarkVersion,
    Evaluation,
    File,
    Job,
    ModelVersion,
    MonitorLook,
    WebhookEvent,
)
from app.db.session import SessionFactory, transaction
from app.domain.aliases import Promote
from app.domain.monitors import CreateMonitor
from app.domain.states import JobKind, JobState
from app.services.aliases import promote
from app.services.aliases_query import get_alias
from app.services.monitors import create_monitor, get_monitor
from app.services.storage import Storage
from app.settings import Settings
from tests.deployed import ALIAS, NAME, Deployed, make_deployed, store_items
from workers.supervisor import Node
from workers.supervisor.slots import Slot, Slots

SCRIPT = Path(__file__).with_name("scripted_trainer.py")


@dataclass
class World:
    """A deployed model whose files really lie in a store, and its monitor."""

    factory: SessionFactory
    settings: Settings
    deployed: Deployed
    monitor_id: UUID

    def work(self, scenario: str) -> Job:
        """The scheduler queues what is due, a worker serves it; the job as it then is."""
        sweep(self.factory)
        slots = Slots([Slot(0, None, None)], "cpu")
        node = Node(self.settings, slots, command=[sys.executable, str(SCRIPT), scenario])
        self.serve(node)
        with transaction(self.factory) as session:
            return session.scalars(select(Job).where(Job.kind == JobKind.EVALUATION)).one()

    def serve(self, node: Node) -> None:
        node.serve()
        for _ in range(200):
            with transaction(self.factory) as session:
                waiting = session.scalar(
                    select(func.count()).where(
                        Job.kind == JobKind.EVALUATION, Job.state == JobState.QUEUED
                    )
                )
            if not waiting:
                break
            node.serve()
        node.stop()

    def read(self, query: Callable[[Any], Any]) -> Any:
        with transaction(self.factory) as session:
            return query(session)

    def alias(self) -> int:
        found: int = self.read(
            lambda s: get_alias(s, self.deployed.project.id, NAME, ALIAS).version.row.version
        )
        return found


@pytest.fixture
def world(
    committed_factory: SessionFactory, database: str, settings: Settings, tmp_path: Path
) -> World:
    quick = settings.model_copy(
        update={
            "database_url": database,
            "lease_ttl_seconds": 2.0,
            "beat_seconds": 0.3,
            "poll_seconds": 0.2,
        }
    )
    storage = Storage(quick.storage_root)
    for name, content in (("base", b"b"), ("model", b"w")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    with transaction(committed_factory) as session:
        deployed = make_deployed(session)
        deployed.job.move_to(JobState.SUCCEEDED)
        deployed.job.worker_id = deployed.job.lease_expires_at = None
        deployed.job.finished_at = func.clock_timestamp()
        store_items(session, storage, deployed.benchmark)
        version = session.get_one(BenchmarkVersion, deployed.benchmark.id)
        file = session.get_one(File, version.file_id)
        local = tmp_path / "items"
        local.write_bytes(storage.read_bytes(file.path))
        stored = storage.put_file(local, "files/items")
        file.path, file.sha256, version.items_sha256 = stored.path, stored.sha256, stored.sha256
        base = session.get_one(BaseModel, deployed.job.base_model_id)
        put = storage.put_directory(tmp_path / "base", "models/base")
        base.path, base.sha256 = put.path, put.sha256
        put = storage.put_directory(tmp_path / "model", "models/two")
        model = session.get_one(ModelVersion, deployed.models[1].id)
        model.path, model.sha256 = put.path, put.sha256
        body = {
            "model": f"{NAME}@{ALIAS}",
            "benchmarks": [{"name": deployed.benchmark_name}],
            "schedule": {"every_hours": 6},
            "on_regression": {"compensate": False},
        }
        row = create_monitor(session, deployed.project.id, CreateMonitor.model_validate(body))
        monitor_id = row.monitor.id
    return World(committed_factory, quick, deployed, monitor_id)


@pytest.mark.parametrize(("scenario", "attempts"), [("measures", 1), ("measures_at_last", 2)])
def test_a_scheduled_evaluation_finds_the_regression_and_moves_the_alias_back(
    world: World, scenario: str, attempts: int
) -> None:
    job = world.work(scenario)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, attempts), job.error
    assert job.report is not None
    assert job.report["monitor"]["rolled_back_to"] == 1
    assert world.alias() == 1
    looks = world.read(lambda s: s.scalars(select(MonitorLook)).all())
    assert [(look.verdict, look.source, look.look) for look in looks] == [
        ("regress", "schedule", 1)
    ]
    assert looks[0].reading["drop"] == pytest.approx(1 / 6)
    rows = world.read(
        lambda s: s.scalars(
            select(Evaluation).where(Evaluation.source == "run", Evaluation.purpose == "monitor")
        ).all()
    )
    assert [(row.subject_key, row.value) for row in rows] == [
        (world.deployed.models[1].name, pytest.approx(0.5))
    ]
    # The base had never been measured under these weights: now it has a baseline for good.
    own = world.read(
        lambda s: s.scalars(
            select(Evaluation).where(Evaluation.purpose == "baseline").order_by(Evaluation.seq)
        ).all()
    )
    assert own[-1].value == pytest.approx(0.6)
    kinds = world.read(lambda s: s.scalars(select(WebhookEvent.type)).all())
    assert "monitor.regression_detected" in kinds
    shown = world.read(lambda s: get_monitor(s, world.deployed.project.id, world.monitor_id))
    assert shown.row.monitor.evaluation_job_id == job.id


def test_what_the_alias_has_left_is_measured_and_not_judged(world: World) -> None:
    sweep(world.factory)
    with transaction(world.factory) as session:
        promote(session, world.deployed.caller, NAME, ALIAS, Promote(version=1))
    job = world.work("measures")
    assert job.state is JobState.SUCCEEDED, job.error
    assert world.alias() == 1
    assert world.read(lambda s: s.scalars(select(MonitorLook)).all()) == []
    kept = world.read(
        lambda s: s.scalars(select(Evaluation).where(Evaluation.subject_type == "model")).all()
    )
    assert [row.subject_key for row in kept] == [world.deployed.models[1].name]


def test_a_version_that_is_gone_fails_the_evaluation(world: World) -> None:
    sweep(world.factory)
    with transaction(world.factory) as session:
        session.get_one(
            ModelVersion, world.deployed.models[1].id
        ).deleted_at = func.clock_timestamp()
    job = world.work("measures")
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error["code"] == "model_not_found"

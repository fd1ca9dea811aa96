"""Rows for tests: plain functions with sensible values, any of which a keyword replaces."""

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy import func, text
from sqlalchemy.orm import Session

from app.db.models import (
    ApiKey,
    BaseModel,
    Benchmark,
    BenchmarkVersion,
    Checkpoint,
    File,
    Job,
    ModelVersion,
    Project,
    SuiteEntry,
)
from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.policy import Policy
from app.domain.spec import CreateJob, JobSpec, LoraConfig, ResolvedTraining
from app.domain.states import CheckpointStatus, JobKind, JobState
from app.domain.strategies import StrategyConfig

Row = TypeVar("Row")


def make_project(session: Session, **overrides: Any) -> Project:
    """A tenant."""
    return _add(session, Project(**{"name": f"project-{uuid4().hex[:8]}"} | overrides))


def make_key(session: Session, project: Project | None = None, **overrides: Any) -> ApiKey:
    """An API key's row; its secret is `secret` (a client's key is made by `services.keys`)."""
    fields = {
        "project_id": (project or make_project(session)).id,
        "name": "key",
        "key_id": uuid4().hex[:8],
        "secret_sha256": hashlib.sha256(b"secret").hexdigest(),
        "scopes": ["jobs:read", "jobs:write"],
    }
    return _add(session, ApiKey(**fields | overrides))


def make_file(session: Session, project: Project | None = None, **overrides: Any) -> File:
    """An uploaded file's row; nothing is stored for it."""
    name = uuid4().hex
    fields = {
        "project_id": None if project is None else project.id,
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "size_bytes": 100,
        "sha256": hashlib.sha256(name.encode()).hexdigest(),
        "path": f"files/{name}",
        "status": "processed",
        "report": {"format": "chat", "num_rows": 10},
    }
    return _add(session, File(**fields | overrides))


def make_base_model(session: Session, **overrides: Any) -> BaseModel:
    """A registered base model; nothing is stored for it."""
    name = f"tiny-{uuid4().hex[:8]}"
    fields = {
        "name": name,
        "source": "/models/tiny",
        "sha256": hashlib.sha256(name.encode()).hexdigest(),
        "path": f"models/{name}",
        "size_bytes": 1000,
        "details": {"num_parameters": 100_000, "context_length": 256, "vocab_size": 300},
        "has_chat_template": True,
    }
    return _add(session, BaseModel(**fields | overrides))


def make_benchmark(
    session: Session,
    project: Project | None = None,
    *,
    name: str | None = None,
    **overrides: Any,
) -> BenchmarkVersion:
    """A benchmark with one version; the version is what is returned."""
    row = Benchmark(
        project_id=None if project is None else project.id, name=name or f"bench-{uuid4().hex[:8]}"
    )
    _add(session, row)
    fields: dict[str, Any] = {
        "benchmark_id": row.id,
        "version": 1,
        "kind": BenchmarkKind.GENERAL,
        "scorer": Scorer.MULTIPLE_CHOICE,
        "num_items": 100,
        "chance": 0.25,
    } | overrides
    if "file_id" not in fields:
        file = make_file(session, project, purpose="evals")
        fields |= {"file_id": file.id, "items_sha256": file.sha256}
    return _add(session, BenchmarkVersion(**fields))


def make_second_version(session: Session, first: BenchmarkVersion) -> BenchmarkVersion:
    """The next version of a benchmark, with other items."""
    return _add(
        session,
        BenchmarkVersion(
            benchmark_id=first.benchmark_id,
            version=2,
            kind=first.kind,
            scorer=first.scorer,
            file_id=first.file_id,
            items_sha256="2" * 64,
            num_items=50,
            chance=0.25,
        ),
    )


def make_suite(
    session: Session, base: BaseModel, versions: Sequence[BenchmarkVersion], **overrides: Any
) -> list[SuiteEntry]:
    """A base model's suite."""
    return [
        _add(
            session,
            SuiteEntry(
                **{"base_model_id": base.id, "benchmark_version_id": version.id} | overrides
            ),
        )
        for version in versions
    ]


def make_training(**overrides: Any) -> ResolvedTraining:
    """Every number of a short run."""
    fields: dict[str, Any] = {
        "type": "full",
        "lora": LoraConfig(),
        "n_epochs": 1,
        "batch_size": 4,
        "total_steps": 20,
        "learning_rate": 1e-3,
        "max_seq_length": 64,
        "warmup_ratio": 0.0,
        "lr_scheduler": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_tokens_per_micro_batch": 512,
        "gradient_checkpointing": False,
        "checkpoint_interval": None,
        "precision": "fp32",
        "seed": 0,
    }
    return ResolvedTraining.model_validate(fields | overrides)


def make_spec(
    *,
    model: str = "tiny",
    training_file: str = "file-0",
    training: ResolvedTraining | None = None,
    strategies: tuple[StrategyConfig, ...] = (),
    policy: Policy | None = None,
) -> JobSpec:
    """A validated job."""
    retention = {} if policy is not None else {"retention": None}
    return JobSpec(
        request=CreateJob.model_validate(
            {"model": model, "training_file": training_file} | retention
        ),
        training=training or make_training(),
        strategies=strategies,
        strategies_why=None,
        policy=policy,
    )


def make_job(session: Session, project: Project | None = None, **overrides: Any) -> Job:
    """A job, queued unless `state` says otherwise; a leased one has a lease of a minute."""
    project = project or make_project(session)
    fields: dict[str, Any] = {
        "project_id": project.id,
        "kind": JobKind.FINE_TUNING,
        "state": JobState.QUEUED,
    } | overrides
    if "base_model_id" not in fields:
        fields["base_model_id"] = make_base_model(session).id
    if fields["kind"] is JobKind.FINE_TUNING and "training_file_id" not in fields:
        fields["training_file_id"] = make_file(session, project).id
    if "spec" not in fields:
        fields["spec"] = make_spec().model_dump(mode="json")
    state = JobState(fields["state"])
    if state.is_leased:
        fields = {"worker_id": "worker", "lease_expires_at": lease(60), "attempt": 1} | fields
    if state.is_terminal:
        fields = {"finished_at": func.clock_timestamp()} | fields
    job = _add(session, Job(**fields))
    session.refresh(job)
    return job


def make_checkpoint(session: Session, job: Job, **overrides: Any) -> Checkpoint:
    """A saved training state's row; nothing is stored for it."""
    fields: dict[str, Any] = {
        "job_id": job.id,
        "attempt": job.attempt,
        "branch": job.branch,
        "step": 10,
        "status": CheckpointStatus.UNPROVEN,
        "manifest_sha256": "0" * 64,
        "size_bytes": 1000,
        "metrics": {},
    } | overrides
    point = "a{attempt}/b{branch}/step-{step}".format_map(fields)
    return _add(session, Checkpoint(**{"path": f"jobs/{job.id.hex}/checkpoints/{point}"} | fields))


def make_model_version(session: Session, job: Job, **overrides: Any) -> ModelVersion:
    """A published model version of a job; nothing is stored for it."""
    fields = {
        "project_id": job.project_id,
        "name": f"ft:tiny:project::{uuid4().hex[:8]}",
        "base_model_id": job.base_model_id,
        "job_id": job.id,
        "status": "ready",
        "kind": "adapter",
        "alpha": 1.0,
        "path": f"models/{uuid4().hex}",
        "sha256": "0" * 64,
        "size_bytes": 1000,
        "retention": "held",
    }
    return _add(session, ModelVersion(**fields | overrides))


def lease(seconds: float) -> Any:
    """An SQL expression: so many seconds from now on the database's clock; negative has expired."""
    return func.clock_timestamp() + text(f"interval '{seconds} seconds'")


def _add(session: Session, row: Row) -> Row:
    session.add(row)
    session.flush()
    return row

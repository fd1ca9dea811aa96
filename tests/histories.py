"""Builders of running jobs with benchmarks, baselines, checkpoints and messages; real rows, no mocks."""

from typing import Any
from uuid import uuid4

import numpy as np
from sqlalchemy import func

from app.db.models import (
    BaseModel,
    Benchmark,
    BenchmarkVersion,
    Checkpoint,
    File,
    Job,
    Project,
)
from app.domain.benchmarks import BenchmarkKind, BenchmarkScores, Scorer, pack_array
from app.domain.messages import Carry, Evaluated
from app.domain.policy import Ladder, Policy, Retention
from app.domain.runplan import BasePlan, BenchmarkPlan
from app.domain.spec import CreateJob, JobSpec, LoraConfig, ResolvedTraining
from app.domain.states import CheckpointStatus, JobKind, JobState
from app.domain.strategies import EwcConfig
from app.services.monitoring import record_baseline

ITEMS = 2000
BASE = BasePlan(name="tiny", directory="/base", sha256="b" * 64, default_template=True)
RETENTION = Retention()
POLICY = Policy(ladder=Ladder(repair=False))
CARRY = Carry(cursors={"domain": 120}, rng={"torch": "AAAA"})


def make_spec(policy: Policy | None, retention: Retention | None) -> JobSpec:
    return JobSpec(
        request=CreateJob(model="tiny", training_file="file-1", retention=retention),
        training=ResolvedTraining(
            type="full",
            lora=LoraConfig(),
            n_epochs=1,
            batch_size=8,
            total_steps=120,
            learning_rate=5e-3,
            max_seq_length=64,
            warmup_ratio=0.0,
            lr_scheduler="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_tokens_per_micro_batch=1024,
            gradient_checkpointing=False,
            checkpoint_interval=None,
            precision="fp32",
            seed=0,
        ),
        strategies=(EwcConfig(strength=1.0),),
        strategies_why=None,
        policy=policy,
    )


def make_version(session, project, scorer=Scorer.MULTIPLE_CHOICE, kind=BenchmarkKind.GENERAL):
    """A benchmark version of 2,000 items called `i0`, `i1`, ...; its file is not stored."""
    file = File(
        project_id=project.id,
        filename="items.jsonl",
        purpose="evals",
        size_bytes=1,
        sha256=uuid4().hex * 2,
        path="files/none",
        status="processed",
    )
    benchmark = Benchmark(project_id=project.id, name=f"{scorer}-{uuid4().hex[:6]}")
    session.add_all([file, benchmark])
    session.flush()
    version = BenchmarkVersion(
        benchmark_id=benchmark.id,
        version=1,
        kind=kind,
        scorer=scorer,
        file_id=file.id,
        items_sha256=file.sha256,
        num_items=ITEMS,
        chance=0.25 if scorer is Scorer.MULTIPLE_CHOICE else 0.0,
    )
    session.add(version)
    session.flush()
    return version


def make_running_job(
    session, *, policy=POLICY, retention=RETENTION, scorers=(Scorer.MULTIPLE_CHOICE,)
):
    project = Project(name=f"p-{uuid4().hex[:8]}")
    base = BaseModel(
        name=f"tiny-{uuid4().hex[:8]}",
        source="/base",
        sha256="b" * 64,
        path="models/tiny",
        size_bytes=1,
        details={},
        has_chat_template=False,
    )
    session.add_all([project, base])
    session.flush()
    versions = [make_version(session, project, scorer) for scorer in scorers]
    plans = [
        BenchmarkPlan(
            benchmark_version_id=str(version.id),
            name=f"{version.scorer}",
            kind=BenchmarkKind.GENERAL,
            scorer=version.scorer,
            weight=1.0,
            max_drop=None,
            path="/items.jsonl",
            sha256=version.items_sha256,
        )
        for version in versions
    ]
    key = uuid4().hex * 2
    job = Job(
        project_id=project.id,
        kind=JobKind.FINE_TUNING,
        state=JobState.RUNNING,
        spec=make_spec(policy, retention).model_dump(mode="json"),
        run_plan={
            "base": BASE.model_copy(update={"sha256": key}).model_dump(mode="json"),
            "benchmarks": [plan.model_dump(mode="json") for plan in plans],
            "gate_items": ITEMS // 2,
        },
        base_model_id=base.id,
        worker_id="w1",
        lease_expires_at=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 1),
        attempt=1,
        total_steps=120,
    )
    session.add(job)
    session.flush()
    session.refresh(job)
    return job, versions


def make_scores(
    version, *, right=1200, lost=0, scored=slice(None), item_set="gate"
) -> BenchmarkScores:
    """The first `right` items right but for the first `lost`; nats 300 a text of 100 tokens for `nll`."""
    values = np.zeros(ITEMS, dtype=np.float32)
    tokens = None
    if version.scorer is Scorer.NLL:
        values[:] = 300 + lost
        tokens = pack_array(np.full(ITEMS, 100, dtype=np.float32))
    else:
        values[lost:right] = 1
    sent = np.full(ITEMS, np.nan, dtype=np.float32)
    sent[scored] = values[scored]
    return BenchmarkScores(
        benchmark_version_id=str(version.id),
        item_set=item_set,
        scores=pack_array(sent),
        tokens=tokens,
    )


def save_checkpoint(session, job, step, *, branch=0, attempt=1, status=CheckpointStatus.UNPROVEN):
    checkpoint = Checkpoint(
        job_id=job.id,
        attempt=attempt,
        branch=branch,
        step=step,
        status=status,
        path=f"jobs/{job.id}/a{attempt}/b{branch}/step-{step}",
        manifest_sha256="0" * 64,
        size_bytes=1,
        metrics={},
    )
    session.add(checkpoint)
    session.flush()
    return checkpoint


def evaluated(
    versions, step=30, *, message_id=7, branch=0, is_last=False, valid_loss=1.0, lost=0, **rest
) -> Evaluated:
    return Evaluated(
        id=message_id,
        branch=branch,
        step=step,
        is_last=is_last,
        scores=tuple(make_scores(version, lost=lost) for version in versions),
        valid_loss=valid_loss,
        valid_mean_token_accuracy=0.5,
        train_loss=1.0,
        seconds=1.0,
        carry=CARRY,
        **rest,
    )


def start_job(session, **rest) -> Any:
    job, versions = make_running_job(session, **rest)
    record_baseline(session, job, [make_scores(version) for version in versions])
    return job, versions

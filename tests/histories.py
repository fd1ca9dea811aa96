"""Builders of running jobs with benchmarks, baselines, checkpoints and messages; real rows, no mocks."""

from typing import Any

import numpy as np

from app.db.models import BenchmarkVersion, Checkpoint
from app.domain.benchmarks import BenchmarkKind, BenchmarkScores, Scorer, pack_array
from app.domain.configs.quadratic import EwcConfig
from app.domain.messages import Carry, Evaluated
from app.domain.policy import Ladder, Policy, Retention
from app.domain.runplan import BasePlan, BenchmarkPlan
from app.domain.spec import CreateJob, JobSpec
from app.domain.states import JobState
from app.services.monitoring import record_baseline
from tests.factories import (
    make_base_model,
    make_benchmark,
    make_checkpoint,
    make_job,
    make_project,
    make_training,
)

ITEMS = 2000
RETENTION = Retention()
POLICY = Policy(ladder=Ladder(repair=False))
CARRY = Carry(cursors={"domain": 120}, rng={"torch": "AAAA"})


def make_running_job(
    session,
    *,
    policy=POLICY,
    retention=RETENTION,
    scorers=(Scorer.MULTIPLE_CHOICE,),
    project=None,
) -> tuple[Any, list[BenchmarkVersion]]:
    """A claimed job (attempt 1, branch 0) that watches one benchmark of 2,000 items a scorer; EWC at strength 1."""
    project = project or make_project(session)
    versions = [
        make_benchmark(
            session,
            project,
            scorer=scorer,
            num_items=ITEMS,
            chance=0.25 if scorer is Scorer.MULTIPLE_CHOICE else 0.0,
        )
        for scorer in scorers
    ]
    plans = [
        BenchmarkPlan(
            benchmark_version_id=str(version.id),
            name=str(version.scorer),
            kind=BenchmarkKind.GENERAL,
            scorer=version.scorer,
            weight=1.0,
            max_drop=None,
            path="/items.jsonl",
            sha256=version.items_sha256,
        )
        for version in versions
    ]
    base = make_base_model(session)
    plan = BasePlan(name=base.name, directory="/base", sha256=base.sha256, default_template=True)
    spec = JobSpec(
        request=CreateJob(model=base.name, training_file="file-1", retention=retention),
        training=make_training(total_steps=120),
        strategies=(EwcConfig(strength=1.0),),
        strategies_why=None,
        policy=policy,
    )
    job = make_job(
        session,
        project,
        state=JobState.RUNNING,
        spec=spec.model_dump(mode="json"),
        run_plan={
            "base": plan.model_dump(mode="json"),
            "benchmarks": [plan.model_dump(mode="json") for plan in plans],
            "gate_items": ITEMS // 2,
        },
        base_model_id=base.id,
        total_steps=120,
    )
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


def save_checkpoint(session, job, step, **overrides) -> Checkpoint:
    """A checkpoint of attempt 1 on branch 0, not evaluated yet."""
    return make_checkpoint(session, job, **{"branch": 0, "attempt": 1, "step": step} | overrides)


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


def start_job(session, **rest) -> tuple[Any, list[BenchmarkVersion]]:
    """A running job whose baseline is measured: 1,200 of 2,000 right, or 3 nats a token."""
    job, versions = make_running_job(session, **rest)
    record_baseline(session, job, [make_scores(version) for version in versions])
    return job, versions

"""Evaluations as rows: baselines shared across jobs, scores of checkpoints, and what the sensor reads of them."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from app.db.models import BaseModel, BenchmarkVersion, Evaluation, Job
from app.db.repositories.history import HistoryRepository
from app.domain.benchmarks import (
    BenchmarkKind,
    BenchmarkScores,
    Scorer,
    Scores,
    pack_array,
    unpack_array,
)
from app.domain.policy import EarlyStopping, Policy
from app.domain.power import PlannedBenchmark
from app.domain.runplan import BasePlan, BenchmarkPlan
from app.domain.sensing import SensedBenchmark, Summary
from app.domain.spec import JobSpec
from app.errors import BadRequest, Conflict


@dataclass(frozen=True, slots=True)
class Watch:
    """What a job watches, read from its spec and its run plan."""

    policy: Policy
    is_watched: bool  # False: retention is off or there is no suite, `policy` then limits nothing
    baseline_key: str
    benchmarks: tuple[BenchmarkPlan, ...]
    versions: Mapping[UUID, BenchmarkVersion]
    gate_items: int | None

    def general(self) -> list[BenchmarkPlan]:
        """The benchmarks that must not drop."""
        return [plan for plan in self.benchmarks if plan.kind is BenchmarkKind.GENERAL]


@dataclass(frozen=True, slots=True)
class EvaluationPoint:
    """Where in a run something was scored, and what for."""

    purpose: Literal["gate", "report"]
    branch: int
    step: int
    checkpoint_id: UUID | None


def row_id(text: str) -> UUID:
    """The uuid in an internal message, which names rows by their bare uuid or their public id.

    Raises:
        BadRequest: There is none.
    """
    try:
        return UUID(text.rpartition("_")[2])
    except ValueError:
        raise BadRequest(f"'{text[:80]}' names no row.", code="unknown_id") from None


def base_plan(base: BaseModel) -> BasePlan:
    """A registered base model as plans name it, without a directory."""
    return BasePlan(
        name=base.name,
        directory="",
        sha256=base.sha256,
        default_template=not base.has_chat_template,
    )


def baseline_key(base: BasePlan) -> str:
    """What a baseline depends on beside the benchmark version: the weights and the template that renders items.

    A quantised base is another model: its scores are never compared with those of the whole one.
    """
    key = f"{base.sha256}/{'plain' if base.default_template else 'own'}"
    return key if base.quantization == "none" else f"{key}/{base.quantization}"


def load_watch(session: Session, job: Job) -> Watch:
    """What a claimed job watches.

    Raises:
        Conflict: The job has no run plan yet.
    """
    if job.run_plan is None:
        raise Conflict("The job has not started yet, so there is no baseline to compare with.")
    spec = JobSpec.model_validate(job.spec)
    benchmarks = tuple(
        BenchmarkPlan.model_validate(plan) for plan in job.run_plan.get("benchmarks", ())
    )
    versions = HistoryRepository(session).list_versions(
        [row_id(plan.benchmark_version_id) for plan in benchmarks]
    )
    unwatched = Policy(early_stopping=EarlyStopping(enabled=False))
    return Watch(
        policy=unwatched if spec.policy is None else spec.policy,
        is_watched=spec.policy is not None,
        baseline_key=baseline_key(BasePlan.model_validate(job.run_plan["base"])),
        benchmarks=benchmarks,
        versions=versions,
        gate_items=job.run_plan.get("gate_items"),
    )


def find_baseline(session: Session, base: BasePlan, version_id: UUID) -> BenchmarkScores | None:
    """The cached scores of a base model on a benchmark version, for a run plan; NaN where not scored yet."""
    row = HistoryRepository(session).find_baseline(baseline_key(base), version_id)
    if row is None or row.scores is None:
        return None
    return BenchmarkScores(
        benchmark_version_id=str(version_id),
        item_set="all",
        scores=base64.b64encode(row.scores).decode(),
        tokens=None if row.tokens is None else base64.b64encode(row.tokens).decode(),
    )


def merge_baseline(
    session: Session, key: str, version: BenchmarkVersion, name: str, scores: BenchmarkScores
) -> Evaluation:
    """Adds scores to a base model's baseline; an item that has a score keeps it, so readings never shift."""
    history = HistoryRepository(session)
    row = history.find_baseline(key, version.id, lock=True)
    values, tokens = unpack_scores(scores, version)
    if row is not None and row.scores is not None:
        known = unpack_bytes(row.scores)
        is_known = ~np.isnan(known)
        values = np.where(is_known, known, values)
        if tokens is not None and row.tokens is not None:
            tokens = np.where(is_known, unpack_bytes(row.tokens), tokens)
    else:
        row = Evaluation(
            subject_type="base_model",
            subject_key=key,
            benchmark_version_id=version.id,
            benchmark=name,
            metric=str(version.scorer),
            purpose="baseline",
            source="run",
        )
        session.add(row)
    fill_scores(row, values, tokens)
    session.flush()
    return row


def add_evaluation(
    session: Session,
    job: Job,
    version: BenchmarkVersion,
    name: str,
    scores: BenchmarkScores,
    point: EvaluationPoint,
) -> Evaluation:
    """Writes one benchmark's scores of a run's checkpoint."""
    row = Evaluation(
        project_id=job.project_id,
        subject_type="fine_tuning.job",
        subject_key=str(job.id),
        job_id=job.id,
        checkpoint_id=point.checkpoint_id,
        benchmark_version_id=version.id,
        benchmark=name,
        metric=str(version.scorer),
        purpose=point.purpose,
        source="run",
        branch=point.branch,
        step=point.step,
    )
    fill_scores(row, *unpack_scores(scores, version))
    session.add(row)
    return row


def fill_scores(row: Evaluation, values: Scores, tokens: Scores | None) -> None:
    """Sets scores, mean, standard error and number of items; of `nll` in nats per token."""
    row.scores = pack_bytes(values)
    row.tokens = None if tokens is None else pack_bytes(tokens)
    scored = ~np.isnan(values)
    row.n_samples = int(scored.sum())
    found = values[scored].astype(np.float64)
    finite = found[np.isfinite(found)]
    if not finite.size:
        row.value, row.stderr = math.nan, None
        return
    if tokens is None:
        row.value = float(finite.mean())
        row.stderr = float(finite.std(ddof=1)) / math.sqrt(finite.size) if finite.size > 1 else None
        return
    counts = tokens[scored].astype(np.float64)[np.isfinite(found)]
    row.value = float(finite.sum() / counts.sum())
    residuals = finite - row.value * counts
    row.stderr = (
        float(np.sqrt((residuals**2).sum() * finite.size / (finite.size - 1)) / counts.sum())
        if finite.size > 1
        else None
    )


def sense_scores(
    session: Session,
    watch: Watch,
    scores: Sequence[BenchmarkScores],
    *,
    plans: Sequence[BenchmarkPlan] | None = None,
) -> list[SensedBenchmark]:
    """Benchmarks as the sensor takes them, the watched general ones unless named: scores paired with the baseline by item.

    An item with NaN was not to be scored and drops out; when that leaves nothing although the benchmark was
    sent, the model gave no number at all.
    """
    sent = {row_id(found.benchmark_version_id): found for found in scores}
    sensed = []
    for plan in watch.general() if plans is None else plans:
        version_id = row_id(plan.benchmark_version_id)
        found = sent.get(version_id)
        if found is None:
            sensed.append(sense(session, watch, plan, None, None))
            continue
        values, tokens = unpack_scores(found, watch.versions[version_id])
        if np.isnan(values).all():
            values = np.full_like(values, np.inf)
        sensed.append(sense(session, watch, plan, values, tokens))
    return sensed


def sense(
    session: Session,
    watch: Watch,
    plan: BenchmarkPlan,
    values: Scores | None,
    tokens: Scores | None,
    summary: Summary | None = None,
) -> SensedBenchmark:
    """One benchmark against its baseline; without values by its summary."""
    version_id = row_id(plan.benchmark_version_id)
    version = watch.versions[version_id]
    row = HistoryRepository(session).find_baseline(watch.baseline_key, version_id)
    baseline = np.full(version.num_items, np.nan, dtype=np.float32)
    baseline_tokens = None
    if row is not None and row.scores is not None:
        baseline = unpack_bytes(row.scores)
        baseline_tokens = None if row.tokens is None else unpack_bytes(row.tokens)
    kept = np.ones(baseline.shape, dtype=bool) if values is None else ~np.isnan(values)
    return SensedBenchmark(
        name=plan.name,
        benchmark_version_id=str(version_id),
        scorer=plan.scorer,
        weight=plan.weight,
        max_drop=plan.max_drop,
        baseline=baseline[kept],
        current=None if values is None else values[kept],
        baseline_tokens=None if baseline_tokens is None else baseline_tokens[kept],
        current_tokens=None if tokens is None else tokens[kept],
        summary=summary,
        chance=version.chance,
    )


def plan_power(session: Session, watch: Watch) -> list[PlannedBenchmark]:
    """The watched general benchmarks as `power` takes them, with the baselines there are."""
    planned = []
    for plan in watch.general():
        seen = sense(session, watch, plan, None, None)
        half = watch.versions[row_id(plan.benchmark_version_id)].num_items // 2
        has_baseline = bool(np.isfinite(seen.baseline).any())
        planned.append(
            PlannedBenchmark(
                name=plan.name,
                scorer=plan.scorer,
                weight=plan.weight,
                max_drop=plan.max_drop,
                n_items=half if watch.gate_items is None else min(watch.gate_items, half),
                baseline=seen.baseline if has_baseline else None,
                baseline_tokens=seen.baseline_tokens,
                chance=seen.chance,
            )
        )
    return planned


def unpack_scores(
    scores: BenchmarkScores, version: BenchmarkVersion
) -> tuple[Scores, Scores | None]:
    """Scores and token counts, checked against the version's length.

    Raises:
        BadRequest: Of another length, or `nll` without token counts.
    """
    values = unpack_array(scores.scores)
    tokens = None if scores.tokens is None else unpack_array(scores.tokens)
    for array in (values, tokens):
        if array is not None and array.shape != (version.num_items,):
            raise BadRequest(
                f"scores: {array.size} values for a benchmark of {version.num_items} items.",
                "scores",
            )
    if version.scorer is Scorer.NLL and tokens is None:
        raise BadRequest("tokens: nll scores travel with their token counts.", "tokens")
    return values, tokens if version.scorer is Scorer.NLL else None


def pack_bytes(values: Scores) -> bytes:
    """An array as it is kept beside its row: zlib of float32."""
    return base64.b64decode(pack_array(values))


def unpack_bytes(data: bytes) -> Scores:
    """The array that `pack_bytes` packed."""
    return unpack_array(base64.b64encode(data).decode())

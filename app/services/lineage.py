"""The ledger of a lineage: parents, roots, and what every version lost against both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import BaseModel, BenchmarkVersion, Evaluation, Job, ModelVersion
from app.db.repositories.lineage import LineageRepository
from app.domain.decisions import Reading
from app.domain.lineage import Loss, chain_losses, loss_of, measure_loss
from app.domain.runplan import BasePlan, BenchmarkPlan
from app.domain.sensing import SensedBenchmark
from app.services.evaluations import base_plan, baseline_key, row_id, unpack_bytes

MAX_GENERATIONS = 64  # of parents that are followed


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One model version in its lineage."""

    model: ModelVersion
    root: str  # the base model's name
    parent: str  # what it was tuned from: a version, or the root
    against_parent: Loss | None
    against_root: Loss | None


class _Scores(NamedTuple):
    """Item scores of one benchmark version."""

    benchmark: str
    weight: float
    version: BenchmarkVersion
    row: Evaluation


def base_key(base: BaseModel) -> str:
    """The key of a registered base model's baselines."""
    return baseline_key(base_plan(base))


def list_ledger(session: Session, models: Sequence[ModelVersion]) -> list[LedgerEntry]:
    """Each version with its parent and root and the drops against them, from paired item scores.

    Where the items of both ends were never scored, a drop is the version's own report verdict (against what
    its job started from), and against the root that of the steps between put together.
    """
    repository = LineageRepository(session)
    entries = []
    for model in models:
        base = session.get_one(BaseModel, model.base_model_id)
        parent = _parent_of(session, model)
        own = _scores_of(session, model)
        against_root = measure_loss(_pair(own, _root_scores(repository, model, base, own)))
        told = _told(model)
        if parent is None:
            against_root = against_root or told
            against_parent = against_root
        else:
            against_parent = measure_loss(_pair(own, _scores_of(session, parent))) or told
            against_root = against_root or chain_losses(
                _chained(session, parent, MAX_GENERATIONS), against_parent
            )
        entries.append(
            LedgerEntry(
                model=model,
                root=base.name,
                parent=base.name if parent is None else parent.name,
                against_parent=against_parent,
                against_root=against_root,
            )
        )
    return entries


def cumulative_drop(session: Session, model: ModelVersion) -> float | None:
    """The drop of the general mean against the lineage's root; None where it was never measured."""
    loss = list_ledger(session, [model])[0].against_root
    return None if loss is None else loss.drop


def _parent_of(session: Session, model: ModelVersion) -> ModelVersion | None:
    if model.parent_version_id is None:
        return None
    return session.get_one(ModelVersion, model.parent_version_id)


def _told(model: ModelVersion) -> Loss | None:
    return loss_of(None if model.verdict is None else Reading.model_validate(model.verdict))


def _chained(session: Session, model: ModelVersion, generations: int) -> Loss | None:
    """What a version lost against the root by its own scores, else by the verdicts on the way there."""
    repository = LineageRepository(session)
    base = session.get_one(BaseModel, model.base_model_id)
    own = _scores_of(session, model)
    found = measure_loss(_pair(own, _root_scores(repository, model, base, own)))
    parent = _parent_of(session, model)
    if found is not None:
        return found
    if parent is None or generations == 0:
        return _told(model) if parent is None else None
    return chain_losses(_chained(session, parent, generations - 1), _told(model))


def _scores_of(session: Session, model: ModelVersion) -> dict[UUID, _Scores]:
    """The version's item scores by benchmark version: of its job's report test, else the latest since."""
    repository = LineageRepository(session)
    job = session.get_one(Job, model.job_id)
    plans = {
        row_id(plan["benchmark_version_id"]): BenchmarkPlan.model_validate(plan)
        for plan in (job.run_plan or {}).get("benchmarks", ())
    }
    rows: dict[UUID, Evaluation] = {}
    if job.model_version_id == model.id and model.checkpoint_id is not None:
        rows |= repository.list_report(job.id, model.checkpoint_id)
    rows = repository.list_latest(model.name) | rows
    versions = repository.list_general(list(rows))
    return {
        key: _Scores(
            rows[key].benchmark, plans[key].weight if key in plans else 1.0, version, rows[key]
        )
        for key, version in versions.items()
    }


def _root_scores(
    repository: LineageRepository,
    model: ModelVersion,
    base: BaseModel,
    own: dict[UUID, _Scores],
) -> dict[UUID, _Scores]:
    """The root's cached scores on the benchmarks that the version was scored on."""
    key = _root_key(repository, model, base)
    found = {}
    for version_id, scores in own.items():
        row = repository.find_baseline(key, version_id)
        if row is not None:
            found[version_id] = scores._replace(row=row)
    return found


def _root_key(repository: LineageRepository, model: ModelVersion, base: BaseModel) -> str:
    """The root's baselines; the plan of the version's job knows which template rendered the items."""
    known = (repository.run_plan_of(model.job_id) or {}).get("base")
    if known is None:
        return base_key(base)
    plan = BasePlan.model_validate(known)
    if model.kind == "full":  # adapters of a quantised base were merged into the whole one
        plan = plan.quantized("none")
    # What the job started from may be a version itself, with baselines of its own.
    return baseline_key(plan.model_copy(update={"sha256": plan.registered_sha256}))


def _pair(after: dict[UUID, _Scores], before: dict[UUID, _Scores]) -> list[SensedBenchmark]:
    """What both were scored on, item by item; items that one lacks drop out."""
    paired = []
    for key, own in after.items():
        other = before.get(key)
        if other is None or own.row.scores is None or other.row.scores is None:
            continue
        current, baseline = unpack_bytes(own.row.scores), unpack_bytes(other.row.scores)
        scored = current == current
        tokens = own.row.tokens or other.row.tokens
        paired.append(
            SensedBenchmark(
                name=own.benchmark,
                benchmark_version_id=str(key),
                scorer=own.version.scorer,
                weight=own.weight,
                max_drop=None,
                baseline=baseline[scored],
                current=current[scored],
                baseline_tokens=None if tokens is None else unpack_bytes(tokens)[scored],
                chance=own.version.chance,
            )
        )
    return paired

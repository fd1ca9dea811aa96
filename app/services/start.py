"""Where a job starts: a base model, a published version, or a checkpoint; and how it comes to a worker's disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import BaseModel, Checkpoint, Job, ModelVersion, Project
from app.db.repositories.catalog import CatalogRepository
from app.db.repositories.checkpoints import CheckpointRepository
from app.db.repositories.registry import RegistryRepository
from app.domain.configs.adapters import DomainAdaptersConfig
from app.domain.configs.base import CAUSAL_LM
from app.domain.digests import tree_sha256
from app.domain.identifiers import model_version_name, split_checkpoint_name
from app.domain.runplan import BasePlan, LayerPlan
from app.domain.spec import JobSpec
from app.domain.strategies import StrategyConfig
from app.errors import BadRequest, NotFound
from app.services.evaluations import base_plan
from app.services.named_models import READY, model_kind
from app.services.registered_models import find_by_reference

MAX_LAYERS = 16  # checkpoints of jobs that started from checkpoints


@dataclass(frozen=True, slots=True)
class Start:
    """What a job's `model` means; `version` is the parent of what the job makes."""

    base: BaseModel
    version: ModelVersion | None = None
    checkpoint: Checkpoint | None = None
    name: str | None = None  # of the version or checkpoint; None: the base model as it is

    def plan(self, session: Session) -> BasePlan:
        """The start without directories: its digest is the key of its baselines."""
        return plan_start(session, self.base, self.version, self.checkpoint)[0]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part of a start in the store: a directory whose digest is known, or a checkpoint with a manifest."""

    path: str  # under the storage root
    sha256: str
    checkpoint_id: UUID | None  # `sha256` is then its manifest's


def find_start(session: Session, project_id: UUID, name: str) -> Start:
    """What a job may start from by this name: a base model, `ft:...`, a checkpoint of one, or `name@alias`.

    Raises:
        NotFound: The project sees no such model.
        BadRequest: It is of another kind, not ready, or its adapters can't be put into one.
    """
    base = CatalogRepository(session).find_model(name)
    if base is not None:
        if model_kind(base) != CAUSAL_LM:
            raise _unfit(f"is of kind {model_kind(base)} and not {CAUSAL_LM}", name)
        return Start(base)
    point = split_checkpoint_name(name)
    if point is not None:
        return _from_checkpoint(session, project_id, name, *point)
    if "@" in name:
        version = find_by_reference(session, project_id, name)
        if version is None:
            raise NotFound(f"model: nothing is called '{name[:80]}'.", "model", "model_not_found")
    elif name.startswith("ft:"):
        version = RegistryRepository(session).get(project_id, name)
    else:
        raise NotFound(f"model: no base model is called '{name[:80]}'.", "model", "model_not_found")
    # Whoever deletes it waits for this transaction, and then finds that a job starts from it.
    session.refresh(version, with_for_update={"read": True})
    if version.deleted_at is not None:
        raise NotFound(f"model: '{name[:200]}' was deleted.", "model", "model_not_found")
    if version.status != READY:
        raise _unfit(f"is {version.status}", name)
    _check_adapters(session.get_one(Job, version.job_id), name)
    return Start(session.get_one(BaseModel, version.base_model_id), version, None, version.name)


def check_start(start: Start, strategies: Sequence[StrategyConfig]) -> None:
    """Refuses strategies that work on a registered base model alone.

    Raises:
        BadRequest: There is one.
    """
    for place, config in enumerate(strategies):
        if start.name is not None and isinstance(config, DomainAdaptersConfig):
            raise BadRequest(
                f"retention.strategies.{place}: domain_adapters puts its adapters on a base model;"
                f" name '{start.base.name}' as the model, with one of `stages` for each domain.",
                f"retention.strategies.{place}",
                "strategy_conflict",
            )


def start_of(session: Session, job: Job) -> Start:
    """Where a submitted job starts; it is kept for it."""
    return Start(
        session.get_one(BaseModel, job.base_model_id),
        None
        if job.start_version_id is None
        else session.get_one(ModelVersion, job.start_version_id),
        None
        if job.start_checkpoint_id is None
        else session.get_one(Checkpoint, job.start_checkpoint_id),
        job.spec.get("start"),
    )


def plan_start(
    session: Session,
    base: BaseModel,
    version: ModelVersion | None,
    checkpoint: Checkpoint | None,
    *,
    depth: int = 0,
) -> tuple[BasePlan, tuple[StoredPart, ...]]:
    """A start and the parts of it, in one order: the weights, then a part for each layer; directories are empty."""
    if checkpoint is not None:
        return _plan_checkpoint(session, checkpoint, depth)
    plan = base_plan(base)
    own = StoredPart(base.path, base.sha256, None)
    if version is None:
        return plan, (own,)
    if version.deleted_at is not None or version.path is None or version.sha256 is None:
        raise NotFound(f"The model '{version.name}' is gone.", "model", "model_not_found")
    tuned = StoredPart(version.path, version.sha256, None)
    if version.kind == "full":
        changes = {"sha256": version.sha256, "root_sha256": base.sha256, "is_over_root": False}
        return plan.model_copy(update=changes), (tuned,)
    layer = LayerPlan(kind="adapter", directory="")
    return _over(plan, layer, version.sha256), (own, tuned)


def _plan_checkpoint(
    session: Session, checkpoint: Checkpoint, depth: int
) -> tuple[BasePlan, tuple[StoredPart, ...]]:
    if checkpoint.deleted_at is not None or checkpoint.corrupt:
        raise NotFound("The checkpoint to start from is gone.", "model", "checkpoint_not_found")
    if depth == MAX_LAYERS:
        raise BadRequest(
            f"model: more than {MAX_LAYERS} checkpoints lie over one another; start from a published model.",
            "model",
            "model_not_supported",
        )
    job = session.get_one(Job, checkpoint.job_id)
    source = start_of(session, job)
    plan, parts = plan_start(
        session, source.base, source.version, source.checkpoint, depth=depth + 1
    )
    training = JobSpec.model_validate(job.spec).training
    layer = LayerPlan(kind="checkpoint", directory="", training=training)
    digest = checkpoint.manifest_sha256
    return _over(plan, layer, digest), (*parts, StoredPart(checkpoint.path, digest, checkpoint.id))


def _over(plan: BasePlan, layer: LayerPlan, digest: str) -> BasePlan:
    return plan.model_copy(
        update={
            "sha256": tree_sha256({"over": plan.sha256, "layer": digest}),
            "root_sha256": plan.registered_sha256,
            "layers": (*plan.layers, layer),
        }
    )


def _from_checkpoint(
    session: Session, project_id: UUID, name: str, version_name: str, step: int
) -> Start:
    job = _job_called(session, project_id, version_name)
    checkpoint = None if job is None else CheckpointRepository(session).find_usable_at(job.id, step)
    if job is None or checkpoint is None:
        raise NotFound(
            f"model: no checkpoint that is kept is called '{name[:200]}'.",
            "model",
            "model_not_found",
        )
    if _domain_adapters(job)[0] is not None:
        raise _unfit("was saved with adapters of its own for its domains", name)
    source = start_of(session, job)
    start = Start(source.base, source.version, checkpoint, name)
    start.plan(session)  # refuses what lies over something that is gone
    return start


def _job_called(session: Session, project_id: UUID, version_name: str) -> Job | None:
    """The job whose checkpoints go by its version's name, or by the name that it had before it had one."""
    repository = RegistryRepository(session)
    job = repository.find_job_of(project_id, version_name)
    if job is not None:
        return job
    for found in repository.list_jobs_like(project_id, version_name.rpartition(":")[2]):
        base = session.get_one(BaseModel, found.base_model_id)
        project = session.get_one(Project, project_id)
        if version_name == model_version_name(base.name, project.name, found.suffix, found.id):
            return found
    return None


def _domain_adapters(job: Job) -> tuple[DomainAdaptersConfig | None, int]:
    """The job's configuration of them, where it has one, and its stages."""
    spec = JobSpec.model_validate(job.spec)
    found = (c for c in spec.strategies if isinstance(c, DomainAdaptersConfig))
    return next(found, None), len(spec.stages)


def _check_adapters(job: Job, name: str) -> None:
    """Refuses what is made of several adapters, or of bottlenecks: they can't be put into the weights as one."""
    config, num_stages = _domain_adapters(job)
    if config is not None and (config.kind == "bottleneck" or num_stages > 1):
        raise _unfit("has adapters of its own for its domains", name)


def _unfit(why: str, name: str) -> BadRequest:
    return BadRequest(
        f"model: '{name[:200]}' {why}, so no job can start from it.",
        "model",
        "model_not_supported",
    )

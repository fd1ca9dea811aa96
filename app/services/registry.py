"""The models a project can name: base models, and its published versions; points published anew."""

from dataclasses import dataclass
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from app.db.models import BaseModel, Checkpoint, Job, ModelVersion
from app.db.repositories.catalog import CatalogRepository
from app.db.repositories.deployment import DeploymentRepository
from app.db.repositories.project_jobs import ProjectJobRepository
from app.db.repositories.registry import RegistryRepository
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import model_version_name, public_id
from app.domain.requests import PublishPoint
from app.domain.spec import ExportSpec, JobSpec
from app.domain.states import JobKind, JobState
from app.errors import Conflict, Forbidden
from app.services.audit import sign
from app.services.decisions import START
from app.services.evaluations import row_id
from app.services.events import add_job_event
from app.services.registered_models import find_by_reference
from app.services.storage import Storage

OWNER_OF_BASES = "retain"


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A base model or a version with the names of what it stands on."""

    row: BaseModel | ModelVersion
    root: str  # the base model's name
    parent: str | None  # what it was tuned from; None for a base
    aliases: tuple[str, ...] = ()  # `name@alias` of what points at it


def list_named_models(session: Session, project_id: UUID) -> list[NamedModel]:
    """Every base model, then every version of the project, newest version first."""
    bases = CatalogRepository(session).list_models()
    versions = RegistryRepository(session).list_all(project_id)
    return [NamedModel(base, base.name, None) for base in bases] + _with_names(session, versions)


def get_named_model(session: Session, project_id: UUID, name: str) -> NamedModel:
    """A base model or a version by its name, or what `name@alias` points at.

    Raises:
        NotFound: The project sees none.
    """
    base = CatalogRepository(session).find_model(name)
    if base is not None:
        return NamedModel(base, base.name, None)
    version = find_by_reference(session, project_id, name)
    if version is None:
        version = RegistryRepository(session).get(project_id, name)
    return _with_names(session, [version])[0]


def delete_version(factory: SessionFactory, storage: Storage, project_id: UUID, name: str) -> None:
    """Deletes a version; its artifact goes once the deletion is committed.

    Raises:
        NotFound: The project has no such version.
        Forbidden: It is a base model, which is the operator's.
        Conflict: It is still being made.
    """
    with transaction(factory) as session:
        if CatalogRepository(session).find_model(name) is not None:
            raise Forbidden(
                f"model: '{name}' is a base model; only the operator removes it.",
                "model",
                "base_model_protected",
            )
        repository = RegistryRepository(session)
        version = repository.get(project_id, name, for_update=True)
        if repository.is_being_made(version):
            raise Conflict(f"model: '{name}' is still being made.", "model", "model_pending")
        if repository.is_started_from(version):
            raise Conflict(
                f"model: a job that has not ended starts from '{name}'.", "model", "model_in_use"
            )
        used = [alias for _, alias in DeploymentRepository(session).list_aliases_of([version.id])]
        if used:
            raise Conflict(f"model: {', '.join(used)} points at '{name}'.", "model", "model_in_use")
        repository.mark_deleted(version)
        sign(session)
    if version.path is not None:
        storage.delete(version.path)


def publish_point(
    session: Session, project_id: UUID, job_id: UUID, body: PublishPoint
) -> tuple[NamedModel, Job]:
    """Asks a worker to write a point of an ended job's line from base to tuned as a model version.

    Returns:
        The version, pending, and the export job that makes it.

    Raises:
        NotFound: No such job.
        Conflict: The job has not ended, or left no tuned checkpoint.
    """
    jobs = ProjectJobRepository(session)
    source = jobs.get(project_id, job_id)
    checkpoint_id = _tuned_checkpoint(session, source)
    spec = JobSpec.model_validate(source.spec)
    base = jobs.base_models([source])[source.base_model_id]
    version_id = uuid4()
    suffix = body.suffix or source.suffix
    version = ModelVersion(
        id=version_id,
        project_id=project_id,
        name=model_version_name(base.name, jobs.get_project(project_id).name, suffix, version_id),
        base_model_id=base.id,
        parent_version_id=source.start_version_id,
        job_id=source.id,
        checkpoint_id=checkpoint_id,
        status="pending",
        kind="adapter" if spec.training.type == "lora" else "full",
        alpha=body.alpha,
        retention=_retention_before_report(spec),
    )
    RegistryRepository(session).add(version)
    export = Job(
        project_id=project_id,
        kind=JobKind.EXPORT,
        state=JobState.QUEUED,
        spec=ExportSpec(
            source_job_id=public_id("job", source.id),
            checkpoint_id=public_id("checkpoint", checkpoint_id),
            model_version_id=version_id.hex,
            alpha=body.alpha,
        ).model_dump(mode="json"),
        base_model_id=base.id,
        start_version_id=source.start_version_id,
        start_checkpoint_id=source.start_checkpoint_id,
        suffix=suffix,
        seed=source.seed,
        queue=source.queue,
        priority=source.priority,
        model_version_id=version_id,
    )
    jobs.add(export)
    jobs.ring_later(export)
    add_job_event(
        session,
        source,
        level="info",
        message=f"The point alpha {body.alpha:g} is being published as {version.name}.",
        data={"code": "publish_requested", "model": version.name, "alpha": body.alpha},
    )
    return _with_names(session, [version])[0], export


def _with_names(session: Session, versions: list[ModelVersion]) -> list[NamedModel]:
    repository = RegistryRepository(session)
    bases = repository.base_names(versions)
    parents = repository.parent_names(versions)
    aliases = DeploymentRepository(session).list_aliases_of([version.id for version in versions])
    return [
        NamedModel(
            version,
            bases[version.base_model_id],
            bases[version.base_model_id]
            if version.parent_version_id is None
            else parents[version.parent_version_id],
            tuple(alias for version_id, alias in aliases if version_id == version.id),
        )
        for version in versions
    ]


def _tuned_checkpoint(session: Session, job: Job) -> UUID:
    """The checkpoint that holds the tuned weights of an ended job."""
    if not job.state.is_terminal:
        raise Conflict(
            f"The job is {job.state.value}; a point can be published once it has ended.",
            "fine_tuning_job_id",
            "job_not_ended",
        )
    told = (job.report or {}).get("checkpoint_id")
    if told not in {None, START}:
        checkpoint = session.get(Checkpoint, row_id(str(told)))
        if checkpoint is not None and checkpoint.job_id == job.id and not checkpoint.deleted_at:
            return checkpoint.id
    raise Conflict(
        "The job left no tuned checkpoint to publish from.", "fine_tuning_job_id", "no_checkpoint"
    )


def _retention_before_report(spec: JobSpec) -> str:
    """What is known of a point that no report has tested yet."""
    if spec.is_unwatched_by_wish:
        return "off"
    return "unwatched" if spec.policy is None else "unproven"

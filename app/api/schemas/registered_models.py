"""Registered models, their versions with the ledger of their lineage, and aliases with their history."""

from typing import Any, Literal

from app.api.schemas.base import Identified, unix
from app.domain.identifiers import public_id
from app.domain.lineage import Loss
from app.services.aliases_query import ShownAlias, ShownChange
from app.services.registered_models import ShownModel, ShownVersion


class RegisteredModelObject(Identified):
    """A name under which model versions are numbered and deployed; `aliases` says which number each points at."""

    object: Literal["registered_model"] = "registered_model"
    created_at: int
    updated_at: int
    name: str
    description: str | None
    metadata: dict[str, str] | None
    gate: str
    max_cumulative_drop: float | None
    num_versions: int
    aliases: dict[str, int]


class RegisteredVersionObject(Identified):
    """A model version in its lineage; drops are relative, of `nll` benchmarks in nats per token."""

    object: Literal["registered_model.version"] = "registered_model.version"
    created_at: int
    registered_model: str
    version: int
    description: str | None
    model: str
    status: str
    kind: str
    root: str
    parent: str
    retention: str
    reason: str | None
    verdict: Any
    against_parent: Loss | None
    against_root: Loss | None
    fine_tuning_job_id: str
    aliases: list[str]


class AliasObject(Identified):
    """A movable name; `revision` is its ETag."""

    object: Literal["registered_model.alias"] = "registered_model.alias"
    registered_model: str
    alias: str
    version: int
    model: str
    revision: int
    moved_at: int


class AliasChangeObject(Identified):
    """One move of an alias."""

    object: Literal["registered_model.alias_change"] = "registered_model.alias_change"
    created_at: int
    revision: int
    action: str
    from_version: int | None
    to_version: int | None
    actor: str
    reason: str | None
    forced: bool
    details: dict[str, Any]
    compensation_job_id: str | None


def show_registered_model(shown: ShownModel) -> RegisteredModelObject:
    """A registered model as clients see it."""
    row = shown.row
    return RegisteredModelObject(
        id=public_id("registered_model", row.id),
        created_at=unix(row.created_at),
        updated_at=unix(row.updated_at),
        name=row.name,
        description=row.description,
        metadata=row.metadata_,
        gate=row.gate,
        max_cumulative_drop=row.max_cumulative_drop,
        num_versions=row.version_count,
        aliases=shown.aliases,
    )


def show_version(shown: ShownVersion) -> RegisteredVersionObject:
    """A version as clients see it."""
    row, model = shown.version
    entry = shown.entry
    return RegisteredVersionObject(
        id=f"{shown.registered.name}@{row.version}",
        created_at=unix(row.created_at),
        registered_model=shown.registered.name,
        version=row.version,
        description=row.description,
        model=model.name,
        status="deleted" if model.deleted_at is not None else model.status,
        kind=model.kind,
        root=entry.root,
        parent=entry.parent,
        retention=model.retention,
        reason=model.reason,
        verdict=model.verdict,
        against_parent=entry.against_parent,
        against_root=entry.against_root,
        fine_tuning_job_id=public_id("job", model.job_id),
        aliases=list(shown.aliases),
    )


def show_alias(shown: ShownAlias) -> AliasObject:
    """An alias as clients see it."""
    return AliasObject(
        id=f"{shown.registered.name}@{shown.alias.name}",
        registered_model=shown.registered.name,
        alias=shown.alias.name,
        version=shown.version.row.version,
        model=shown.version.model.name,
        revision=shown.alias.revision,
        moved_at=unix(shown.alias.moved_at),
    )


def show_change(shown: ShownChange) -> AliasChangeObject:
    """A move of an alias as clients see it."""
    row = shown.row
    job = row.compensation_job_id
    return AliasChangeObject(
        id=public_id("alias_change", row.id),
        created_at=unix(row.created_at),
        revision=row.revision,
        action=row.action,
        from_version=shown.from_version,
        to_version=shown.to_version,
        actor=row.actor,
        reason=row.reason,
        forced=row.forced,
        details=row.details,
        compensation_job_id=None if job is None else public_id("job", job),
    )

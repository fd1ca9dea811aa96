"""API keys and projects."""

from typing import Any, Literal

from app.api.schemas.base import Identified, Schema, unix, unix_or_none
from app.db.models import ApiKey, Project
from app.domain.identifiers import public_id
from app.services.keys import PREFIX, CreatedKey
from app.services.quotas import Usage


class ApiKeyObject(Identified):
    """A key of the project; its text is shown once, when it is made or rotated."""

    object: Literal["api_key"] = "api_key"
    name: str
    redacted_value: str  # its public part
    scopes: list[str]
    created_at: int
    expires_at: int | None
    last_used_at: int | None  # written at most once a minute
    rotated_from: str | None  # the key that it replaces


class CreatedKeyObject(ApiKeyObject):
    """A new key with its text."""

    value: str


class Quota(Schema):
    """One quota; a limit of null is none."""

    used: int
    limit: int | None


class ProjectQuotas(Schema):
    """What the project uses of what it may."""

    queued_jobs: Quota
    running_jobs: Quota
    storage_bytes: Quota


class ProjectObject(Identified):
    """The caller's project."""

    object: Literal["project"] = "project"
    name: str
    created_at: int
    retention_mandatory: bool
    quotas: ProjectQuotas


def show_key(row: ApiKey) -> ApiKeyObject:
    """A key as its project sees it."""
    return ApiKeyObject.model_validate(_fields(row))


def show_created_key(created: CreatedKey) -> CreatedKeyObject:
    """A new key: the only time its text is shown."""
    return CreatedKeyObject.model_validate(_fields(created.row) | {"value": created.text})


def show_project(row: Project, usage: Usage) -> ProjectObject:
    """A project with its quotas."""
    quotas = usage.quotas
    return ProjectObject(
        id=public_id("project", row.id),
        name=row.name,
        created_at=unix(row.created_at),
        retention_mandatory=row.retention_mandatory,
        quotas=ProjectQuotas(
            queued_jobs=Quota(used=usage.queued_jobs, limit=quotas.queued_jobs),
            running_jobs=Quota(used=usage.running_jobs, limit=quotas.running_jobs),
            storage_bytes=Quota(used=usage.storage_bytes, limit=quotas.storage_bytes),
        ),
    )


def _fields(row: ApiKey) -> dict[str, Any]:
    old = row.rotated_from_id
    return {
        "id": public_id("api_key", row.id),
        "name": row.name,
        "redacted_value": f"{PREFIX}_{row.key_id}_...",
        "scopes": list(row.scopes),
        "created_at": unix(row.created_at),
        "expires_at": unix_or_none(row.expires_at),
        "last_used_at": unix_or_none(row.last_used_at),
        "rotated_from": None if old is None else public_id("api_key", old),
    }

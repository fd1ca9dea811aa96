"""The model object: base models and published versions."""

from typing import Any, Literal

from pydantic import Field

from app.api.schemas.base import Identified, Schema, unix
from app.db.models import BaseModel, Job
from app.domain.identifiers import public_id
from app.services.registry import OWNER_OF_BASES, NamedModel


class ModelObject(Identified):
    """A model by its name; `root` is the base model, `parent` what it was tuned from."""

    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shutdown_date: int | None = None
    root: str
    parent: str | None
    aliases: list[str] = Field(default_factory=list)  # `name@alias` of what points at it
    status: str
    kind: str
    alpha: float | None
    retention: str | None
    verdict: Any
    reason: str | None
    sha256: str | None
    size_bytes: int | None
    fine_tuning_job_id: str | None
    export_job_id: str | None = None


class ModelList(Schema):
    """Every model there is: the openai client never asks for a second page."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


def show_model(named: NamedModel) -> ModelObject:
    """A model as clients see it."""
    row = named.row
    if isinstance(row, BaseModel):
        return ModelObject(
            id=row.name,
            created=unix(row.created_at),
            owned_by=OWNER_OF_BASES,
            root=named.root,
            parent=None,
            status="ready",
            kind="base",
            alpha=None,
            retention=None,
            verdict=None,
            reason=None,
            sha256=row.sha256,
            size_bytes=row.size_bytes,
            fine_tuning_job_id=None,
        )
    return ModelObject(
        id=row.name,
        created=unix(row.created_at),
        owned_by=public_id("project", row.project_id),
        root=named.root,
        parent=named.parent,
        aliases=list(named.aliases),
        status=row.status,
        kind=row.kind,
        alpha=row.alpha,
        retention=row.retention,
        verdict=row.verdict,
        reason=row.reason,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        fine_tuning_job_id=public_id("job", row.job_id),
    )


def show_published(named: NamedModel, export: Job) -> ModelObject:
    """A version that is being made, with the job that makes it."""
    shown = show_model(named)
    return shown.model_copy(update={"export_job_id": public_id("export", export.id)})

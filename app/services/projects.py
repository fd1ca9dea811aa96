"""Projects and the quotas that the operator gives them."""

from collections.abc import Mapping
from typing import Final
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import Project
from app.db.repositories.keys import ProjectRepository
from app.errors import BadRequest
from app.services.keys import ensure_project

QUOTAS: Final = ("max_queued_jobs", "max_running_jobs", "max_storage_bytes")


def get_project(session: Session, project_id: UUID) -> Project:
    """A project by its id, which a key vouches for."""
    return session.get_one(Project, project_id)


def list_projects(session: Session) -> list[Project]:
    """Every project, oldest first; for the operator."""
    return ProjectRepository(session).list_all()


def set_quotas(session: Session, name: str, quotas: Mapping[str, int | None]) -> Project:
    """Gives a project quotas of its own, and makes it when missing; None: the server's own again.

    Raises:
        BadRequest: The name cannot be one, or a quota is below 1.
    """
    for quota, value in quotas.items():
        if quota not in QUOTAS:
            raise BadRequest(f"No quota is called '{quota}'.", quota)
        if value is not None and not 1 <= value < 2**62:
            raise BadRequest(f"{quota}: give a number from 1, or `default`.", quota)
    project = get_project(session, ensure_project(session, name))
    for quota, value in quotas.items():
        setattr(project, quota, value)
    session.flush()
    return project

"""Queries on projects and their API keys."""

from datetime import timedelta
from uuid import UUID

from sqlalchemy import DateTime, Select, func, select, update
from sqlalchemy.orm import Session

from app.db.models import ApiKey, Project
from app.db.repositories.paging import newest_first
from app.errors import NotFound


class ProjectRepository:
    """Projects."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find_by_name(self, name: str) -> Project | None:
        """The project of this name."""
        return self._session.scalar(select(Project).where(Project.name == name))

    def get_by_name(self, name: str) -> Project:
        """The project of this name.

        Raises:
            NotFound: There is none.
        """
        project = self.find_by_name(name)
        if project is None:
            raise NotFound(f"No project is called '{name}'.", "project")
        return project

    def list_all(self) -> list[Project]:
        """Every project, oldest first."""
        return list(self._session.scalars(select(Project).order_by(Project.seq)))

    def ensure(self, name: str) -> Project:
        """The project of this name, made when missing."""
        project = self.find_by_name(name)
        if project is None:
            project = Project(name=name)
            self._session.add(project)
            self._session.flush()
        return project


class KeyRepository:
    """API keys."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, key: ApiKey) -> None:
        """Keeps a new key."""
        self._session.add(key)
        self._session.flush()

    def find_live(self, key_id: str) -> ApiKey | None:
        """The key of this public id, unless it is revoked or has expired by the database's clock."""
        return self._session.scalar(
            select(ApiKey).where(
                ApiKey.key_id == key_id,
                ApiKey.revoked_at.is_(None),
                (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > func.clock_timestamp()),
            )
        )

    def get(self, project_id: UUID, key_id: UUID, *, for_update: bool = False) -> ApiKey:
        """A key of a project that is not revoked.

        Raises:
            NotFound: The project has no such key.
        """
        query = _unrevoked(project_id).where(ApiKey.id == key_id)
        if for_update:
            query = query.with_for_update().execution_options(populate_existing=True)
        key = self._session.scalar(query)
        if key is None:
            raise NotFound("No API key has this id.", "api_key_id")
        return key

    def list_page(self, project_id: UUID, *, after: ApiKey | None, limit: int) -> list[ApiKey]:
        """Keys of a project that are not revoked, newest first."""
        page = newest_first(_unrevoked(project_id), ApiKey, after=after, limit=limit)
        return list(self._session.scalars(page))

    def list_all(self, project_id: UUID | None = None) -> list[tuple[ApiKey, str]]:
        """Every key with its project's name, oldest first."""
        query = select(ApiKey, Project.name).join(Project, Project.id == ApiKey.project_id)
        if project_id is not None:
            query = query.where(ApiKey.project_id == project_id)
        return [(key, name) for key, name in self._session.execute(query.order_by(ApiKey.seq))]

    def end_after(self, key: ApiKey, seconds: float) -> None:
        """Has a key expire so many seconds from now, unless it does so before."""
        end = func.clock_timestamp(type_=DateTime(timezone=True)) + timedelta(seconds=seconds)
        key.expires_at = func.least(func.coalesce(key.expires_at, end), end)
        self._session.flush()
        self._session.refresh(key)

    def find_by_public(self, key_id: str) -> ApiKey | None:
        """The key of this public id that is not revoked."""
        return self._session.scalar(
            select(ApiKey).where(ApiKey.key_id == key_id, ApiKey.revoked_at.is_(None))
        )

    def revoke(self, key_id: str, project_id: UUID | None = None) -> bool:
        """Revokes a key; False when no live key has this public id (in this project)."""
        query = update(ApiKey).where(ApiKey.key_id == key_id, ApiKey.revoked_at.is_(None))
        if project_id is not None:
            query = query.where(ApiKey.project_id == project_id)
        done = self._session.execute(
            query.values(revoked_at=func.clock_timestamp()).returning(ApiKey.id)
        )
        return done.first() is not None

    def touch(self, key_id: str) -> None:
        """Notes that a key was used: at most once a minute, and never waiting for another request."""
        stale = (
            select(ApiKey.id)
            .where(
                ApiKey.key_id == key_id,
                ApiKey.last_used_at.is_(None)
                | (
                    ApiKey.last_used_at
                    < func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 1)
                ),
            )
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        self._session.execute(
            update(ApiKey)
            .where(ApiKey.id == stale)
            .values(last_used_at=func.clock_timestamp())
            .execution_options(synchronize_session=False)
        )


def _unrevoked(project_id: UUID) -> Select[ApiKey]:
    return select(ApiKey).where(ApiKey.project_id == project_id, ApiKey.revoked_at.is_(None))

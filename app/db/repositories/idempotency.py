"""Queries on idempotency keys."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, and_, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.models import IdempotencyKey


class IdempotencyRepository:
    """First answers to POSTs that carried a key."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def forget(
        self, project_id: UUID, route: str, key: str, *, answered: timedelta, running: timedelta
    ) -> None:
        """Drops a key whose answer is old, or whose request has been running longer than any can."""
        now = func.clock_timestamp()
        self._session.execute(
            delete(IdempotencyKey).where(
                _is(project_id, route, key),
                (IdempotencyKey.created_at < now - answered)
                | (
                    IdempotencyKey.status_code.is_(None)
                    & (IdempotencyKey.created_at < now - running)
                ),
            )
        )

    def claim(self, project_id: UUID, route: str, key: str, *, body_sha256: str) -> bool:
        """Takes a key; False when it is taken."""
        statement = (
            insert(IdempotencyKey)
            .values(project_id=project_id, key=key, route=route, body_sha256=body_sha256)
            .on_conflict_do_nothing()
            .returning(IdempotencyKey.key)
        )
        return self._session.execute(statement).first() is not None

    def find(self, project_id: UUID, route: str, key: str) -> IdempotencyKey | None:
        """What is known of a key."""
        return self._session.scalar(
            select(IdempotencyKey)
            .where(_is(project_id, route, key))
            .execution_options(populate_existing=True)
        )

    def answer(
        self,
        project_id: UUID,
        route: str,
        key: str,
        *,
        status_code: int,
        response: dict[str, Any],
    ) -> None:
        """Keeps the answer."""
        self._session.execute(
            update(IdempotencyKey)
            .where(_is(project_id, route, key))
            .values(status_code=status_code, response=response)
        )

    def release(self, project_id: UUID, route: str, key: str) -> None:
        """Gives back a key whose request failed; an answered one stays."""
        self._session.execute(
            delete(IdempotencyKey).where(
                _is(project_id, route, key),
                IdempotencyKey.status_code.is_(None),
            )
        )


def _is(project_id: UUID, route: str, key: str) -> ColumnElement[bool]:
    return and_(
        IdempotencyKey.project_id == project_id,
        IdempotencyKey.route == route,
        IdempotencyKey.key == key,
    )

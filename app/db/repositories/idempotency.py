"""Queries on idempotency keys."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.models import IdempotencyKey


class IdempotencyRepository:
    """First answers to POSTs that carried a key."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def forget(
        self, project_id: UUID, key: str, *, answered: timedelta, running: timedelta
    ) -> None:
        """Drops a key whose answer is old, or whose request has been running longer than any can."""
        now = func.clock_timestamp()
        self._session.execute(
            delete(IdempotencyKey).where(
                IdempotencyKey.project_id == project_id,
                IdempotencyKey.key == key,
                (IdempotencyKey.created_at < now - answered)
                | (
                    IdempotencyKey.status_code.is_(None)
                    & (IdempotencyKey.created_at < now - running)
                ),
            )
        )

    def claim(self, project_id: UUID, key: str, *, route: str, body_sha256: str) -> bool:
        """Takes a key; False when it is taken."""
        statement = (
            insert(IdempotencyKey)
            .values(project_id=project_id, key=key, route=route, body_sha256=body_sha256)
            .on_conflict_do_nothing()
            .returning(IdempotencyKey.key)
        )
        return self._session.execute(statement).first() is not None

    def find(self, project_id: UUID, key: str) -> IdempotencyKey | None:
        """What is known of a key."""
        return self._session.scalar(
            select(IdempotencyKey)
            .where(IdempotencyKey.project_id == project_id, IdempotencyKey.key == key)
            .execution_options(populate_existing=True)
        )

    def answer(
        self, project_id: UUID, key: str, *, status_code: int, response: dict[str, Any]
    ) -> None:
        """Keeps the answer."""
        self._session.execute(
            update(IdempotencyKey)
            .where(IdempotencyKey.project_id == project_id, IdempotencyKey.key == key)
            .values(status_code=status_code, response=response)
        )

    def release(self, project_id: UUID, key: str) -> None:
        """Gives back a key whose request failed; an answered one stays."""
        self._session.execute(
            delete(IdempotencyKey).where(
                IdempotencyKey.project_id == project_id,
                IdempotencyKey.key == key,
                IdempotencyKey.status_code.is_(None),
            )
        )

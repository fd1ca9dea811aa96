"""Queries on monitors, their looks and compensations."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import DateTime, Select, func, select, update
from sqlalchemy.orm import Session

from app.db.models import (
    Alias,
    Compensation,
    Job,
    ModelVersion,
    Monitor,
    MonitorLook,
    RegisteredModel,
    RegisteredVersion,
)
from app.db.repositories.paging import newest_first
from app.domain.monitors import WINDOW
from app.domain.states import JobState
from app.errors import NotFound

SWEEP_LIMIT = 100
SECONDS_AN_HOUR = 3600.0


class MonitorRow(NamedTuple):
    """A monitor with its alias and registered model."""

    monitor: Monitor
    alias: Alias
    registered: RegisteredModel


class MonitorRepository:
    """Monitors that are not deleted."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, row: Monitor | MonitorLook | Compensation) -> None:
        """Keeps a new row."""
        self._session.add(row)
        self._session.flush()
        self._session.refresh(row)

    def get(self, project_id: UUID, monitor_id: UUID, *, for_update: bool = False) -> MonitorRow:
        """The monitor of this id.

        Raises:
            NotFound: The project has none.
        """
        query = _live().where(Monitor.project_id == project_id, Monitor.id == monitor_id)
        if for_update:
            query = query.with_for_update(of=Monitor).execution_options(populate_existing=True)
        found = self._session.execute(query).one_or_none()
        if found is None:
            raise NotFound("No monitor has this id.", "monitor_id", "monitor_not_found")
        return MonitorRow(*found)

    def list_page(self, project_id: UUID, *, after: Monitor | None, limit: int) -> list[MonitorRow]:
        """Monitors, newest first."""
        query = _live().where(Monitor.project_id == project_id)
        rows = self._session.execute(newest_first(query, Monitor, after=after, limit=limit))
        return [MonitorRow(*row) for row in rows]

    def find_of_alias(self, alias_id: UUID) -> Monitor | None:
        """The monitor that watches an alias."""
        return self._session.scalar(
            select(Monitor).where(Monitor.alias_id == alias_id, Monitor.deleted_at.is_(None))
        )

    def list_watching(self, model_version_ids: Sequence[UUID]) -> list[tuple[UUID, MonitorRow]]:
        """Monitors whose alias points at one of these model versions now, with the version; read afresh."""
        query = (
            _live()
            .join(RegisteredVersion, RegisteredVersion.id == Alias.version_id)
            .where(RegisteredVersion.model_version_id.in_(model_version_ids))
            .order_by(Monitor.seq)
            .add_columns(RegisteredVersion.model_version_id)
            .execution_options(populate_existing=True)
        )
        return [
            (version_id, MonitorRow(monitor, alias, registered))
            for monitor, alias, registered, version_id in self._session.execute(query)
        ]

    def find_row(self, monitor_id: UUID) -> MonitorRow | None:
        """The monitor of this id, of whatever project, read afresh."""
        query = _live().where(Monitor.id == monitor_id)
        found = self._session.execute(query.execution_options(populate_existing=True)).one_or_none()
        return None if found is None else MonitorRow(*found)

    def start_over(self, alias_id: UUID) -> None:
        """The alias has moved: what was heard so far was about another version."""
        self._session.execute(
            update(Monitor)
            .where(Monitor.alias_id == alias_id, Monitor.deleted_at.is_(None))
            .values(last_result_at=None, stale_since=None)
        )

    def pointed_at(self, alias: Alias) -> tuple[RegisteredVersion, ModelVersion] | None:
        """Where an alias points."""
        found = self._session.execute(
            select(RegisteredVersion, ModelVersion)
            .join(ModelVersion, ModelVersion.id == RegisteredVersion.model_version_id)
            .where(RegisteredVersion.id == alias.version_id)
        ).one_or_none()
        return None if found is None else (found[0], found[1])

    def count_looks(self, alias_id: UUID) -> int:
        """Looks at an alias in the last 30 days, whatever it pointed at."""
        query = select(func.count()).where(
            MonitorLook.alias_id == alias_id,
            MonitorLook.created_at > func.clock_timestamp() - WINDOW,
        )
        return self._session.scalar(query) or 0

    def list_replayed(self, model_version_id: UUID, digest: str) -> list[MonitorLook]:
        """Looks of every alias that these very results made already."""
        return list(
            self._session.scalars(
                select(MonitorLook)
                .where(
                    MonitorLook.model_version_id == model_version_id, MonitorLook.digest == digest
                )
                .order_by(MonitorLook.seq)
            )
        )

    def list_looked_at(self, model_version_ids: Sequence[UUID]) -> set[UUID]:
        """Those of the model versions that a monitor ever had a look at."""
        query = select(MonitorLook.model_version_id).where(
            MonitorLook.model_version_id.in_(model_version_ids)
        )
        return set(self._session.scalars(query.distinct()))

    def list_looks(
        self, monitor: Monitor, *, after: UUID | None, limit: int
    ) -> list[tuple[MonitorLook, str]]:
        """A monitor's looks with the models' names, newest first.

        Raises:
            NotFound: It has no look `after`.
        """
        query = (
            select(MonitorLook, ModelVersion.name)
            .join(ModelVersion, ModelVersion.id == MonitorLook.model_version_id)
            .where(MonitorLook.monitor_id == monitor.id)
        )
        if after is not None:
            place = self._session.scalar(
                select(MonitorLook.seq).where(
                    MonitorLook.id == after, MonitorLook.monitor_id == monitor.id
                )
            )
            if place is None:
                raise NotFound("after: the monitor has no look with this id.", "after")
            query = query.where(MonitorLook.seq < place)
        rows = self._session.execute(query.order_by(MonitorLook.seq.desc()).limit(limit))
        return [(look, name) for look, name in rows]

    def latest_look(self, alias: Alias) -> MonitorLook | None:
        """The latest look at what an alias points at now."""
        return self._session.scalar(
            select(MonitorLook)
            .join(
                RegisteredVersion,
                RegisteredVersion.model_version_id == MonitorLook.model_version_id,
            )
            .where(MonitorLook.alias_id == alias.id, RegisteredVersion.id == alias.version_id)
            .order_by(MonitorLook.seq.desc())
            .limit(1)
        )

    def find_compensation(self, model_version_id: UUID) -> Compensation | None:
        """What makes up for a version's regression."""
        return self._session.scalar(
            select(Compensation).where(Compensation.model_version_id == model_version_id)
        )

    def lock_due(self) -> list[MonitorRow]:
        """Monitors whose next evaluation is due and whose last one has ended, locked; held ones are passed over."""
        query = (
            _live()
            .outerjoin(Job, Job.id == Monitor.evaluation_job_id)
            .where(
                Monitor.enabled,
                Alias.version_id.is_not(None),
                Monitor.next_evaluation_at <= func.clock_timestamp(),
                (Job.id.is_(None))
                | Job.state.in_((JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)),
            )
            .order_by(Monitor.next_evaluation_at)
            .limit(SWEEP_LIMIT)
            .with_for_update(of=Monitor, skip_locked=True)
            .execution_options(populate_existing=True)
        )
        return [MonitorRow(*row) for row in self._session.execute(query)]

    def lock_silent(self) -> list[MonitorRow]:
        """Monitors that have heard nothing for too long and did not say so yet, locked.

        The silence counts from the last result, or from when the alias or the monitor came to be as it is.
        """
        heard_at = func.greatest(
            Alias.moved_at,
            Monitor.created_at,
            func.coalesce(Monitor.last_result_at, Alias.moved_at),
        )
        query = (
            _live()
            .where(
                Monitor.enabled,
                Alias.version_id.is_not(None),
                Monitor.stale_after_hours.is_not(None),
                Monitor.stale_since.is_(None),
                heard_at
                + func.make_interval(0, 0, 0, 0, 0, 0, Monitor.stale_after_hours * SECONDS_AN_HOUR)
                < func.clock_timestamp(),
            )
            .order_by(Monitor.seq)
            .limit(SWEEP_LIMIT)
            .with_for_update(of=Monitor, skip_locked=True)
            .execution_options(populate_existing=True)
        )
        return [MonitorRow(*row) for row in self._session.execute(query)]

    def now(self) -> datetime:
        """The database's clock."""
        query = select(func.clock_timestamp(type_=DateTime(timezone=True)))
        found: datetime = self._session.execute(query).scalar_one()
        return found

    def mark_stale(self, monitor: Monitor) -> None:
        """The monitor is in the dark from now on."""
        monitor.stale_since = func.clock_timestamp()
        self._session.flush()
        self._session.refresh(monitor)

    def put_off(self, monitor: Monitor, hours: float) -> None:
        """The next evaluation is due so many hours from now."""
        monitor.next_evaluation_at = func.clock_timestamp() + timedelta(hours=hours)
        self._session.flush()


def _live() -> Select[Monitor, Alias, RegisteredModel]:
    return (
        select(Monitor, Alias, RegisteredModel)
        .join(Alias, Alias.id == Monitor.alias_id)
        .join(RegisteredModel, RegisteredModel.id == Alias.registered_model_id)
        .where(Monitor.deleted_at.is_(None))
    )

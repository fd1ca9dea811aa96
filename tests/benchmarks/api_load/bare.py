"""What Retain's pages are held against: FastAPI and SQLAlchemy with nothing around one query."""

import os
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session, sessionmaker

from app.db.models import Job
from app.domain.states import JobKind
from app.main import POOL_SIZE


class BareJob(BaseModel):
    """A job's row, as it lies in the table."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    created_at: datetime
    project_id: UUID
    base_model_id: UUID
    training_file_id: UUID | None
    state: str
    spec: dict[str, Any]
    warnings: list[Any]
    data_checks: dict[str, Any] | None
    power: dict[str, Any] | None
    report: dict[str, Any] | None
    progress: dict[str, Any] | None
    suffix: str | None
    seed: int
    priority: int
    attempt: int
    branch: int
    step: int
    total_steps: int | None
    trained_tokens: int | None
    started_at: datetime | None
    finished_at: datetime | None


class BarePage(BaseModel):
    """Rows of the newest jobs."""

    data: list[BareJob]


def create_app() -> FastAPI:
    """For uvicorn's `--factory`: two routes, a session each, a response model each."""
    url = os.environ["RETAIN_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://")
    factory = sessionmaker(create_engine(url, pool_size=POOL_SIZE, max_overflow=2 * POOL_SIZE))
    app = FastAPI()

    def get_session() -> Iterator[Session]:
        with factory() as session:
            yield session

    Access = Annotated[Session, Depends(get_session, scope="function")]

    @app.get("/{project_id}/jobs/{job_id}")
    def retrieve(project_id: UUID, job_id: UUID, session: Access) -> BareJob:
        job = session.scalar(select(Job).where(Job.id == job_id, Job.project_id == project_id))
        if job is None:
            raise HTTPException(404)
        return BareJob.model_validate(job)

    @app.get("/{project_id}/jobs")
    def page(project_id: UUID, session: Access, limit: int = 20) -> BarePage:
        rows = session.scalars(
            select(Job)
            .where(Job.project_id == project_id, Job.kind == JobKind.FINE_TUNING)
            .order_by(Job.seq.desc())
            .limit(limit + 1)
        ).all()
        return BarePage(data=[BareJob.model_validate(row) for row in rows[:limit]])

    return app

"""Fine-tuning jobs: made, listed, watched, cancelled, paused, resumed; what happened in them."""

from collections.abc import Callable
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from app.api.dependencies import (
    JobsReader,
    JobsWriter,
    ModelsWriter,
    Resources,
    ResourcesDep,
    SessionDep,
    WriterDep,
)
from app.api.paging import After, Limit, metadata_filter, parse_after, wants
from app.api.schemas.base import Page, build_page
from app.api.schemas.decisions import DecisionObject, show_decision
from app.api.schemas.jobs import (
    CheckpointObject,
    EventObject,
    FrontierObject,
    JobObject,
    show_checkpoint,
    show_event,
    show_job,
)
from app.api.schemas.models import ModelObject, show_published
from app.api.streams import STREAMED, open_stream
from app.api.waits import Prefer, Wait, Waiter, answer, wished_wait
from app.db.models import Job
from app.db.session import transaction
from app.domain.identifiers import parse_id, public_id
from app.domain.requests import PublishPoint, RerunJob
from app.domain.scopes import Caller
from app.domain.spec import CreateJob
from app.services import control, jobs, registry
from app.services.contamination import find_contamination
from app.services.data_checks import find_leaks
from app.services.quotas import check_storage, standard_quotas
from app.services.reruns import plan_rerun
from app.services.submission import submit_job

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

ID = "fine_tuning_job_id"


@router.post("", response_model=JobObject)
def create_job(
    body: CreateJob, caller: JobsWriter, writer: WriterDep, resources: ResourcesDep
) -> Response:
    """Submits a job. `retention`, `training` and `resources` are siblings of OpenAI's fields."""
    again = writer.replay(caller, body)
    if again is not None:
        return again
    return writer.run(caller, body, _submission(resources, caller, body))


@router.get("", response_model=Page[JobObject])
async def list_jobs(
    request: Request,
    resources: ResourcesDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
) -> Response:
    """The project's jobs, newest first; `metadata[key]=value` keeps those that carry the pair."""
    metadata, without = metadata_filter(request)
    last = parse_after("job", after)

    def read() -> Page[JobObject]:
        with transaction(resources.session_factory) as session:
            found, has_more = jobs.list_jobs(
                session,
                caller.project_id,
                after=last,
                limit=limit,
                metadata=metadata,
                without_metadata=without,
            )
            return build_page([show_job(job) for job in found], has_more=has_more)

    return await run_in_threadpool(lambda: answer(read()))


@router.get("/{fine_tuning_job_id}", response_model=JobObject)
async def retrieve_job(
    fine_tuning_job_id: str,
    request: Request,
    resources: ResourcesDep,
    caller: JobsReader,
    wait: Wait = None,
    prefer: Prefer = None,
) -> Response:
    """One job. With `wait` (or `Prefer: wait=`) seconds the answer comes when its status changes, or then.

    A job that has ended is answered at once; no longer than the server's limit is waited (five minutes).
    """
    key = parse_id("job", fine_tuning_job_id, param=ID)

    def read() -> tuple[JobObject, int]:
        with transaction(resources.session_factory) as session:
            job = jobs.find_job(session, caller.project_id, key)
            return show_job(job), job.row.event_count

    seconds, applied = wished_wait(resources, wait, prefer)
    first = await run_in_threadpool(read)
    job, status = first[0], first[0].status
    if seconds > 0 and job.finished_at is None:
        waiter = Waiter(resources.room, request, caller, key, seconds)
        job = await waiter.until(first, read, lambda now: now.status != status)
    return answer(job, applied)


@router.post("/{fine_tuning_job_id}/rerun", response_model=JobObject)
def rerun_job(
    fine_tuning_job_id: str,
    caller: JobsWriter,
    writer: WriterDep,
    resources: ResourcesDep,
    body: RerunJob | None = None,
) -> Response:
    """Submits an ended job again: the same request and seed, from the same start or from one of its checkpoints."""
    wish = body or RerunJob()
    again = writer.replay(caller, wish)
    if again is not None:
        return again
    key = parse_id("job", fine_tuning_job_id, param=ID)
    with transaction(resources.session_factory) as session:
        request = plan_rerun(session, caller.project_id, key, wish)
    return writer.run(caller, wish, _submission(resources, caller, request, rerun_of=key))


@router.post("/{fine_tuning_job_id}/cancel", response_model=JobObject)
def cancel_job(fine_tuning_job_id: str, caller: JobsWriter, writer: WriterDep) -> Response:
    """Cancels a job; it shows `running` until its worker has stopped."""
    return _change(fine_tuning_job_id, caller, writer, control.request_cancel)


@router.post("/{fine_tuning_job_id}/pause", response_model=JobObject)
def pause_job(fine_tuning_job_id: str, caller: JobsWriter, writer: WriterDep) -> Response:
    """Has a running job save and free its GPUs: `pausing`, then `paused`."""
    return _change(fine_tuning_job_id, caller, writer, control.request_pause)


@router.post("/{fine_tuning_job_id}/resume", response_model=JobObject)
def resume_job(fine_tuning_job_id: str, caller: JobsWriter, writer: WriterDep) -> Response:
    """Queues a paused job again; it goes on where it stopped."""
    return _change(fine_tuning_job_id, caller, writer, control.resume_job)


@router.get(
    "/{fine_tuning_job_id}/events", response_model=Page[EventObject], responses=dict(STREAMED)
)
async def list_events(
    fine_tuning_job_id: str,
    resources: ResourcesDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
    *,
    stream: Annotated[bool, Query(description="All events, oldest first, as they happen")] = False,
    last_event_id: Annotated[str | None, Header(max_length=128)] = None,
) -> Page[EventObject] | Response:
    """The job's log, newest first; with `stream=true` as server-sent events that end with the job.

    A stream goes on after the event that `Last-Event-ID` (or `after`) names.
    """
    key, last = parse_id("job", fine_tuning_job_id, param=ID), parse_after("event", after)
    if stream:
        return await open_stream(resources, caller, key, after=last, last_event_id=last_event_id)

    def read() -> Page[EventObject]:
        with transaction(resources.session_factory) as session:
            job = jobs.get_job(session, caller.project_id, key)
            found, has_more = jobs.list_events(session, job, after=last, limit=limit)
            return build_page([show_event(event) for event in found], has_more=has_more)

    return await run_in_threadpool(read)


@router.get("/{fine_tuning_job_id}/checkpoints")
def list_checkpoints(
    fine_tuning_job_id: str,
    session: SessionDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 10,
) -> Page[CheckpointObject]:
    """The job's checkpoints, newest first."""
    job = _get(session, caller, fine_tuning_job_id)
    found, has_more = jobs.list_checkpoints(
        session, job, after=parse_after("checkpoint", after), limit=limit
    )
    shown = jobs.as_shown(session, job)
    return build_page([show_checkpoint(row, shown) for row in found], has_more=has_more)


@router.get("/{fine_tuning_job_id}/decisions")
def list_decisions(
    fine_tuning_job_id: str,
    request: Request,
    session: SessionDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
) -> Page[DecisionObject]:
    """What the controller decided, newest first; `include=evidence` adds all it rested on."""
    job = _get(session, caller, fine_tuning_job_id)
    found, has_more = jobs.list_decisions(
        session, job, after=parse_after("decision", after), limit=limit
    )
    with_evidence = wants(request, "evidence")
    shown = [show_decision(row, with_evidence=with_evidence) for row in found]
    return build_page(shown, has_more=has_more)


@router.get("/{fine_tuning_job_id}/frontier")
def get_frontier(
    fine_tuning_job_id: str, session: SessionDep, caller: JobsReader
) -> FrontierObject:
    """The line from base to tuned as it was measured at the job's end; empty before."""
    job = _get(session, caller, fine_tuning_job_id)
    points = (job.report or {}).get("frontier") or []
    return FrontierObject(fine_tuning_job_id=public_id("job", job.id), data=list(points))


@router.post("/{fine_tuning_job_id}/publish", response_model=ModelObject)
def publish_point(
    fine_tuning_job_id: str, body: PublishPoint, caller: ModelsWriter, writer: WriterDep
) -> Response:
    """Has a point of the frontier written as a model version; answers at once, with it `pending`."""
    key = parse_id("job", fine_tuning_job_id, param=ID)

    def work(session: Session) -> ModelObject:
        version, export = registry.publish_point(session, caller.project_id, key, body)
        return show_published(version, export)

    return writer.run(caller, body, work)


def _get(session: Session, caller: Caller, job_id: str) -> Job:
    return jobs.get_job(session, caller.project_id, parse_id("job", job_id, param=ID))


def _change(job_id: str, caller: Caller, writer: WriterDep, change: Callable[..., Job]) -> Response:
    key = parse_id("job", job_id, param=ID)

    def work(session: Session) -> JobObject:
        jobs.get_job(session, caller.project_id, key)  # of this kind and project, or a 404
        job = change(session, project_id=caller.project_id, job_id=key)
        session.refresh(job)
        return show_job(jobs.as_shown(session, job))

    return writer.run(caller, None, work)


def _submission(
    resources: Resources, caller: Caller, body: CreateJob, *, rerun_of: UUID | None = None
) -> Callable[[Session], JobObject]:
    """What submits a request in a transaction; what takes reading files has been read before it."""
    limit, quotas = resources.settings.max_queued_jobs, standard_quotas(resources.settings)
    factory, storage, project_id = resources.session_factory, resources.storage, caller.project_id
    overlaps = find_contamination(factory, storage, project_id, body)
    leaks = find_leaks(factory, storage, project_id, body)

    def work(session: Session) -> JobObject:
        check_storage(session, project_id, quotas, added_bytes=0)
        job = submit_job(
            session,
            project_id,
            body,
            max_queued=limit,
            found_before=overlaps,
            leaks=leaks,
        )
        job.rerun_of_id = rerun_of
        return show_job(jobs.as_shown(session, job))

    return work

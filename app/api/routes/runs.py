"""External runs: registered, scored, told what to do, and ended."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from app.api.dependencies import (
    JobsReader,
    JobsWriter,
    ResourcesDep,
    ResultsActor,
    SessionDep,
    WriterDep,
)
from app.api.paging import After, Limit, parse_after, wants
from app.api.schemas.base import Page, build_page
from app.api.schemas.jobs import EventObject, show_event
from app.api.schemas.runs import (
    AcknowledgedObject,
    RunDecisionObject,
    RunDecisions,
    RunObject,
    build_decisions,
    show_run,
    show_run_decision,
)
from app.api.waits import Waiter
from app.db.models import DecisionRow
from app.db.session import transaction
from app.domain.external import Acknowledge, CreateRun, FinishRun, PostBaseline, PostEvaluation
from app.domain.identifiers import parse_id, public_id
from app.services import external_runs, jobs
from app.services.external_scores import record_run_baseline, record_run_evaluation

router = APIRouter(prefix="/v1/runs", tags=["external runs"])


@router.post("", response_model=RunObject)
def register_run(body: CreateRun, caller: JobsWriter, writer: WriterDep) -> Response:
    """Registers a training that Retain does not execute, with what is watched and what can be turned."""

    def work(session: Session) -> RunObject:
        return show_run(external_runs.register_run(session, caller.project_id, body))

    return writer.run(caller, body, work)


@router.get("")
def list_runs(
    session: SessionDep, caller: JobsReader, after: After = None, limit: Limit = 20
) -> Page[RunObject]:
    """The project's external runs, newest first."""
    found, has_more = external_runs.list_runs(
        session, caller.project_id, after=parse_after("run", after), limit=limit
    )
    return build_page([show_run(run) for run in found], has_more=has_more)


@router.get("/{run_id}")
def retrieve_run(run_id: str, session: SessionDep, caller: JobsReader) -> RunObject:
    """One run."""
    return show_run(external_runs.get_run(session, caller.project_id, _key(run_id)))


@router.get("/{run_id}/events")
def list_events(
    run_id: str, session: SessionDep, caller: JobsReader, after: After = None, limit: Limit = 20
) -> Page[EventObject]:
    """The run's log, newest first."""
    run = external_runs.get_run(session, caller.project_id, _key(run_id))
    found, has_more = jobs.list_events(session, run, after=parse_after("event", after), limit=limit)
    return build_page([show_event(event) for event in found], has_more=has_more)


@router.post("/{run_id}/baseline", response_model=RunObject)
def post_baseline(
    run_id: str,
    body: PostBaseline,
    caller: ResultsActor,
    writer: WriterDep,
    resources: ResourcesDep,
) -> Response:
    """Keeps the scores of the model that the run starts from; the answer says what can be seen with them."""
    key = _key(run_id)

    def work(session: Session) -> RunObject:
        return show_run(
            record_run_baseline(session, resources.storage, caller.project_id, key, body)
        )

    return writer.run(caller, body, work)


@router.post("/{run_id}/evaluations", response_model=RunDecisionObject)
def post_evaluation(
    run_id: str,
    body: PostEvaluation,
    caller: ResultsActor,
    writer: WriterDep,
    resources: ResourcesDep,
) -> Response:
    """Records every benchmark of one point and answers with the decision on it.

    The same point again gets the same decision. A trainer that missed a rollback gets that rollback.
    """
    key = _key(run_id)

    def work(session: Session) -> RunDecisionObject:
        row = record_run_evaluation(session, resources.storage, caller.project_id, key, body)
        return _show(session, [row])[0]

    return writer.run(caller, body, work)


@router.get("/{run_id}/decisions")
async def list_decisions(
    run_id: str,
    request: Request,
    resources: ResourcesDep,
    caller: JobsReader,
    after: After = None,
    limit: Limit = 20,
    wait: Annotated[float, Query(ge=0, le=3600)] = 0.0,
) -> RunDecisions:
    """Decisions made after `after`, oldest first; `include=evidence` adds all they rested on.

    With `wait` seconds the answer comes when there is one, when the run has ended, or then; no longer than the
    server's limit is waited (five minutes).
    """
    key, cursor, with_evidence = (
        _key(run_id),
        parse_after("decision", after),
        wants(request, "evidence"),
    )

    def read() -> tuple[tuple[RunDecisions, bool], int]:
        with transaction(resources.session_factory) as session:
            run = external_runs.get_run(session, caller.project_id, key)
            rows, has_more = external_runs.list_decisions_after(
                session, run, after=cursor, limit=limit
            )
            shown = _show(session, rows, with_evidence=with_evidence)
            page = build_decisions(shown, has_more=has_more, after=after)
            return (page, bool(page.data) or run.state.is_terminal), run.event_count

    first = await run_in_threadpool(read)
    seconds = min(wait, resources.settings.max_wait_seconds)
    waiter = Waiter(resources.room, request, caller, key, seconds)
    page, _ = await waiter.until(first, read, lambda now: now[1])
    return page


@router.post("/{run_id}/decisions/{decision_id}/acknowledge", response_model=AcknowledgedObject)
def acknowledge_decision(
    run_id: str, decision_id: str, body: Acknowledge, caller: JobsWriter, writer: WriterDep
) -> Response:
    """Keeps the step before which a decision took effect; the first word stays."""
    key, decision = _key(run_id), parse_id("decision", decision_id, param="decision_id")

    def work(session: Session) -> AcknowledgedObject:
        row = external_runs.acknowledge(session, caller.project_id, key, decision, body)
        steps = external_runs.list_acknowledged(session, row.job_id, [row])
        return AcknowledgedObject(id=public_id("decision", row.id), step=steps[row.id])

    return writer.run(caller, body, work)


@router.post("/{run_id}/finish", response_model=RunObject)
def finish_run(run_id: str, body: FinishRun, caller: JobsWriter, writer: WriterDep) -> Response:
    """Ends the run; its last reading becomes its verdict."""
    key = _key(run_id)

    def work(session: Session) -> RunObject:
        return show_run(external_runs.finish_run(session, caller.project_id, key, body))

    return writer.run(caller, body, work)


def _key(run_id: str) -> UUID:
    return parse_id("run", run_id, param="run_id")


def _show(
    session: Session, rows: list[DecisionRow], *, with_evidence: bool = False
) -> list[RunDecisionObject]:
    """Decisions of one run, with what its trainer said of each."""
    if not rows:
        return []
    steps = external_runs.list_acknowledged(session, rows[0].job_id, rows)
    return [show_run_decision(row, steps.get(row.id), with_evidence=with_evidence) for row in rows]

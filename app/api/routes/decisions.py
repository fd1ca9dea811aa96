"""Decisions by their id, and what people order against them."""

from collections.abc import Callable
from uuid import UUID

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from app.api.dependencies import JobsReader, JobsWriter, SessionDep, Writer, WriterDep
from app.api.paging import wants
from app.api.schemas.decisions import DecisionObject, FoundDecision, show_decision, show_found
from app.api.schemas.runs import RunDecisionObject, show_run_decision
from app.db.models import DecisionRow
from app.domain.identifiers import parse_id
from app.domain.overrides import Accept, Override
from app.domain.scopes import Caller
from app.domain.states import JobKind
from app.services.overrides import accept_proposal, get_decision, override_decision

router = APIRouter(prefix="/v1", tags=["decisions"])

JOB_PATH = "/fine_tuning/jobs/{fine_tuning_job_id}/decisions/{decision_id}"
RUN_PATH = "/runs/{run_id}/decisions/{decision_id}"


@router.get("/decisions/{decision_id}")
def retrieve_decision(
    decision_id: str, request: Request, session: SessionDep, caller: JobsReader
) -> FoundDecision:
    """A decision on a job or a run; `include=evidence` adds all it rested on, from which it can be replayed."""
    key = parse_id("decision", decision_id, param="decision_id")
    row, job = get_decision(session, caller.project_id, key)
    return show_found(row, job, with_evidence=wants(request, "evidence"))


@router.post(JOB_PATH + "/override", response_model=DecisionObject)
def override_job_decision(
    fine_tuning_job_id: str, decision_id: str, body: Override, caller: JobsWriter, writer: WriterDep
) -> Response:
    """Orders something else than was decided, with the reason; it takes effect before the next step."""
    job = parse_id("job", fine_tuning_job_id, param="fine_tuning_job_id")
    return _order(override_decision, JobKind.FINE_TUNING, job, decision_id, body, caller, writer)


@router.post(JOB_PATH + "/accept", response_model=DecisionObject)
def accept_job_decision(
    fine_tuning_job_id: str, decision_id: str, body: Accept, caller: JobsWriter, writer: WriterDep
) -> Response:
    """Has what a `dry_run` policy proposed carried out, while it still applies."""
    job = parse_id("job", fine_tuning_job_id, param="fine_tuning_job_id")
    return _order(accept_proposal, JobKind.FINE_TUNING, job, decision_id, body, caller, writer)


@router.post(RUN_PATH + "/override", response_model=RunDecisionObject)
def override_run_decision(
    run_id: str, decision_id: str, body: Override, caller: JobsWriter, writer: WriterDep
) -> Response:
    """Orders something else than was decided; the run's trainer fetches it with its next decisions."""
    run = parse_id("run", run_id, param="run_id")
    return _order(override_decision, JobKind.EXTERNAL, run, decision_id, body, caller, writer)


@router.post(RUN_PATH + "/accept", response_model=RunDecisionObject)
def accept_run_decision(
    run_id: str, decision_id: str, body: Accept, caller: JobsWriter, writer: WriterDep
) -> Response:
    """Has what a `dry_run` policy proposed carried out; the run's trainer fetches it."""
    run = parse_id("run", run_id, param="run_id")
    return _order(accept_proposal, JobKind.EXTERNAL, run, decision_id, body, caller, writer)


def _order(
    act: Callable[..., DecisionRow],
    kind: JobKind,
    job: UUID,
    decision_id: str,
    body: Override | Accept,
    caller: Caller,
    writer: Writer,
) -> Response:
    key = parse_id("decision", decision_id, param="decision_id")

    def work(session: Session) -> DecisionObject | RunDecisionObject:
        row = act(session, caller, job, key, body, kind=kind)
        session.refresh(row)
        if kind is JobKind.EXTERNAL:
            return show_run_decision(row, None)
        return show_decision(row, with_evidence=False)

    return writer.run(caller, body, work)

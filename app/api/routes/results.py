"""Benchmark results: posted from outside, and read back."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy.orm import Session

from app.api.dependencies import (
    JobsReader,
    Resources,
    ResourcesDep,
    ResultsReader,
    ResultsWriter,
    SessionDep,
    WriterDep,
)
from app.api.paging import After, Limit, parse_after, wants
from app.api.schemas.base import Page, build_page
from app.api.schemas.results import PostedResultsObject, ResultObject, show_look, show_result
from app.domain.identifiers import parse_id
from app.domain.requests import PostedBody
from app.domain.results import PostedResults
from app.domain.scopes import Caller
from app.services.posting import post_results as record_posted
from app.services.results_query import WantedResults, list_results, show_results

router = APIRouter(tags=["benchmark results"])

INCLUDED = ("items", "subjects")
MAX_WITH_ITEMS = 20  # results of a page, when each brings its items


@dataclass(frozen=True, slots=True)
class ResultQuery:
    """The query of a list of results."""

    benchmark: Annotated[str | None, Query(max_length=256)] = None
    purpose: Literal["baseline", "gate", "report", "monitor"] | None = None
    after: After = None
    limit: Limit = 20
    order: Literal["asc", "desc"] = "desc"


@router.post("/v1/benchmark_results", response_model=PostedResultsObject)
def post_results(
    body: PostedBody, caller: ResultsWriter, writer: WriterDep, resources: ResourcesDep
) -> Response:
    """Records results, one or several; those of one subject and step make one look of the sensor."""
    posted = body if isinstance(body, PostedResults) else PostedResults(results=(body,))

    def work(session: Session) -> PostedResultsObject:
        looks = record_posted(
            session,
            resources.storage,
            caller,
            posted,
            max_queued=resources.settings.max_queued_jobs,
        )
        shown = []
        for look in looks:
            for row in look.evaluations:
                session.refresh(row)
            results = show_results(session, resources.storage, look.evaluations, with_items=False)
            shown.append(show_look(look, results))
        return PostedResultsObject(data=shown)

    return writer.run(caller, posted, work)


@router.get("/v1/benchmark_results")
def list_all_results(
    request: Request,
    session: SessionDep,
    caller: ResultsReader,
    resources: ResourcesDep,
    wanted: Annotated[ResultQuery, Depends()],
    subject_id: Annotated[str | None, Query(max_length=512)] = None,
) -> Page[ResultObject]:
    """Results of a job, a model version or a base model; `include=items` adds each item's score, `include=subjects` each subject's."""
    return _load(request, session, caller, resources, wanted, subject_id)


@router.get("/v1/fine_tuning/jobs/{fine_tuning_job_id}/benchmark_results")
def list_job_results(
    fine_tuning_job_id: str,
    request: Request,
    session: SessionDep,
    caller: JobsReader,
    resources: ResourcesDep,
    wanted: Annotated[ResultQuery, Depends()],
) -> Page[ResultObject]:
    """Results of one job; `include=items` adds each item's score, `include=subjects` each subject's."""
    parse_id("job", fine_tuning_job_id, param="fine_tuning_job_id")
    return _load(request, session, caller, resources, wanted, fine_tuning_job_id)


def _load(
    request: Request,
    session: Session,
    caller: Caller,
    resources: Resources,
    wanted: ResultQuery,
    subject_id: str | None,
) -> Page[ResultObject]:
    with_items = wants(request, "items", known=INCLUDED)
    found, has_more = list_results(
        session,
        caller.project_id,
        WantedResults(subject_id, wanted.benchmark, wanted.purpose),
        after=parse_after("evaluation", wanted.after),
        limit=min(wanted.limit, MAX_WITH_ITEMS) if with_items else wanted.limit,
        is_newest_first=wanted.order == "desc",
    )
    shown = show_results(
        session,
        resources.storage,
        found,
        with_items=with_items,
        with_subjects=wants(request, "subjects", known=INCLUDED),
    )
    return build_page([show_result(result) for result in shown], has_more=has_more)

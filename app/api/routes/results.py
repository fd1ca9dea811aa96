"""Benchmark results: posted from outside, and read back."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
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
from app.api.paging import After, parse_after, wants
from app.api.schemas.base import Page, Schema, build_page
from app.api.schemas.results import (
    PointsObject,
    PostedResultsObject,
    ResultObject,
    show_look,
    show_points,
    show_result,
)
from app.db.repositories.results import Window
from app.domain.identifiers import parse_id
from app.domain.requests import PostedBody
from app.domain.results import PostedResults
from app.domain.scopes import Caller
from app.errors import BadRequest
from app.services.posting import post_results as record_posted
from app.services.results_query import (
    WantedResults,
    list_points,
    list_results,
    show_results,
)

router = APIRouter(tags=["benchmark results"])

MINIMAL = "return=minimal"
INCLUDED = ("items", "subjects")
MAX_RESULTS = 100  # of a page
MAX_POINTS = 10_000  # of a page, as columns of numbers
MAX_WITH_ITEMS = 20  # results of a page, when each brings its items


@dataclass(frozen=True, slots=True)
class ResultQuery:
    """The query of a list of results."""

    benchmark: Annotated[str | None, Query(max_length=256)] = None
    purpose: Literal["baseline", "gate", "report", "monitor"] | None = None
    after: After = None
    limit: Annotated[
        int,
        Query(ge=1, le=MAX_POINTS, description=f"At most {MAX_RESULTS} without `format=points`"),
    ] = 20
    order: Literal["asc", "desc"] = "desc"
    latest: Annotated[bool, Query(description="Of each benchmark of the subject the newest")] = (
        False
    )
    format: Annotated[
        Literal["points"] | None, Query(description="`points`: steps, values and times alone")
    ] = None


@router.post("/v1/benchmark_results", response_model=PostedResultsObject)
def post_results(
    body: PostedBody,
    caller: ResultsWriter,
    writer: WriterDep,
    resources: ResourcesDep,
    prefer: Annotated[str | None, Header(max_length=256)] = None,
) -> Response:
    """Records results, one or several; those of one subject and step make one look of the sensor.

    With `Prefer: return=minimal` the answer leaves out the looks of which nothing was made.
    """
    posted = body if isinstance(body, PostedResults) else PostedResults(results=(body,))
    is_minimal = prefers_minimal(prefer)

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
            if is_minimal and look.is_plain:
                continue
            results = show_results(session, resources.storage, look.evaluations, with_items=False)
            shown.append(show_look(look, results))
        return PostedResultsObject(data=shown, n_results=len(posted.results))

    answer = writer.run(caller, posted, work)
    if is_minimal:
        answer.headers["preference-applied"] = MINIMAL
    return answer


@router.get("/v1/benchmark_results", response_model=Page[ResultObject] | PointsObject)
def list_all_results(
    request: Request,
    session: SessionDep,
    caller: ResultsReader,
    resources: ResourcesDep,
    wanted: Annotated[ResultQuery, Depends()],
    subject_id: Annotated[str | None, Query(max_length=512)] = None,
) -> Response:
    """Results of a job, a model version or a base model; `include=items` adds each item's score, `include=subjects` each subject's."""
    return _load(request, session, caller, resources, wanted, subject_id)


@router.get(
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/benchmark_results",
    response_model=Page[ResultObject] | PointsObject,
)
def list_job_results(
    fine_tuning_job_id: str,
    request: Request,
    session: SessionDep,
    caller: JobsReader,
    resources: ResourcesDep,
    wanted: Annotated[ResultQuery, Depends()],
) -> Response:
    """Results of one job; `include=items` adds each item's score, `include=subjects` each subject's."""
    parse_id("job", fine_tuning_job_id, param="fine_tuning_job_id")
    return _load(request, session, caller, resources, wanted, fine_tuning_job_id)


def prefers_minimal(prefer: str | None) -> bool:
    """Whether the client wants no more in the answer than it does not know (RFC 7240)."""
    wishes = (prefer or "").replace(";", ",").split(",")
    return MINIMAL in {wish.strip().lower() for wish in wishes}


def _load(
    request: Request,
    session: Session,
    caller: Caller,
    resources: Resources,
    query: ResultQuery,
    subject_id: str | None,
) -> Response:
    with_items = wants(request, "items", known=INCLUDED)
    with_subjects = wants(request, "subjects", known=INCLUDED)
    wanted = WantedResults(subject_id, query.benchmark, query.purpose, query.latest)
    limit = min(query.limit, MAX_WITH_ITEMS) if with_items else query.limit
    window = Window(parse_after("evaluation", query.after), limit, query.order == "desc")
    if query.format == "points":
        if with_items or with_subjects:
            raise BadRequest("include: points bring nothing else.", "include")
        points = list_points(session, caller.project_id, wanted, window)
        return _answer(show_points(points))
    if query.limit > MAX_RESULTS:
        raise BadRequest(f"limit: at most {MAX_RESULTS} without format=points.", "limit")
    found, has_more = list_results(
        session, caller.project_id, wanted, window, with_scores=with_items or with_subjects
    )
    shown = show_results(
        session, resources.storage, found, with_items=with_items, with_subjects=with_subjects
    )
    return _answer(build_page([show_result(result) for result in shown], has_more=has_more))


def _answer(shown: Schema) -> Response:
    """Goes out as it was built: to check it again and dump it by way of dicts takes longer than the query."""
    return Response(shown.model_dump_json(), media_type="application/json")

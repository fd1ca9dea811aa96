"""What a fine-tuning job would take, asked with the body that would submit it."""

from fastapi import APIRouter, Response
from sqlalchemy.orm import Session

from app.api.dependencies import JobsWriter, ResourcesDep, WriterDep
from app.api.schemas.estimates import EstimateObject, show_estimate
from app.domain.spec import CreateJob
from app.services.estimates import estimate_job

router = APIRouter(prefix="/v1/fine_tuning/estimates", tags=["fine-tuning"])


@router.post("", response_model=EstimateObject)
def create_estimate(
    body: CreateJob, caller: JobsWriter, writer: WriterDep, resources: ResourcesDep
) -> Response:
    """Reckons memory, disk, tokens and time of a job, and whether it fits; no job is made."""
    again = writer.replay(caller, body)
    if again is not None:
        return again
    found = estimate_job(resources.session_factory, resources.storage, caller.project_id, body)

    def work(_session: Session) -> EstimateObject:
        return show_estimate(found)

    return writer.run(caller, body, work)

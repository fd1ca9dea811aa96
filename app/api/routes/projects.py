"""The caller's project, with its quotas and what it uses of them."""

from fastapi import APIRouter

from app.api.dependencies import JobsReader, ResourcesDep, SessionDep
from app.api.schemas.base import Page, build_page
from app.api.schemas.keys import ProjectObject, show_project
from app.domain.identifiers import parse_id
from app.errors import NotFound
from app.services.projects import get_project
from app.services.quotas import show_usage, standard_quotas

router = APIRouter(prefix="/v1/projects", tags=["projects"])


@router.get("")
def list_projects(
    session: SessionDep, caller: JobsReader, resources: ResourcesDep
) -> Page[ProjectObject]:
    """The one project that a key belongs to."""
    usage = show_usage(session, caller.project_id, standard_quotas(resources.settings))
    return build_page(
        [show_project(get_project(session, caller.project_id), usage)], has_more=False
    )


@router.get("/{project_id}")
def retrieve_project(
    project_id: str, session: SessionDep, caller: JobsReader, resources: ResourcesDep
) -> ProjectObject:
    """The caller's project by its id."""
    if parse_id("project", project_id, param="project_id") != caller.project_id:
        raise NotFound("No project has this id.", "project_id")
    usage = show_usage(session, caller.project_id, standard_quotas(resources.settings))
    return show_project(get_project(session, caller.project_id), usage)

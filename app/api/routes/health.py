"""Whether the process lives, and whether it can serve."""

from typing import Literal

from fastapi import APIRouter, Response

from app.api.dependencies import ResourcesDep
from app.api.schemas.base import Schema
from app.services.health import check_health

router = APIRouter(tags=["health"])


class Health(Schema):
    """`degraded`: everything works, some of it slower."""

    status: Literal["ok", "degraded", "down"]
    components: dict[str, str]


@router.get("/healthz")
def healthz() -> Health:
    """The process answers."""
    return Health(status="ok", components={})


@router.get("/readyz", responses={503: {"model": Health}})
def readyz(resources: ResourcesDep, response: Response) -> Health:
    """The database answers; without Redis jobs start up to a poll later."""
    found = dict(check_health(resources.session_factory, resources.settings.redis_url))
    if found["database"] != "ok":
        response.status_code = 503
        return Health(status="down", components=found)
    is_whole = all(state == "ok" for state in found.values())
    return Health(status="ok" if is_whole else "degraded", components=found)

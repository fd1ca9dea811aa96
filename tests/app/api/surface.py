"""Every route of the application, documented or not, and a body that each of them takes."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute


class Endpoint(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    route: APIRoute


def every_endpoint(app: FastAPI) -> list[Endpoint]:
    """Method and path of every route that FastAPI serves, hidden ones included."""
    return [
        Endpoint(method, route.path, route)
        for route in _walk(app.routes)
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]


def _walk(routes: Iterable[BaseRoute]) -> Iterator[APIRoute]:
    for route in routes:
        included = getattr(route, "original_router", None)  # routers are kept as they were included
        if included is not None:
            yield from _walk(included.routes)
        elif isinstance(route, APIRoute):
            yield route


def body_for(path: str) -> dict[str, Any]:
    """A body that a route takes, naming nothing that exists."""
    if path in BODIES:
        return BODIES[path]
    return next((body for end, body in ENDINGS.items() if path.endswith(end)), {})


NO_FILE = "file-" + "0" * 32
SCORES = [{"benchmark": "b", "items": [{"id": "1", "score": 1}]}]

#: Of routes that make something.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/uploads": {"bytes": 3, "filename": "f", "mime_type": "text/plain", "purpose": "fine-tune"},
    "/v1/fine_tuning/jobs": {"model": "tiny", "training_file": NO_FILE},
    "/v1/fine_tuning/estimates": {"model": "tiny", "training_file": NO_FILE},
    "/v1/registered_models": {"name": "n"},
    "/v1/monitors": {"model": "n@production", "benchmarks": [{"name": "b"}], "sources": ["s"]},
    "/v1/benchmarks": {"name": "b", "file": NO_FILE, "scorer": "nll"},
    "/v1/benchmark_results": {
        "results": [
            {
                "subject": {"type": "model", "id": "n"},
                "benchmark": "b",
                "metric": "accuracy",
                "value": 0.5,
            }
        ]
    },
    "/v1/runs": {"model": "m", "policy": {"benchmarks": [{"name": "b"}]}},
    "/v1/webhook_endpoints": {
        "url": "https://example.com/",
        "event_types": ["fine_tuning.job.succeeded"],
    },
    "/v1/api_keys": {"name": "n"},
}
#: Of routes on something that exists, by the end of their paths.
ENDINGS: dict[str, dict[str, Any]] = {
    "/publish": {"alpha": 0.5},
    "/baseline": {"scores": SCORES},
    "/evaluations": {"scores": SCORES, "step": 1},
    "/acknowledge": {"step": 1},
    "/override": {"action": "stop", "reason": "r"},
    "/versions": {"model": "m"},
    "/promote": {"version": 1},
    "/aliases/{alias}": {"version": 1},
    "/complete": {"part_ids": ["part_" + "0" * 32]},
    "/deliveries/retry": {"since": 0},
    "{webhook_endpoint_id}/test": {"event_type": "fine_tuning.job.succeeded"},
    "{webhook_endpoint_id}": {"name": "n"},
}

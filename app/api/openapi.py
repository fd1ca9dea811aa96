"""The OpenAPI document: what FastAPI writes, completed in one place with errors, headers, examples and links."""

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from app.api.errors import ErrorBody, ErrorDetail, envelope_example
from app.api.openapi_examples import REQUESTS, build_example
from app.api.openapi_links import build_links

DESCRIPTION: Final = """\
Fine-tunes language models without letting them forget. Files, uploads, jobs, models and webhooks are OpenAI's, so
that its clients work unchanged; what is Retain's own stands beside their fields.

Every error is `{"error": {"message", "type", "param", "code"}}`, every answer carries `x-request-id`, and every `POST`
takes an `Idempotency-Key`. A body may be at most 1 MiB of JSON (files: as multipart, also with
`Content-Encoding: gzip`).
"""

TAGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "files": "Rows to train on and items of benchmarks, checked line by line when they arrive.",
        "uploads": "Large files in parts, which a sender that was cut off goes on with.",
        "fine-tuning": "Jobs: submitted, watched, paused, cancelled; their events, checkpoints and frontier.",
        "models": "Base models and published versions.",
        "registered models": "Numbered versions under a name, and aliases that say which one is live.",
        "monitors": "What watches a deployed alias and rolls it back.",
        "benchmarks": "Fixed, versioned lists of scored items.",
        "benchmark results": "Scores, measured by Retain or posted from outside.",
        "external runs": "Trainings that Retain does not execute but decides on.",
        "decisions": "What the controller did and why, and what people ordered against it.",
        "webhooks": "Receivers of signed events, and their deliveries.",
        "keys": "API keys of the caller's project.",
        "projects": "The caller's project with its quotas.",
        "audit log": "Who changed what.",
        "health": "Whether the process lives, and whether it can serve.",
    }
)

#: Statuses that a route can answer beyond those which its shape implies.
FURTHER: Final[Mapping[str, frozenset[int]]] = MappingProxyType(
    {
        # They name things in their bodies or queries.
        "fine_tuning_create_job": frozenset({404}),
        "fine_tuning_create_estimate": frozenset({404}),
        "benchmarks_create_benchmark": frozenset({404}),
        "benchmark_results_post_results": frozenset({404}),
        "monitors_create_monitor": frozenset({404}),
        "external_runs_register_run": frozenset({404}),
        "keys_create_api_key": frozenset({404}),
        # They are refused in some states, or while something needs the thing.
        "files_delete_file": frozenset({409}),
        "files_read_file": frozenset({409}),
        "models_delete_model": frozenset({409}),
        "registered_models_update_registered_model": frozenset({409}),
        "registered_models_delete_alias": frozenset({409}),
        "monitors_update_monitor": frozenset({409}),
        "monitors_delete_monitor": frozenset({409}),
        "keys_revoke_api_key": frozenset({409}),
    }
)

#: Query parameters that routes read by hand, for their names have brackets.
_INCLUDE: Final = MappingProxyType(
    {
        "decisions_retrieve_decision": ("evidence",),
        "fine_tuning_list_decisions": ("evidence",),
        "external_runs_list_decisions": ("evidence",),
        "benchmark_results_list_all_results": ("items", "subjects"),
        "benchmark_results_list_job_results": ("items", "subjects"),
    }
)
_METADATA: Final = MappingProxyType(
    {
        "name": "metadata",
        "in": "query",
        "required": False,
        "style": "deepObject",
        "explode": True,
        "description": "`metadata[key]=value`: only jobs that carry the pair; `metadata=null`: only those without any.",
        "schema": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 512}},
    }
)
#: 1 to 255 printable characters, which may stand in quotes as the IETF draft has it.
_KEY: Final = '^([!#-~]([ -~]{0,253}[!-~])?|"([ -~]{1,255}"|[ -~]{0,253}[!#-~]))$'
#: What headers must look like, where routes check more than their length.
_SHAPES: Final[Mapping[str, dict[str, Any]]] = MappingProxyType(
    {
        "idempotency-key": {
            "description": "Makes the request safe to send again for 24 hours: it is carried out once.",
            "schema": {"type": "string", "pattern": _KEY},
        },
        "if-match": {
            "description": "The ETag that was read, or `*`: 412 otherwise.",
            "schema": {"type": "string", "pattern": '^(\\*|"?[0-9]{1,18}"?)$'},
        },
        "if-none-match": {
            "description": "`*`: 412 when the alias exists.",
            "schema": {"type": "string", "enum": ["*"]},
        },
    }
)
_GZIP: Final = "The body may be compressed: `Content-Encoding: gzip`."

_WORDS: Final[Mapping[int, tuple[str, str, str | None, str]]] = MappingProxyType(
    {
        400: ("Something in the request is not acceptable; `param` names it.",
              "training.n_epochs: Input should be greater than or equal to 1", "training.n_epochs", "invalid_request"),
        401: ("There is no key, or it is unknown, expired or revoked.",
              "Send an API key: `Authorization: Bearer rt_live_...`.", None, "invalid_api_key"),
        403: ("The key lacks the scope, or the project's rules forbid it.",
              "The key lacks the scope 'jobs:write'.", None, "insufficient_scope"),
        404: ("The project has no such thing.",
              "No file has the id 'file-1'.", "training_file", "not_found"),
        409: ("The thing is in a state that does not allow this, or the first request with this Idempotency-Key"
              " still runs (then `x-should-retry: true`).",
              "The job has ended.", None, "conflict"),
        412: ("The thing has changed since it was read.",
              "The alias is at revision 4.", "If-Match", "precondition_failed"),
        413: ("The body is over the limit.",
              "The body is larger than the limit of 1,048,576 bytes.", None, "request_too_large"),
        422: ("The Idempotency-Key was used with another body.",
              "The key was used with another body.", "Idempotency-Key", "idempotency_key_reused"),
        429: ("Too many requests in this minute (`x-should-retry: true`), or a quota of the project is reached.",
              "The key has sent its 60,000 requests of this minute; send again in 12 s.", None, "rate_limit_exceeded"),
        503: ("Something that the server needs is away; try again.",
              "The database cannot be reached; try again.", None, "service_unavailable"),
    }
)  # fmt: skip
#: Fields that are shown once: they are not kept, so an answer that is replayed comes without them.
_SECRETS: Final = MappingProxyType(
    {"CreatedKeyObject": "value", "CreatedEndpointObject": "signing_secret"}
)
_COMMON: Final = ("x-request-id",)
_LIMITS: Final = (
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
)
_OF_STATUS: Final[Mapping[int, tuple[str, ...]]] = MappingProxyType(
    {
        401: ("www-authenticate",),
        409: ("x-should-retry", "retry-after"),
        429: ("x-should-retry", "retry-after"),
        503: ("retry-after",),
    }
)
_HEADERS: Final[Mapping[str, dict[str, Any]]] = MappingProxyType(
    {
        "x-request-id": {
            "description": "The request's id: the client's own, else a new one; the log has it.",
            "required": True,
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"},
            "example": "req_0f8fad5bd9cb469fa165c7085bd2c3a1",
        },
        "x-ratelimit-limit-requests": {
            "description": "Requests a minute of the tighter limit: the key's or its project's.",
            "schema": {"type": "integer", "minimum": 1},
            "example": 60000,
        },
        "x-ratelimit-remaining-requests": {
            "description": "What is left of it.",
            "schema": {"type": "integer", "minimum": 0},
            "example": 59999,
        },
        "x-ratelimit-reset-requests": {
            "description": "When it is whole again.",
            "schema": {"type": "string", "pattern": "^[0-9]+s$"},
            "example": "12s",
        },
        "retry-after": {
            "description": "Seconds after which sending the request again makes sense.",
            "schema": {"type": "integer", "minimum": 0},
            "example": 1,
        },
        "x-should-retry": {
            "description": "Whether clients should send it again by themselves.",
            "schema": {"type": "string", "enum": ["true", "false"]},
            "example": "false",
        },
        "www-authenticate": {
            "description": "How to authenticate.",
            "schema": {"type": "string"},
            "example": "Bearer",
        },
        "idempotent-replayed": {
            "description": "The answer is the one that the first request with this Idempotency-Key got.",
            "schema": {"type": "string", "enum": ["true"]},
            "example": "true",
        },
        "etag": {
            "description": "The alias's revision.",
            "schema": {"type": "string", "pattern": '^"[0-9]+"$'},
            "example": '"4"',
        },
    }
)
_METHODS: Final = frozenset({"get", "put", "post", "patch", "delete"})


def operation_id(route: APIRoute) -> str:
    """The id of a route's operation: its tag and its function's name."""
    tag = str(route.tags[0]) if route.tags else "untagged"
    return f"{tag}_{route.name}".replace(" ", "_").replace("-", "_")


def install_openapi(app: FastAPI) -> None:
    """Has the application answer with the completed document; it is made once, when first asked for."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    description=DESCRIPTION,
                    routes=app.routes,
                    tags=[{"name": name, "description": text} for name, text in TAGS.items()],
                )
            )
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Adds to every operation what its shape implies; a new route needs no words here for that."""
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # the envelope takes their place
        schemas.pop(name, None)
    for model in (ErrorBody, ErrorDetail):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
        schemas[model.__name__] = schema
    for name, secret in _SECRETS.items():
        schemas[name]["required"].remove(secret)
        schemas[name]["properties"][secret]["description"] = "Missing in a replayed answer."
    document["components"]["headers"] = {name: dict(header) for name, header in _HEADERS.items()}
    document["components"]["responses"] = {
        component_of(status): _error(status) for status in _WORDS
    }
    operations = {
        operation["operationId"]: (path, method, operation)
        for path, method, operation in list_operations(document)
    }
    links = build_links({name: path for name, (path, _, _) in operations.items()})
    for name, (path, method, operation) in operations.items():
        operation.setdefault("security", [])
        _add_parameters(name, operation)
        _add_errors(name, path, method, operation)
        _add_example_of_body(name, operation)
        for status, response in operation["responses"].items():
            if "$ref" not in response:
                _add_headers(response, operation, int(status))
                _add_example(response, schemas)
        if name in links:
            operation["responses"]["200"]["links"] = links[name]
    return document


def list_operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method and operation of everything in a document."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method in _METHODS:
                yield path, method, operation


def component_of(status: int) -> str:
    """The name of an error's component."""
    return HTTPStatus(status).name.title().replace("_", "")


def _error(status: int) -> dict[str, Any]:
    description, message, param, code = _WORDS[status]
    limits = _LIMITS if status not in {401, 413, 503} else ()
    names = (*_COMMON, *limits, *_OF_STATUS.get(status, ()))
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/ErrorBody"},
                "example": envelope_example(status, message, param=param, code=code),
            }
        },
    }


def _add_errors(name: str, path: str, method: str, operation: dict[str, Any]) -> None:
    parameters = {parameter["name"].lower() for parameter in operation.get("parameters", [])}
    statuses = set(FURTHER.get(name, ()))
    if operation["security"]:
        statuses |= {401, 403, 429, 503}
    if parameters or "requestBody" in operation:
        statuses.add(400)
    if "{" in path or "after" in parameters:
        statuses.add(404)
    if "idempotency-key" in parameters:
        statuses |= {409, 422}
    if "if-match" in parameters:
        statuses.add(412)
    if method != "get":
        statuses.add(413)
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own words on bad requests; here they are a 400
    for status in sorted(statuses):
        responses[str(status)] = {"$ref": f"#/components/responses/{component_of(status)}"}


def _add_parameters(name: str, operation: dict[str, Any]) -> None:
    parameters = operation.setdefault("parameters", [])
    for parameter in parameters:
        if parameter["in"] == "header":
            parameter.update(_SHAPES.get(parameter["name"].lower(), {}))
    if name in _INCLUDE:
        words = list(_INCLUDE[name])
        parameters.append(
            {
                "name": "include",
                "in": "query",
                "required": False,
                "description": "What is added to the answer; `include[]` is the same.",
                "schema": {"type": "array", "items": {"type": "string", "enum": words}},
            }
        )
    if name == "fine_tuning_list_jobs":
        parameters.append(dict(_METADATA))


def _add_example_of_body(name: str, operation: dict[str, Any]) -> None:
    body = operation.get("requestBody")
    if body is None:
        return
    if "multipart/form-data" in body["content"]:
        body["description"] = _GZIP
    if name in REQUESTS:
        body["content"]["application/json"]["example"] = REQUESTS[name]


def _add_headers(response: dict[str, Any], operation: dict[str, Any], status: int) -> None:
    names = [*_COMMON, *(_LIMITS if operation["security"] else ()), *_OF_STATUS.get(status, ())]
    parameters = {parameter["name"].lower() for parameter in operation["parameters"]}
    if "idempotency-key" in parameters:
        names.append("idempotent-replayed")
    headers = response.setdefault("headers", {})
    for name in names:
        headers[name] = {"$ref": f"#/components/headers/{name}"}
    schema = response.get("content", {}).get("application/json", {}).get("schema", {})
    if schema.get("$ref", "").endswith("/AliasObject"):
        headers["etag"] = {"$ref": "#/components/headers/etag"}


def _add_example(response: dict[str, Any], schemas: Mapping[str, Any]) -> None:
    media = response.get("content", {}).get("application/json")
    if media is not None and "schema" in media:
        media["example"] = build_example(media["schema"], schemas)

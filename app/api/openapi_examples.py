"""Examples of the OpenAPI document: requests as they are written, answers made from their schemas."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

from app.domain.identifiers import public_id


def example_id(kind: str, number: int = 1) -> str:
    """The id that stands in examples for a thing of this kind."""
    return public_id(kind, UUID(int=number))


FILE: Final = example_id("file")
ITEMS_FILE: Final = example_id("file", 2)
JOB: Final = example_id("job", 3)
MODEL: Final = "ft:llama:acme:support:00000004"
HOUR: Final = 1_790_003_600

_SCORES: Final = [
    {"benchmark": "reasoning", "items": [{"id": "i0", "score": 1}, {"id": "i1", "score": 0}]}
]

#: A JSON body for every operation that takes one; a test validates each and posts it.
REQUESTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "fine_tuning_create_job": {
            "model": "llama",
            "training_file": FILE,
            "suffix": "support",
            "metadata": {"team": "support"},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
            "training": {"type": "lora"},
            "retention": {
                "strategies": [{"type": "ewc"}, {"type": "replay", "strength": 0.1}],
                "policy": {"benchmarks": [{"name": "reasoning"}], "max_drop": 0.03},
            },
        },
        "fine_tuning_create_estimate": {"model": "llama", "training_file": FILE},
        "fine_tuning_rerun_job": {"metadata": {"again": "yes"}},
        "fine_tuning_publish_point": {"alpha": 0.6, "suffix": "milder"},
        "uploads_create_upload": {
            "bytes": 1048576,
            "filename": "rows.jsonl",
            "mime_type": "application/jsonl",
            "purpose": "fine-tune",
        },
        "uploads_complete_upload": {"part_ids": [example_id("upload_part")]},
        "registered_models_create_registered_model": {
            "name": "support-bot",
            "gate": "held",
            "max_cumulative_drop": 0.05,
        },
        "registered_models_update_registered_model": {"description": "Answers tickets."},
        "registered_models_register_version": {"model": MODEL},
        "registered_models_put_alias": {"version": 1},
        "registered_models_promote_alias": {"version": 1, "reason": "Passed review."},
        "registered_models_roll_back_alias": {"to": "previous", "reason": "Tickets got worse."},
        "monitors_create_monitor": {
            "model": "support-bot@production",
            "benchmarks": [{"name": "reasoning"}],
            "sources": ["nightly"],
            "schedule": {"every_hours": 24},
            "stale_after_hours": 48,
        },
        "monitors_update_monitor": {"enabled": False},
        "benchmarks_create_benchmark": {
            "name": "reasoning",
            "file": ITEMS_FILE,
            "scorer": "multiple_choice",
        },
        "benchmark_results_post_results": {
            "results": [
                {
                    "subject": {"type": "fine_tuning.job", "id": JOB},
                    "benchmark": "reasoning",
                    "metric": "accuracy",
                    "value": 0.5,
                    "step": 10,
                }
            ]
        },
        "external_runs_register_run": {
            "model": "my-model",
            "policy": {"benchmarks": [{"name": "reasoning"}]},
        },
        "external_runs_post_baseline": {"scores": _SCORES},
        "external_runs_post_evaluation": {"step": 10, "scores": _SCORES},
        "external_runs_acknowledge_decision": {"step": 11},
        "external_runs_finish_run": {"status": "succeeded"},
        "decisions_override_job_decision": {"action": "stop", "reason": "The rows were wrong."},
        "decisions_accept_job_decision": {"reason": "Agreed."},
        "decisions_override_run_decision": {"action": "stop", "reason": "The rows were wrong."},
        "decisions_accept_run_decision": {"reason": "Agreed."},
        "webhooks_create_endpoint": {
            "name": "ci",
            "url": "https://example.com/hooks/retain",
            "event_types": ["fine_tuning.job.succeeded", "retention.rolled_back"],
        },
        "webhooks_update_endpoint": {"name": "ci-2"},
        "webhooks_rotate_secret": {"keep_old_secret_active_for_24_hours": True},
        "webhooks_send_sample": {"event_type": "fine_tuning.job.succeeded"},
        "webhooks_retry_deliveries": {"since": 1_790_000_000},
        "keys_create_api_key": {"name": "ci", "scopes": ["jobs:read", "jobs:write"]},
        "keys_rotate_api_key": {"overlap_seconds": 3600},
    }
)

#: Which kind of id a schema's `id` is.
_KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "FileObject": "file",
        "UploadObject": "upload",
        "PartedUploadObject": "upload",
        "PartObject": "upload_part",
        "JobObject": "job",
        "EventObject": "event",
        "CheckpointObject": "checkpoint",
        "BenchmarkObject": "benchmark",
        "BenchmarkVersionObject": "benchmark_version",
        "ResultObject": "evaluation",
        "RunObject": "run",
        "RegisteredModelObject": "registered_model",
        "AliasChangeObject": "alias_change",
        "MonitorObject": "monitor",
        "MonitorLookObject": "monitor_look",
        "EndpointObject": "webhook_endpoint",
        "CreatedEndpointObject": "webhook_endpoint",
        "DeliveryObject": "webhook_delivery",
        "ApiKeyObject": "api_key",
        "CreatedKeyObject": "api_key",
        "ProjectObject": "project",
        "AuditEntryObject": "audit_entry",
        "DecisionObject": "decision",
        "FoundDecision": "decision",
        "RunDecisionObject": "decision",
        "AcknowledgedObject": "decision",
    }
)

#: What fields of these names show, where their schema lets them.
_FIELDS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "created_at": 1_790_000_000,
        "created": 1_790_000_000,
        "updated_at": 1_790_000_000,
        "measured_at": 1_790_000_000,
        "moved_at": 1_790_000_000,
        "expires_at": HOUR,
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "bytes": 1048576,
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "items_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "mime_type": "application/jsonl",
        "model": "llama",
        "root": "llama",
        "organization_id": example_id("project"),
        "training_file": FILE,
        "file": ITEMS_FILE,
        "fine_tuning_job_id": JOB,
        "subject_id": JOB,
        "run_id": example_id("run"),
        "upload_id": example_id("upload"),
        "webhook_endpoint_id": example_id("webhook_endpoint"),
        "event_id": example_id("webhook_event"),
        "version_id": example_id("benchmark_version"),
        "fine_tuned_model_checkpoint": f"{MODEL}:ckpt-step-10",
        "fine_tuned_model": MODEL,
        "user_provided_suffix": "support",
        "registered_model": "support-bot",
        "alias": "production",
        "benchmark": "reasoning@1",
        "owned_by": "acme",
        "event_type": "fine_tuning.job.succeeded",
        "event_types": ["fine_tuning.job.succeeded"],
        "url": "https://example.com/hooks/retain",
        "metric": "accuracy",
        "value": 0.5,
        "source": "nightly",
        "message": "Step 10 of 100: loss 1.25.",
        "metadata": {"team": "support"},
        "redacted_value": "rt_live_a1b2c3d4_...",
        "signing_secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "scopes": ["jobs:read", "jobs:write"],
        "seed": 42,
        "actor": "key a1b2c3d4",
        "method": "POST",
        "route": "/v1/fine_tuning/jobs",
        "address": "10.0.0.7",
        "reason": "The mean of the watched benchmarks holds.",
        "status_code": 200,
        "status": "queued",
    }
)
#: Names and words that differ by schema.
_OBJECTS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "FileObject": {"status": "processed"},
        "ModelObject": {"id": MODEL, "status": "ready", "sha256": None},
        "AliasObject": {"id": "support-bot@production", "model": MODEL},
        "RegisteredModelObject": {"name": "support-bot"},
        "RegisteredVersionObject": {"id": "support-bot@1", "model": MODEL, "parent": "llama"},
        "MonitorObject": {"model": "support-bot@production", "points_at": MODEL},
        "MonitorLookObject": {"model": MODEL},
        "BenchmarkObject": {"name": "reasoning", "source": None},
        "BenchmarkVersionObject": {"name": "reasoning", "source": None},
        "ProjectObject": {"name": "acme"},
        "CreatedKeyObject": {"name": "ci", "value": "rt_live_a1b2c3d4_" + "x" * 43},
        "ApiKeyObject": {"name": "ci"},
        "EndpointObject": {"name": "ci"},
        "CreatedEndpointObject": {"name": "ci"},
        "AuditEntryObject": {"status": 200, "object_ids": [JOB]},
        "Deleted": {"id": FILE, "object": "file"},
        "ResultObject": {"purpose": "posted"},
    }
)

Schemas = Mapping[str, Mapping[str, Any]]


def build_example(schema: Mapping[str, Any], schemas: Schemas, *, name: str = "") -> Any:  # noqa: ANN401
    """A value that a schema takes: telling ones where the field's name is known, else the plainest.

    Args:
        schema: Of the value.
        schemas: The document's components.
        name: Of the component that the schema is.
    """
    schema, name = _resolve(schema, schemas, name)
    for key in ("const", "default"):
        if schema.get(key) is not None:
            return schema[key]
    if "enum" in schema:
        return schema["enum"][0]
    for union in ("anyOf", "oneOf"):
        if union in schema:
            is_optional = any(branch.get("type") == "null" for branch in schema[union])
            return None if is_optional else build_example(schema[union][0], schemas)
    if schema.get("type") == "object":
        return _build_object(schema, schemas, name)
    if schema.get("type") == "array":
        # Of lists of plain values nothing is known; a list of objects shows one.
        item, _ = _resolve(schema.get("items", {}), schemas, "")
        needs_one = schema.get("minItems", 0) > 0 or name.startswith("Page of ")
        return [build_example(schema["items"], schemas)] if needs_one and item else []
    return _build_scalar(schema)


def _build_object(schema: Mapping[str, Any], schemas: Schemas, name: str) -> dict[str, Any]:
    own = dict(_OBJECTS.get(name, {}))
    if name in _KINDS:
        own["id"] = example_id(_KINDS[name], 3 if name == "JobObject" else 1)
    made = {}
    for field, inner in schema.get("properties", {}).items():
        known = own.get(field, _FIELDS.get(field))
        is_page = field == "data" and "has_more" in schema.get("properties", {})
        if field in own or (known is not None and _takes(inner, known, schemas)):
            made[field] = known
        else:
            made[field] = build_example(inner, schemas, name="Page of items" if is_page else "")
    if {"first_id", "last_id"} <= made.keys() and made.get("data"):
        page: Any = made["data"]
        made["first_id"] = made["last_id"] = page[0]["id"]
    return made


def _build_scalar(schema: Mapping[str, Any]) -> Any:  # noqa: ANN401
    match schema.get("type"):
        case "integer":
            return max(1, schema.get("minimum", 1))
        case "number":
            return max(0.5, schema.get("minimum", 0.5))
        case "boolean":
            return False
        case "string":
            return "text"
        case _:
            return None


def _resolve(
    schema: Mapping[str, Any], schemas: Schemas, name: str
) -> tuple[Mapping[str, Any], str]:
    while "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        schema = schemas[name]
    return schema, name


_TYPES: Final[Mapping[type, tuple[str, ...]]] = MappingProxyType(
    {
        bool: ("boolean",),
        int: ("integer", "number"),
        float: ("number",),
        str: ("string",),
        dict: ("object",),
        list: ("array",),
    }
)


def _takes(schema: Mapping[str, Any], value: object, schemas: Schemas) -> bool:
    """Whether a value of the table fits; where it does not, the schema speaks for itself."""
    schema, _ = _resolve(schema, schemas, "")
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        return any(_takes(branch, value, schemas) for branch in branches)
    if "const" in schema:
        return bool(schema["const"] == value)
    if "enum" in schema:
        return value in schema["enum"]
    return schema.get("type") in _TYPES[type(value)] and "properties" not in schema

"""Links of the OpenAPI document: what can be done next with what an operation answered."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

_ID: Final = "$response.body#/id"


class Maker(NamedTuple):
    """An operation after which others can be called, by the parameter that its answer fills."""

    parameter: str
    expression: str = _ID


#: Every operation whose only path parameter is the maker's is linked, new ones too.
MAKERS: Final[Mapping[str, Maker]] = MappingProxyType(
    {
        "files_upload_file": Maker("file_id"),
        "uploads_create_upload": Maker("upload_id"),
        "fine_tuning_create_job": Maker("fine_tuning_job_id"),
        "fine_tuning_rerun_job": Maker("fine_tuning_job_id"),
        "fine_tuning_publish_point": Maker("model"),
        "registered_models_create_registered_model": Maker(
            "registered_model", "$response.body#/name"
        ),
        "monitors_create_monitor": Maker("monitor_id"),
        "benchmarks_create_benchmark": Maker("benchmark", "$response.body#/name"),
        "external_runs_register_run": Maker("run_id"),
        "webhooks_create_endpoint": Maker("webhook_endpoint_id"),
        "keys_create_api_key": Maker("api_key_id"),
    }
)


class Step(NamedTuple):
    """One further link: parameters and a body out of a request and its answer."""

    source: str
    target: str
    parameters: Mapping[str, str] = MappingProxyType({})
    body: Mapping[str, Any] | None = None


_ALIAS: Final = MappingProxyType(
    {"registered_model": "$request.path.registered_model", "alias": "$request.path.alias"}
)
_MODEL: Final = MappingProxyType({"registered_model": "$request.path.registered_model"})

STEPS: Final = (
    Step(
        "files_upload_file",
        "fine_tuning_create_job",
        body={"model": "llama", "training_file": _ID, "retention": None},
    ),
    Step(
        "files_upload_file",
        "benchmarks_create_benchmark",
        body={"name": "linked", "file": _ID, "scorer": "multiple_choice"},
    ),
    Step(
        "uploads_add_part",
        "uploads_complete_upload",
        {"upload_id": "$request.path.upload_id"},
        {"part_ids": [_ID]},
    ),
    Step("uploads_complete_upload", "files_retrieve_file", {"file_id": "$response.body#/file/id"}),
    Step(
        "fine_tuning_create_job",
        "benchmark_results_list_all_results",
        {"subject_id": _ID},
    ),
    Step(
        "fine_tuning_list_decisions",
        "decisions_retrieve_decision",
        {"decision_id": "$response.body#/data/0/id"},
    ),
    Step(
        "external_runs_post_evaluation",
        "decisions_retrieve_decision",
        {"decision_id": _ID},
    ),
    Step(
        "external_runs_post_evaluation",
        "external_runs_acknowledge_decision",
        {"run_id": "$request.path.run_id", "decision_id": _ID},
    ),
    Step(
        "registered_models_register_version",
        "registered_models_retrieve_version",
        {**_MODEL, "version": "$response.body#/version"},
    ),
    Step(
        "registered_models_register_version",
        "registered_models_put_alias",
        {**_MODEL, "alias": "production"},
        {"version": "$response.body#/version"},
    ),
    *(
        Step("registered_models_put_alias", f"registered_models_{target}", _ALIAS)
        for target in ("retrieve_alias", "roll_back_alias", "delete_alias", "list_history")
    ),
    Step(
        "benchmark_results_post_results",
        "benchmark_results_list_all_results",
        {"benchmark": "$response.body#/data/0/results/0/benchmark"},
    ),
    Step(
        "webhooks_list_deliveries",
        "webhooks_retry_delivery",
        {
            "webhook_endpoint_id": "$request.path.webhook_endpoint_id",
            "delivery_id": "$response.body#/data/0/id",
        },
    ),
    Step(
        "projects_list_projects",
        "projects_retrieve_project",
        {"project_id": "$response.body#/data/0/id"},
    ),
)


def build_links(paths: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Links by the operation that they start from, given every operation's path."""
    found: dict[str, dict[str, Any]] = {}
    for source, maker in MAKERS.items():
        for target, path in paths.items():
            if path.count("{") == 1 and f"{{{maker.parameter}" in path:
                found.setdefault(source, {})[target] = {
                    "operationId": target,
                    "parameters": {maker.parameter: maker.expression},
                }
    for step in STEPS:
        link: dict[str, Any] = {"operationId": step.target}
        if step.parameters:
            link["parameters"] = dict(step.parameters)
        if step.body is not None:
            link["requestBody"] = step.body
        found.setdefault(step.source, {})[step.target] = link
    return found

"""`POST /v1/fine_tuning/estimates`: what a job would take, asked with the body that would submit it."""

from typing import Any

import pytest
from sqlalchemy import func, select

from app.db.models import BaseModel, Job
from app.domain.scopes import Scope
from tests.app.api.conftest import CHAT, Api
from tests.factories import make_benchmark, make_file, make_project, make_suite
from tests.shapes import FIVE_B, llama_shape

URL = "/v1/fine_tuning/estimates"


@pytest.fixture
def base(api: Api, base: BaseModel) -> BaseModel:
    base.details = base.details | {"shape": llama_shape(**FIVE_B).model_dump(mode="json")}
    api.session.commit()
    return base


def ask(api: Api, **body: Any) -> Any:
    if "training_file" not in body:
        body["training_file"] = api.upload([CHAT] * 40).json()["id"]
    return api.client.post(URL, json={"model": "tiny"} | body)


def test_a_job_is_reckoned_and_not_made(api: Api, base: BaseModel) -> None:
    answer = ask(api)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["object"] == "fine_tuning.estimate"
    assert found["num_parameters"] == 4_988_276_736
    memory = found["gpu_memory"]
    assert memory["weights"] == 2 * 4_988_276_736 + 4 * found["trained_parameters"]
    assert memory["gradients"] == 4 * found["trained_parameters"]
    assert memory["optimizer"] == 8 * found["trained_parameters"]
    assert found["gpu_memory_bytes"] == memory["peak"]
    assert memory["peak"] <= sum(memory.values()) - memory["peak"]
    assert found["checkpoint_bytes"] >= 12 * found["trained_parameters"]
    assert found["steps"] == 8 * 10  # 40 rows: 8 epochs in batches of 4
    assert found["train_tokens"] > 0
    assert found["seconds"] == pytest.approx(sum(found["seconds_by_phase"].values()))
    assert found["fits"]["NVIDIA A100-80GB"] is True
    assert found["allowed_to_proceed"] is True
    assert {w["code"] for w in found["warnings"]} >= {"not_calibrated", "retention_unwatched"}
    assert api.session.scalar(select(func.count()).select_from(Job)) == 0


def test_it_resolves_what_a_submit_resolves(api: Api, base: BaseModel) -> None:
    body = {
        "training_file": api.upload([CHAT] * 40).json()["id"],
        "training": {"type": "full"},
        "method": {"supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}}},
        "retention": {"strategies": [{"type": "l2sp"}]},
    }
    steps = ask(api, **body).json()["steps"]
    made = api.submit(**body)
    job = api.session.scalar(select(Job))
    assert made.status_code == 200
    assert job is not None
    assert steps == job.total_steps == 15


def test_full_training_of_five_billion_parameters_fits_no_gpu_of_80_gb(
    api: Api, base: BaseModel
) -> None:
    found = ask(api, training={"type": "full"}, resources={"num_gpus": 8}).json()
    assert found["fits"]["NVIDIA A100-80GB"] is False
    assert found["fits"]["NVIDIA B200"] is True
    assert "whole_model_on_each_gpu" in {w["code"] for w in found["warnings"]}


def test_each_strategy_has_a_line_of_its_own(api: Api, base: BaseModel) -> None:
    general = api.upload([CHAT] * 50).json()["id"]
    strategies = [
        {"type": "ewc", "fisher_samples": 20},
        {"type": "replay", "strength": 0.25},
        {"type": "distillation", "on": ["replay"]},
    ]
    found = ask(
        api,
        training={"type": "full"},
        retention={"strategies": strategies, "general_data": general},
    ).json()
    ewc, replay, distillation = found["strategies"]
    trained = found["trained_parameters"]
    assert ewc["memory_bytes"] == ewc["checkpoint_bytes"] == 8 * trained
    assert ewc["seconds_once"] > 0  # the Fisher pass
    assert replay["tokens"] == pytest.approx(0.25 * found["train_tokens"], rel=0.02)
    assert 0 < replay["step_share"] < 0.26  # the update is not repeated
    assert distillation["memory_bytes"] == 2 * found["num_parameters"]  # the teacher, in bf16
    assert found["gpu_memory"]["strategies"] == ewc["memory_bytes"] + distillation["memory_bytes"]


def test_watched_benchmarks_are_counted(api: Api, base: BaseModel) -> None:
    version = make_benchmark(api.session, num_items=500)
    make_suite(api.session, base, [version])
    api.session.commit()
    found = ask(api).json()
    assert found["eval_tokens"] > 0
    assert found["seconds_by_phase"]["baseline"] > 0
    without = ask(api, retention=None).json()
    assert without["eval_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "none"}, 404, "model"),
        ({"training_file": "file-0"}, 404, "training_file"),
        ({"training": {"type": "some"}}, 400, "training.type"),
        ({"training": {"max_seq_length": 4096}}, 400, "training.max_seq_length"),
        ({"retention": {"strategies": [{"type": "ewc"}]}}, 400, "retention.strategies.0"),
        ({"retention": {"policy": {"benchmarks": [{"name": "no"}]}}}, 404, None),
        ({"unknown": 1}, 400, "unknown"),
    ],
)
def test_what_a_submit_refuses_is_refused_alike(
    api: Api, base: BaseModel, body: dict[str, Any], status: int, param: str | None
) -> None:
    body = {"training_file": api.upload([CHAT] * 40).json()["id"]} | body
    estimated, submitted = ask(api, **body), api.submit(**body)
    assert estimated.status_code == submitted.status_code
    assert estimated.json()["error"] == submitted.json()["error"]
    if param is not None:
        assert (estimated.status_code, estimated.json()["error"]["param"]) == (status, param)


def test_a_base_whose_layers_are_not_known_is_refused(api: Api, base: BaseModel) -> None:
    base.details = {k: v for k, v in base.details.items() if k != "shape"}
    api.session.commit()
    answer = ask(api)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "model_shape_unknown"
    assert answer.json()["error"]["param"] == "model"


def test_files_of_other_projects_are_not_found(api: Api, base: BaseModel) -> None:
    theirs = make_file(api.session, make_project(api.session, name="rival"))
    api.session.commit()
    answer = ask(api, training_file=f"file-{theirs.id.hex}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "training_file")


def test_it_wants_the_scope_of_a_submit(api: Api, base: BaseModel) -> None:
    reader = api.client_of(api.project, Scope.JOBS_READ)
    assert reader.post(URL, json={}).status_code == 403
    assert URL in api.app.openapi()["paths"]


def test_rows_that_are_longer_take_more(api: Api, base: BaseModel) -> None:
    long = {"messages": [{**m, "content": m["content"] * 400} for m in CHAT["messages"]]}
    short = ask(api).json()
    longer = ask(api, training_file=api.upload([long] * 40).json()["id"]).json()
    assert longer["train_tokens"] > 5 * short["train_tokens"]
    assert longer["gpu_memory"]["activations"] > short["gpu_memory"]["activations"]
    assert longer["seconds_by_phase"]["training"] > short["seconds_by_phase"]["training"]

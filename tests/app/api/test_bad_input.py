"""What a client can get wrong: each is a 4xx that names the field, and leaves nothing behind."""

import json
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select

from app.db.models import BaseModel, BenchmarkVersion, File, Job, JobEvent, OutboxMessage
from app.domain.identifiers import public_id
from tests.app.api.conftest import CHAT, Api
from tests.factories import make_benchmark, make_file, make_project

NO_ANSWER = {"messages": [{"role": "user", "content": "q"}]}
ITEM = {"id": "1", "question": "q", "choices": ["a", "b"], "answer": 0}


def count(api: Api) -> dict[str, int]:
    tables = (File, Job, JobEvent, OutboxMessage, BenchmarkVersion)
    return {
        table.__tablename__: api.session.scalar(select(func.count()).select_from(table)) or 0
        for table in tables
    }


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("body", "purpose", "words"),
    [
        (b'{"messages": [\n', "fine-tune", ["line 1", "not JSON"]),
        (lines(CHAT, NO_ANSWER), "fine-tune", ["line 2", "messages"]),
        (lines(CHAT, {"prompt": "p", "completion": "c"}), "fine-tune", ["line 2", "completion"]),
        (
            lines(CHAT, {"messages": [{"role": "boss", "content": ""}]}),
            "fine-tune",
            ["line 2", "messages.0.role"],
        ),
        (lines({"text": "a", "extra": 1}), "fine-tune", ["line 1", "extra"]),
        (b"", "fine-tune", ["no rows"]),
        (b"\xff\n", "fine-tune", ["line 1", "UTF-8"]),
        (lines(ITEM, ITEM), "evals", ["line 2", "id"]),
        (lines(ITEM | {"answer": 2}), "evals", ["line 1", "answer"]),
        (lines([1]), "evals", ["line 1", "object"]),
    ],
)
def test_a_bad_line_is_named(api: Api, body: bytes, purpose: str, words: list[str]) -> None:
    before = count(api)
    answer = api.upload_bytes(body, purpose)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "file", "invalid_row")
    assert all(word in error["message"] for word in words), error["message"]
    assert count(api) == before
    assert api.stored_files() == []


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"purpose": "assistants"}, "purpose"),
        ({"purpose": "fine-tune-results"}, "purpose"),
        ({"expires_after[seconds]": "60"}, "expires_after.seconds"),
        ({"expires_after[seconds]": "3600", "expires_after[anchor]": "x"}, "expires_after.anchor"),
    ],
)
def test_a_bad_form_field_is_named(api: Api, data: dict[str, str], param: str) -> None:
    answer = api.upload_bytes(lines(CHAT), **({"purpose": "fine-tune"} | data))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert api.stored_files() == []


def test_an_upload_without_a_file_is_refused(api: Api) -> None:
    for answer in (
        api.client.post("/v1/files", files={"other": ("f", b"x")}, data={"purpose": "evals"}),
        api.client.post("/v1/files", data={"purpose": "evals"}),
        api.client.post("/v1/files", json={}),
        api.client.post(
            "/v1/files",
            content=b"--x\r\ntorn",
            headers={"content-type": "multipart/form-data; boundary=x"},
        ),
    ):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


def test_an_upload_over_the_limit_is_413_naming_the_file_and_leaves_nothing(api: Api) -> None:
    for size in (100_001, 400_000):
        answer = api.upload_bytes(b"x" * size)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (413, "file")
        assert "file" in error["message"]
    assert list((api.settings.scratch_root / "uploads").glob("*")) == []
    assert api.stored_files() == []
    assert count(api)["files"] == 0


def retention(**fields: Any) -> dict[str, Any]:
    return {"retention": fields}


def strategies(*entries: dict[str, Any]) -> dict[str, Any]:
    return retention(strategies=list(entries))


BAD_JOBS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nope"}, 404, "model"),
    ({"model": "ft:tiny:acme::0"}, 404, "model"),
    ({"seed": True}, 400, "seed"),
    ({"priority": "1"}, 400, "priority"),
    ({"training": {"lora": {"r": False}}}, 400, "training.lora.r"),
    ({"hyperparameters": {"n_epochs": True}}, 400, "hyperparameters.n_epochs"),
    (
        {"retention": {"strategies": [{"type": "ewc", "strength": True}]}},
        400,
        "retention.strategies.0.strength",
    ),
    ({"training_file": "file-nope"}, 404, "training_file"),
    ({"training_file": "file-" + "0" * 32}, 404, "training_file"),
    ({"validation_file": "file-" + "0" * 32}, 404, "validation_file"),
    (strategies({"type": "magic"}), 400, "retention.strategies.0"),
    (strategies({"strength": 1}), 400, "retention.strategies.0"),
    (strategies({"type": "l2sp", "strength": -1}), 400, "retention.strategies.0.strength"),
    (strategies({"type": "l2sp", "strength": "x"}), 400, "retention.strategies.0.strength"),
    (strategies({"type": "l2sp", "speed": 1}), 400, "retention.strategies.0.speed"),
    (strategies({"type": "l2sp"}, {"type": "l2sp"}), 400, "retention.strategies.1.type"),
    (strategies({"type": "l2sp", "armed": True, "strength": 1}), 400, "retention.strategies.0"),
    (strategies({"type": "ewc"}), 400, "retention.strategies.0"),
    (strategies({"type": "l2sp"}, {"type": "replay"}), 400, "retention.strategies.1"),
    (strategies({"type": "distillation", "on": ["general"]}), 400, "retention.strategies.0"),
    (strategies({"type": "domain_adapters"}) | {"training": {"type": "full"}}, 400, "retention.strategies.0.type"),
    (strategies({"type": "hybrid_optimizer"}) | {"training": {"weight_decay": 0.1}}, 400, "training.weight_decay"),
    (strategies({"type": "hybrid_optimizer", "trust_ratio": "lamb"}), 400, "retention.strategies.0.trust_ratio"),
    (strategies({"type": "domain_adapters"}, {"type": "freeze"}), 400, "retention.strategies.1"),
    (retention(merge_back=1), 400, "retention.merge_back"),
    (retention(privacy="some"), 400, "retention.privacy"),
    ({"preset": "roadmap"}, 400, "preset"),
    ({"preset": "map"}, 400, "preset"),
    ({"stages": [{"name": "a b"}]}, 400, "stages.0.name"),
    ({"stages": [{"type": "teach"}]}, 400, "stages.0"),
    ({"stages": [{"name": "a", "speed": 1}]}, 400, "stages.0.speed"),
    ({"stages": [{"name": "a", "training_file": "file-" + "0" * 32}]}, 404, "stages.0.training_file"),
    ({"stages": [{"name": "a", "strengths": {"ewc": 1}}]}, 400, "stages.0.strengths"),
    ({"stages": [{"name": "a", "trains": "backbone"}]}, 400, "stages.0.trains"),
    ({"stages": [{"name": "a"}, {"type": "student"}]}, 400, "stages.1"),
    ({"resources": {"memory_gb": 0}}, 400, "resources.memory_gb"),
    (retention(general_data="file-" + "0" * 32), 404, "retention.general_data"),
    (retention(policy={"max_drop": 0}), 400, "retention.policy.max_drop"),
    (retention(policy={"eval_interval": "week"}), 400, "retention.policy.eval_interval"),
    (retention(policy={"benchmarks": [{"name": "nope"}]}), 404, "retention.policy.benchmarks.0.name"),
    (retention(policy={"benchmarks": [{"name": "mmlu@9"}]}), 404, "retention.policy.benchmarks.0.name"),
    (retention(policy={"benchmarks": [{"name": "mmlu"}, {"name": "mmlu@1"}]}), 400, "retention.policy.benchmarks.1.name"),
    (retention(policy={"lever": "ewc"}), 400, "retention.policy.lever"),
    (retention(policy={"early_stopping": {"metric": "nope"}}), 400, "retention.policy.early_stopping.metric"),
    (retention(policy={"early_stopping": {"metric": "mmlu"}}), 400, "retention.policy.early_stopping.metric"),
    (retention(policy={"early_stopping": {"metric": ""}}), 400, "retention.policy.early_stopping.metric"),
    (retention(polcy={}), 400, "retention.polcy"),
    ({"trainig": {}}, 400, "trainig"),
    ({"training": {"lora": {"rank": 8}}}, 400, "training.lora.rank"),
    ({"training": {"max_seq_length": 4096}}, 400, "training.max_seq_length"),
    ({"resources": {"num_gpus": -1}}, 400, "resources.num_gpus"),
    ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": "many"}}, 400, "hyperparameters.n_epochs"),
    ({"method": {"type": "dpo"}}, 400, "training_file"),
    ({"method": {"type": "reinforcement"}}, 400, "method.type"),
    ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, 400, "method.type"),
    ({"method": {"reinforcement": {}}}, 400, "method.reinforcement"),
    ({"method": {"type": "ppo"}}, 400, "method.type"),
    ({"method": {"dpo": {}}}, 400, "method.dpo"),
    ({"method": {"type": "dpo", "supervised": {}}}, 400, "method.supervised"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, 400, "method.dpo.hyperparameters.beta"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.1}}}}, 400, "method.dpo.hyperparameters.beta"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "high"}}}}, 400, "method.dpo.hyperparameters.beta"),
    ({"method": {"type": "dpo", "dpo": {"grader": {}}}}, 400, "method.dpo.grader"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}}, 400, "method.supervised.hyperparameters.beta"),
    ({"seed": -1}, 400, "seed"),
    ({"suffix": "a b"}, 400, "suffix"),
    ({"metadata": {"a": 1}}, 400, "metadata.a"),
    ({"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param"), BAD_JOBS, ids=lambda value: str(value)[:60])
def test_a_bad_job_is_refused_by_field(
    api: Api, base: BaseModel, body: dict[str, Any], status: int, param: str
) -> None:
    make_benchmark(api.session, name="mmlu")
    file_id = api.upload([CHAT] * 8).json()["id"]
    before = count(api)
    answer = api.submit(**{"training_file": file_id} | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error["message"]
    assert param.rpartition(".")[2] in error["message"] or param in error["message"]
    assert count(api) == before


def test_a_strategy_without_its_general_data_has_its_own_code(api: Api, base: BaseModel) -> None:
    error = api.submit(**strategies({"type": "replay"})).json()["error"]
    assert error["code"] == "general_data_required"
    assert "retention.general_data" in error["message"]


def test_a_job_without_required_fields_names_them(api: Api, base: BaseModel) -> None:
    answer = api.client.post("/v1/fine_tuning/jobs", json={"model": "tiny"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "training_file")
    assert api.client.post("/v1/fine_tuning/jobs").status_code == 400
    assert api.client.post("/v1/fine_tuning/jobs", json=[]).status_code == 400


def test_a_file_of_another_kind_is_refused(api: Api, base: BaseModel) -> None:
    items = api.upload([ITEM], "evals").json()["id"]
    error = api.submit(training_file=items).json()["error"]
    assert (error["param"], error["code"]) == ("training_file", "invalid_file_purpose")
    rows = api.upload([CHAT]).json()["id"]
    made = api.client.post("/v1/benchmarks", json={"name": "b", "file": rows, "scorer": "nll"})
    assert (made.status_code, made.json()["error"]["param"]) == (400, "file")
    other = api.client.post("/v1/benchmarks", json={"name": "b", "file": items, "scorer": "nll"})
    assert (other.status_code, other.json()["error"]["param"]) == (400, "scorer")
    named = api.client.post(
        "/v1/benchmarks", json={"name": "a@1", "file": items, "scorer": "multiple_choice"}
    )
    assert (named.status_code, named.json()["error"]["param"]) == (400, "name")


def test_a_key_of_another_project_sees_none_of_it(api: Api, base: BaseModel) -> None:
    job = api.submit().json()
    rival = api.client_of(make_project(api.session))
    assert rival.get(f"/v1/fine_tuning/jobs/{job['id']}").status_code == 404
    answer = rival.post(
        "/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": job["training_file"]}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "training_file")


def test_retention_cannot_be_left_out_where_the_project_requires_it(
    api: Api, base: BaseModel
) -> None:
    api.project.retention_mandatory = True
    api.session.commit()
    error = api.submit(retention=None).json()["error"]
    assert (error["param"], error["code"]) == ("retention", "retention_mandatory")


def test_a_full_queue_is_429_and_not_worth_sending_again(api: Api, base: BaseModel) -> None:
    settings = api.settings.model_copy(update={"max_queued_jobs": 1})
    api.app.state.resources = replace(api.app.state.resources, settings=settings)
    assert api.submit().status_code == 200
    answer = api.submit()
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert answer.headers["x-should-retry"] == "false"


def test_an_unreadable_file_row_is_refused(api: Api, base: BaseModel) -> None:
    broken = make_file(api.session, api.project, status="error", status_details="line 3")
    api.session.commit()
    error = api.submit(training_file=public_id("file", broken.id)).json()["error"]
    assert (error["param"], error["code"]) == ("training_file", "invalid_file")


@pytest.mark.parametrize("name", ["данные.jsonl", "数据.jsonl", "\u202ef.jsonl", "naïve.jsonl"])
def test_a_file_may_have_any_name(api: Api, name: str) -> None:
    answer = api.client.post(
        "/v1/files", files={"file": (name, lines(CHAT))}, data={"purpose": "fine-tune"}
    )
    assert (answer.status_code, answer.json().get("filename")) == (200, name), answer.text


def test_a_body_of_many_unknown_fields_is_refused_at_once(api: Api) -> None:
    for count, code in ((1_001, "invalid_json"), (900, "invalid_request")):
        body = {str(number): 1 for number in range(count)}
        answer = api.client.post("/v1/benchmarks", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_a_refused_method_names_those_of_every_route_at_its_path(api: Api) -> None:
    answer = api.client.patch("/v1/files")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")

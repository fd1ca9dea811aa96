"""Jobs of `method` `dpo` over HTTP: what is taken, what the job shows, and what is refused."""

from typing import Any

import pytest

from app.db.models import BaseModel
from tests.app.api.conftest import CHAT, Api
from tests.app.domain.test_preferences import dpo, pair
from tests.shapes import llama_shape

pytestmark = pytest.mark.usefixtures("base")


def upload(api: Api, count: int = 20) -> str:
    answer = api.upload([pair(f"good {n}", f"bad {n}") for n in range(count)])
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.mark.parametrize(
    ("asked", "shown"), [({"beta": 0.3}, 0.3), ({}, 0.1), ({"beta": "auto"}, 0.1)]
)
def test_a_job_shows_its_method_with_resolved_numbers(
    api: Api, asked: dict[str, Any], shown: float
) -> None:
    answer = api.submit(training_file=upload(api), method=dpo(n_epochs=2, **asked))
    assert answer.status_code == 200, answer.text
    job = answer.json()
    numbers = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert job["method"] == {"type": "dpo", "dpo": {"hyperparameters": numbers | {"beta": shown}}}
    assert job["hyperparameters"] == numbers
    assert (job["training"]["beta"], job["training"]["learning_rate"]) == (
        shown,
        pytest.approx(2e-5),
    )
    assert job["progress"]["total_steps"] == 10
    (told,) = job["data_checks"]["files"]
    assert told["num_rows"] == 20


def test_a_supervised_job_shows_no_beta(api: Api) -> None:
    job = api.submit().json()
    assert set(job["method"]) == {"type", "supervised"}
    assert set(job["method"]["supervised"]["hyperparameters"]) == {
        "n_epochs",
        "batch_size",
        "learning_rate_multiplier",
    }


@pytest.mark.parametrize("is_dpo", [True, False], ids=["dpo", "supervised"])
def test_the_other_methods_file_is_a_clear_refusal(api: Api, base: BaseModel, is_dpo: bool) -> None:
    chat = api.upload([CHAT] * 8).json()["id"]
    pairs = upload(api)
    method = dpo() if is_dpo else None
    right, wrong = (pairs, chat) if is_dpo else (chat, pairs)
    for fields in ({"training_file": wrong}, {"training_file": right, "validation_file": wrong}):
        answer = api.submit(method=method, **fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "wrong_row_format"), error
        assert error["param"] == list(fields)[-1]
        assert ("'supervised'" if is_dpo else "'dpo'") in error["message"]
    if is_dpo:
        general = {"strategies": [{"type": "replay"}], "general_data": pairs}
        error = api.submit(method=method, training_file=pairs, retention=general).json()["error"]
        assert (error["param"], error["code"]) == ("retention.general_data", "wrong_row_format")


def test_what_is_not_offered_says_what_is(api: Api) -> None:
    error = api.submit(method={"type": "reinforcement"}).json()["error"]
    assert "'supervised'" in error["message"]
    assert "'dpo'" in error["message"]
    causal = {"strategies": [{"type": "causal"}]}
    answer = api.submit(training_file=upload(api), method=dpo(), retention=causal)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "retention.strategies.0")
    assert "cross-entropies" in error["message"]


def test_a_bad_pair_is_refused_at_upload_with_its_line(api: Api) -> None:
    answer = api.upload([pair(), pair(preferred_output=[{"role": "user", "content": "x"}])])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_row", "file")
    assert error["message"].startswith("file line 2: preferred_output: 0: must be of an assistant")


def test_an_estimate_knows_both_answers_and_the_reference(api: Api, base: BaseModel) -> None:
    base.details = base.details | {"shape": llama_shape().model_dump(mode="json")}
    api.session.commit()
    rows = [pair(f"good answer {n}", f"bad answer {n}") for n in range(40)]
    shown = [{"messages": [*row["input"]["messages"], *row["preferred_output"]]} for row in rows]
    found = {}
    for name, content, method in (("dpo", rows, dpo(n_epochs=2)), ("supervised", shown, None)):
        body = {"model": "tiny", "training_file": api.upload(content).json()["id"]}
        numbers = {} if method is None else {"method": method}
        answer = api.client.post("/v1/fine_tuning/estimates", json=body | numbers)
        assert answer.status_code == 200, answer.text
        found[name] = answer.json()
    per_epoch = {"dpo": 2, "supervised": 8}  # the latter by `auto`
    tokens = {name: found[name]["train_tokens"] / n for name, n in per_epoch.items()}
    assert tokens["dpo"] == pytest.approx(2 * tokens["supervised"], rel=0.05)
    assert found["dpo"]["steps"] == 20
    assert found["dpo"]["seconds_by_phase"]["reference"] > 0
    assert "reference" not in found["supervised"]["seconds_by_phase"]

"""A job shows what was found in its data."""

from typing import Any

import pytest

from app.db.models import BaseModel
from tests.app.api.conftest import CHAT, Api
from tests.factories import make_project

pytestmark = pytest.mark.usefixtures("base")


def chat(question: str, answer: str = "an answer") -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def upload(api: Api, *rows: dict[str, Any]) -> str:
    answer = api.upload(list(rows))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def checks(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["data_checks"])


def test_counts_lengths_and_findings_stand_on_the_job(api: Api, base: BaseModel) -> None:
    rows = [*(chat(f"question {n}") for n in range(20)), chat("question 3"), chat("x", " ")]
    file = upload(api, *rows, chat("long " * 2000))
    job = api.submit(training_file=file)
    found = checks(job)
    (told,) = found["files"]
    assert (told["param"], told["file"], told["num_rows"]) == ("training_file", file, 23)
    assert told["max_seq_length"] <= base.details["context_length"]
    assert (told["rows_over_length"], told["bytes_per_token"]) == (1, 1.0)
    assert told["estimated_tokens"] > 10_000
    assert sum(bucket["num_rows"] for bucket in told["lengths"]) == 23
    assert {each["code"]: each["lines"] for each in found["findings"]} == {
        "duplicate_rows": [21],
        "empty_answers": [22],
        "rows_over_length": [23],
    }
    assert api.client.get(f"/v1/fine_tuning/jobs/{job.json()['id']}").json()["data_checks"] == found


def test_validation_rows_that_are_trained_on_are_found(api: Api) -> None:
    training = upload(api, *(chat(f"question {n}") for n in range(20)))
    validation = upload(api, chat("new"), chat("Question 4"), chat("question 5", "another"))
    found = checks(api.submit(training_file=training, validation_file=validation))
    told = {each["code"]: (each["param"], each["lines"]) for each in found["findings"]}
    assert told == {
        "validation_in_training": ("validation_file", [2]),
        "validation_questions_in_training": ("validation_file", [3]),
    }
    assert [each["param"] for each in found["files"]] == ["training_file", "validation_file"]
    same = checks(api.submit(training_file=training, validation_file=training))
    assert same["findings"][0]["count"] == 20


def test_files_of_stages_and_dropped_rows_are_told(api: Api) -> None:
    good = {"instruction": "i", "output": "o"}
    staged = upload(api, good, good | {"output": ""}, good | {"input": "m"})
    first = upload(api, CHAT)
    stages = [{"name": "one", "training_file": staged}, {"name": "two"}]
    found = checks(api.submit(training_file=first, stages=stages))
    assert {each["param"] for each in found["files"]} == {
        "training_file",
        "stages.0.training_file",
    }
    (dropped,) = found["findings"]
    assert (dropped["code"], dropped["param"]) == ("rows_dropped", "stages.0.training_file")
    assert (dropped["count"], dropped["lines"]) == (1, [2])


def test_clean_data_has_no_findings(api: Api) -> None:
    found = checks(api.submit(training_file=upload(api, chat("a"), chat("b"))))
    assert found["findings"] == []


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([chat("q", "")], "nothing to learn"),
        ([CHAT, {"messages": []}], "line 2"),
        ([CHAT, {"text": "t"}], "line 2"),
    ],
)
def test_what_cannot_be_trained_on_never_becomes_a_file(
    api: Api, rows: list[dict[str, Any]], word: str
) -> None:
    refused = api.upload(rows)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_row")
    assert word in refused.json()["error"]["message"]


def test_files_of_another_project_are_never_compared(api: Api) -> None:
    own = upload(api, chat("a"))
    api.client = api.client_of(make_project(api.session))
    foreign = upload(api, chat("a"))
    refused = api.submit(training_file=own, validation_file=foreign)
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "training_file")

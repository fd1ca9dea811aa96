"""Training files that repeat a benchmark are told at submit, with counts and line numbers."""

from typing import Any

import pytest

from app.db.models import BaseModel
from app.domain.spec import CreateJob
from app.services.contamination import MAX_LISTED_LINES, find_contamination
from app.services.watched import require_benchmark
from tests.app.api.conftest import CHAT, Api
from tests.factories import make_project

LONG = " ".join(f"word{place}" for place in range(30))
ITEMS = [
    {"id": "a", "question": "Where is the tower?", "choices": ["Paris", "Rome"], "answer": 0},
    {"id": "b", "question": LONG, "choices": ["x", "y"], "answer": 1},
]


def chat(question: str, answer: str = "an answer") -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def upload(api: Api, rows: list[Any], purpose: str = "fine-tune") -> str:
    answer = api.upload(rows, purpose)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.fixture
def exam(api: Api, base: BaseModel) -> str:
    body = {"name": "exam", "file": upload(api, ITEMS, "evals"), "scorer": "multiple_choice"}
    assert api.client.post("/v1/benchmarks", json=body).status_code == 200
    return "exam"


def overlaps(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return [each for each in answer.json()["warnings"] if each["code"] == "overlaps_benchmark"]


WATCH = {"retention": {"strategies": [], "policy": {"benchmarks": [{"name": "exam"}]}}}


def test_rows_that_repeat_an_item_are_told_with_their_lines(api: Api, exam: str) -> None:
    part = " ".join(LONG.split()[4:17])
    rows = [
        CHAT,
        chat("WHERE is the tower"),
        CHAT,
        chat(f"so {part} then"),
        chat(part[: len(part) - 7]),
    ]
    (found,) = overlaps(api.submit(training_file=upload(api, rows), **WATCH))
    assert (found["param"], found["benchmark"]) == ("training_file", "exam@1")
    assert (found["count"], found["lines"]) == (2, [2, 4])
    assert (found["rows_checked"], found["is_whole"]) == (5, True)
    assert "2 rows share text with items of exam@1" in found["message"]
    assert "lines 2, 4." in found["message"]


def test_every_file_of_the_job_is_compared(api: Api, exam: str) -> None:
    clean, bad = upload(api, [CHAT] * 4), upload(api, [chat("Where is the tower?")] * 30)
    body: dict[str, Any] = {"training_file": clean, "validation_file": bad} | WATCH
    stages = [{"name": "one", "training_file": bad}, {"name": "two"}]
    found = overlaps(api.submit(stages=stages, **body))
    assert {each["param"] for each in found} == {"validation_file", "stages.0.training_file"}
    assert all(each["count"] == 30 and len(each["lines"]) == MAX_LISTED_LINES for each in found)
    assert "and 10 more" in found[0]["message"]


def test_it_is_an_event_of_the_job_too(api: Api, exam: str) -> None:
    job = api.submit(training_file=upload(api, [chat("where is the tower")]), **WATCH).json()
    events = api.client.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
    assert any(each["level"] == "warn" and "exam@1" in each["message"] for each in events)


def test_what_is_not_watched_is_not_compared(api: Api, exam: str) -> None:
    bad = upload(api, [chat("Where is the tower?")])
    assert overlaps(api.submit(training_file=bad)) == []
    assert overlaps(api.submit(training_file=bad, retention=None)) == []
    require_benchmark(api.session, api.project.id, "exam")
    api.session.commit()
    answer = api.submit(training_file=bad, retention=None)
    assert len(overlaps(answer)) == 1
    shown = answer.json()["retention"]
    assert shown["strategies"] == []
    assert [each["name"] for each in shown["policy"]["benchmarks"]] == ["exam@1"]


def test_a_big_file_is_compared_up_to_the_cap_and_that_is_said(api: Api, exam: str) -> None:
    rows = [chat("Where is the tower?")] * 50
    body = CreateJob.model_validate({"model": "tiny", "training_file": upload(api, rows)} | WATCH)
    resources = api.app.state.resources
    (found,) = find_contamination(
        resources.session_factory, api.storage, api.project.id, body, max_bytes=1000
    )
    assert 1 <= found["count"] == found["rows_checked"] < 50
    assert not found["is_whole"]
    assert f"Only the first {found['rows_checked']} rows were compared." in found["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"training_file": "file-" + "0" * 32}, "training_file"),
        ({"model": "nope"}, "model"),
        (
            {"retention": {"policy": {"benchmarks": [{"name": "nope"}]}}},
            "retention.policy.benchmarks.0.name",
        ),
        (
            {"retention": {"policy": {"benchmarks": [{"name": "exam", "min_gain": 0.1}]}}},
            "retention.policy.benchmarks.0",
        ),
        (
            {"retention": {"policy": {"benchmarks": [{"name": "exam", "expect": "fall"}]}}},
            "retention.policy.benchmarks.0.expect",
        ),
        ({"retention": {"policy": {"on_no_gain": "x"}}}, "retention.policy.on_no_gain"),
    ],
)
def test_a_bad_request_is_still_named_by_its_field(
    api: Api, exam: str, body: dict[str, Any], param: str
) -> None:
    answer = api.submit(**body)
    assert answer.status_code in {400, 404}
    assert answer.json()["error"]["param"] == param


def test_rows_of_another_project_are_never_read(api: Api, exam: str) -> None:
    theirs = upload(api, [chat("Where is the tower?")])
    other = api.client_of(make_project(api.session))
    answer = other.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": theirs})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "training_file")

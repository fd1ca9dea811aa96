"""Results over HTTP: points, the newest of each benchmark, short answers, and what each refuses."""

from typing import Any

import pytest

from app.domain.identifiers import public_id
from app.domain.scopes import Scope
from tests.app.api.conftest import Api
from tests.factories import make_job, make_project

PATH = "/v1/benchmark_results"


@pytest.fixture
def subject(api: Api) -> dict[str, str]:
    """A job of the project that has not started."""
    job = make_job(api.session, api.project)
    api.session.commit()
    return {"type": "fine_tuning.job", "id": public_id("job", job.id)}


def post(api: Api, subject: dict[str, str], *results: dict[str, Any], **headers: str) -> Any:
    body = {"results": [{"subject": subject, "benchmark": "b", "value": 0.5} | r for r in results]}
    return api.client.post(PATH, json=body, headers=headers)


def test_points_are_columns_in_pages_of_their_own_size(api: Api, subject: dict[str, str]) -> None:
    when = "2026-01-01T00:00:00.9Z"
    posted = [{"step": n, "value": n / 8, "measured_at": when} for n in range(250)]
    assert post(api, subject, *posted).status_code == 200
    query = {"subject_id": subject["id"], "benchmark": "b", "format": "points", "order": "asc"}
    first = api.client.get(PATH, params=query | {"limit": 200}).json()
    assert (first["object"], first["has_more"]) == ("benchmark_result.points", True)
    assert first["steps"] == list(range(200))
    assert first["values"] == [n / 8 for n in range(200)]
    assert set(first["measured_at"]) == {1_767_225_600}
    rest = api.client.get(PATH, params=query | {"after": first["last_id"]}).json()
    assert (rest["steps"], rest["has_more"]) == (list(range(200, 220)), True)
    whole = api.client.get(PATH, params=query | {"limit": 10_000}).json()
    assert (len(whole["steps"]), whole["has_more"]) == (250, False)
    assert whole["first_id"] == first["first_id"]
    shortcut = f"/v1/fine_tuning/jobs/{subject['id']}/benchmark_results"
    assert api.client.get(shortcut, params=query | {"limit": 250}).json() == whole
    none = api.client.get(PATH, params=query | {"benchmark": "none"}).json()
    assert none == {
        "object": "benchmark_result.points",
        "steps": [],
        "values": [],
        "measured_at": [],
        "has_more": False,
        "first_id": None,
        "last_id": None,
    }


def test_latest_gives_the_newest_result_of_each_benchmark(
    api: Api, subject: dict[str, str]
) -> None:
    post(api, subject, *({"benchmark": name, "step": n} for n in range(3) for name in "cab"))
    query = {"subject_id": subject["id"], "latest": "true"}
    found = api.client.get(PATH, params=query | {"limit": 2}).json()
    assert [(r["benchmark"], r["step"]) for r in found["data"]] == [("b", 2), ("a", 2)]
    assert found["has_more"]
    rest = api.client.get(PATH, params=query | {"after": found["last_id"]}).json()
    assert [(r["benchmark"], r["step"]) for r in rest["data"]] == [("c", 2)]
    assert not rest["has_more"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "101"}, "limit"),
        ({"limit": "10001", "format": "points", "benchmark": "b"}, "limit"),
        ({"limit": "0"}, "limit"),
        ({"format": "points"}, "benchmark"),
        ({"format": "curve"}, "format"),
        ({"format": "points", "benchmark": "b", "latest": "true"}, "latest"),
        ({"latest": "true"}, "subject_id"),
        ({"latest": "perhaps"}, "latest"),
        ({"format": "points", "benchmark": "b", "include": "items"}, "include"),
    ],
)
def test_a_bad_query_names_the_parameter(api: Api, query: dict[str, str], param: str) -> None:
    answer = api.client.get(PATH, params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_other_projects_see_neither_points_nor_the_latest(
    api: Api, subject: dict[str, str]
) -> None:
    posted = post(api, subject, {"step": 1}).json()["data"][0]["results"][0]["id"]
    rival = api.client_of(make_project(api.session, name="rival"), Scope.RESULTS_READ)
    points = {"format": "points", "benchmark": "b"}
    assert rival.get(PATH, params=points).json()["steps"] == []
    for query in (
        points | {"after": posted},
        points | {"subject_id": subject["id"]},
        {"latest": "true", "subject_id": subject["id"]},
    ):
        assert rival.get(PATH, params=query).status_code == 404, query


def test_a_thousand_results_are_one_request_and_the_answer_may_be_short(
    api: Api, subject: dict[str, str]
) -> None:
    many = [{"benchmark": f"b{n}", "step": n % 20} for n in range(1000)]
    full = post(api, subject, *many)
    assert full.status_code == 200, full.text
    shown = [result for look in full.json()["data"] for result in look["results"]]
    assert (full.json()["n_results"], len(shown)) == (1000, 1000)
    assert "preference-applied" not in full.headers
    for prefer in ("return=minimal", "respond-async, Return=Minimal; x=1"):
        short = post(api, subject, *many, prefer=prefer)
        assert short.json() == {"object": "list", "data": [], "n_results": 1000}
        assert short.headers["preference-applied"] == "return=minimal"
    query = {"subject_id": subject["id"], "benchmark": "b7"}
    assert len(api.client.get(PATH, params=query).json()["data"]) == 3
    over = post(api, subject, *many, {"step": 1})
    assert (over.status_code, over.json()["error"]["param"]) == (400, "results")


def test_a_repeated_batch_with_its_key_is_recorded_once(api: Api, subject: dict[str, str]) -> None:
    headers = {"idempotency-key": "k", "prefer": "return=minimal"}
    first, second = (post(api, subject, {"step": 1}, {"step": 2}, **headers) for _ in range(2))
    assert first.json() == second.json()
    assert second.headers["idempotent-replayed"] == "true"
    found = api.client.get(PATH, params={"subject_id": subject["id"]}).json()["data"]
    assert [result["step"] for result in found] == [2, 1]


def test_a_text_that_the_database_cannot_hold_is_refused(api: Api, subject: dict[str, str]) -> None:
    for field in ("benchmark", "metric"):
        answer = post(api, subject, {field: "a\x00b"})
        assert answer.status_code == 400, answer.text
    huge = post(api, subject, {"step": 2**63})
    assert huge.status_code == 400, huge.text

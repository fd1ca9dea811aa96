"""Benchmarks over HTTP: scorers, drawn parts, sources, subjects; and what is refused."""

import json
from importlib.util import find_spec
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from sqlalchemy import func, select

from app.db.models import BenchmarkVersion, Evaluation, File
from app.domain.benchmarks import Scorer
from app.services.evaluations import fill_scores
from tests.app.api.conftest import Api
from tests.factories import make_job

ITEMS = [
    {"id": f"q{place}", "question": f"q {place}", "answer": "a b", "subject": subject}
    for place, subject in enumerate(["law"] * 12 + ["art"] * 6 + ["maths"] * 2)
]


def make(api: Api, file: str, **more: Any) -> Any:
    body = {"name": "exam", "file": file, "scorer": "token_f1"} | more
    return api.client.post("/v1/benchmarks", json=body)


def upload(api: Api, items: list[Any] = ITEMS) -> str:
    answer = api.upload(items, "evals")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.mark.parametrize("scorer", ["exact_match", "normalised_match", "token_f1"])
def test_a_file_of_questions_serves_every_scorer_of_generation(api: Api, scorer: str) -> None:
    answer = make(api, upload(api), scorer=scorer, source="lm_eval:exam@1")
    assert answer.status_code == 200
    found = answer.json()
    assert (found["scorer"], found["num_items"], found["chance"]) == (scorer, 20, 0.0)
    assert (found["source"], found["subset"]) == ("lm_eval:exam@1", None)
    assert found["subjects"] == {"art": 6, "law": 12, "maths": 2}
    assert api.client.get("/v1/benchmarks/exam").json() == found
    listed = api.client.get("/v1/benchmarks/exam/versions").json()["data"]
    assert listed[0]["subjects"] == found["subjects"]


@pytest.mark.parametrize(("scorer", "module"), [("bleu4", "sacrebleu"), ("rouge_l", "rouge_score")])
def test_a_scorer_whose_library_is_missing_is_refused(api: Api, scorer: str, module: str) -> None:
    answer = make(api, upload(api), scorer=scorer)
    if find_spec(module) is not None:
        assert answer.json()["scorer"] == scorer
        return
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"]) == ("scorer", "scorer_not_available")


def test_a_part_is_drawn_by_seed_in_proportion_and_is_a_file_of_its_own(api: Api) -> None:
    file = upload(api)
    one, again, other = (make(api, file, limit=10, seed=seed).json() for seed in (5, 5, 6))
    assert [each["version"] for each in (one, again, other)] == [1, 2, 3]
    assert one["items_sha256"] == again["items_sha256"] != other["items_sha256"]
    assert one["subjects"] == {"art": 3, "law": 6, "maths": 1}
    assert (one["num_items"], one["subset"]["limit"], one["subset"]["seed"]) == (10, 10, 5)
    whole = api.client.get(f"/v1/files/{file}").json()
    assert one["subset"] | {"of_items": 20, "of_sha256": whole["sha256"]} == one["subset"]
    lines = api.client.get(f"/v1/files/{one['file']}/content").text.splitlines()
    assert [json.loads(line) for line in lines] == [
        item for item in ITEMS if item in [json.loads(line) for line in lines]
    ]
    assert len(lines) == 10


def test_a_draw_that_is_repeated_by_its_idempotency_key_leaves_no_second_file(api: Api) -> None:
    file = upload(api)
    body = {"name": "exam", "file": file, "scorer": "token_f1", "limit": 4}
    answers = [
        api.client.post("/v1/benchmarks", json=body, headers={"idempotency-key": "k"})
        for _ in range(2)
    ]
    assert answers[0].json() == answers[1].json()
    assert len(api.stored_files()) == 2  # the upload and one part


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"limit": 21}, "limit"),
        ({"limit": 1}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"seed": 3}, "seed"),
        ({"limit": 4, "seed": -1}, "seed"),
        ({"scorer": "multiple_choice"}, "scorer"),
        ({"scorer": "nll", "limit": 4}, "scorer"),
        ({"scorer": "accuracy"}, "scorer"),
        ({"source": ""}, "source"),
        ({"source": "x" * 1025}, "source"),
        ({"file": "file-" + "0" * 32, "limit": 4}, "file"),
    ],
)
def test_what_cannot_be_made_names_its_field_and_leaves_nothing(
    api: Api, more: dict[str, Any], param: str
) -> None:
    file = upload(api)
    files = api.session.scalar(select(func.count()).select_from(File))
    answer = make(api, **({"file": file} | more))
    assert answer.status_code in {400, 404}
    assert answer.json()["error"]["param"] == param
    assert len(api.stored_files()) == 1
    assert api.session.scalar(select(func.count()).select_from(File)) == files
    assert api.session.scalar(select(func.count()).select_from(BenchmarkVersion)) == 0


def test_items_without_ids_get_stable_ones_and_equal_items_are_refused(api: Api) -> None:
    items = [{key: value for key, value in item.items() if key != "id"} for item in ITEMS]
    first, second = (
        make(api, upload(api, each)).json()
        for each in (items, [dict(reversed(i.items())) for i in items])
    )
    reports = [
        api.client.get(f"/v1/files/{each['file']}").json()["report"] for each in (first, second)
    ]
    assert reports[0]["ids_sha256"] == reports[1]["ids_sha256"]
    answer = api.upload([items[0], items[1], items[0]], "evals")
    assert answer.status_code == 400
    assert "line 3" in answer.json()["error"]["message"]


def test_results_are_broken_down_by_subject(api: Api) -> None:
    made = make(api, upload(api)).json()
    job = make_job(api.session, api.project)
    version = api.session.get_one(BenchmarkVersion, UUID(made["version_id"].rpartition("_")[2]))
    row = Evaluation(
        project_id=api.project.id,
        subject_type="fine_tuning.job",
        subject_key=str(job.id),
        job_id=job.id,
        benchmark_version_id=version.id,
        benchmark="exam",
        metric=Scorer.TOKEN_F1.value,
        purpose="gate",
        source="run",
        branch=0,
        step=1,
    )
    scores = np.asarray([0.5] * 6 + [1.0] * 6 + [0.25] * 6 + [np.nan] * 2, np.float32)
    fill_scores(row, scores, None)
    api.session.add(row)
    api.session.commit()
    url = f"/v1/fine_tuning/jobs/ftjob-{job.id.hex}/benchmark_results"
    plain = api.client.get(url).json()["data"][0]
    assert plain["subjects"] is None
    found = api.client.get(url, params={"include": "subjects"}).json()["data"][0]
    assert found["subjects"] == [
        {"subject": "art", "n_items": 6, "value": 0.25},
        {"subject": "law", "n_items": 12, "value": 0.75},
    ]
    both = api.client.get(url, params={"include[]": ["subjects", "items"]}).json()["data"][0]
    assert len(both["items"]) == 18
    assert both["subjects"] == found["subjects"]
    assert api.client.get(url, params={"include": "x"}).json()["error"]["param"] == "include"

"""Results that nothing watches: written in one statement, and otherwise as all others are."""

import json
from typing import Any

import pytest
from sqlalchemy import event, select

from app.db.models import Evaluation
from app.domain.identifiers import public_id
from app.domain.results import PostedResults
from app.domain.scopes import Caller, Scope
from app.errors import NotFound
from app.services import results
from app.services.posting import post_results
from app.services.storage import Storage
from tests.factories import make_job, make_model_version, make_project
from tests.histories import start_job

FIELDS = [
    column.key for column in Evaluation.__table__.columns if column.key not in {"id", "created_at"}
]


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def call(project_id) -> Caller:
    scopes = frozenset({Scope.RESULTS_WRITE, Scope.RESULTS_ACT})
    return Caller(project_id=project_id, key_id="k", scopes=scopes)


def post(session, storage, project_id, posted):
    body = PostedResults.model_validate_json(json.dumps({"results": posted}))
    return post_results(session, storage, call(project_id), body)


def of_job(job) -> dict[str, str]:
    return {"type": "fine_tuning.job", "id": public_id("job", job.id)}


def of_model(version) -> dict[str, str]:
    return {"type": "model", "id": version.name}


def various(*subjects) -> list[dict[str, object]]:
    """Every optional field, given and left out."""
    when = "2026-01-02T03:04:05+02:00"
    found = []
    for place, subject in enumerate(subjects):
        one = {"subject": subject, "benchmark": f"b{place}", "measured_at": when}
        found += [
            one | {"value": 0.25, "step": 7, "n_samples": 40, "stderr": 0.125},
            one | {"value": -3.5, "metric": "m", "benchmark": "b@2", "source": "s"},
            one | {"items": [{"id": "1", "score": 1.0}, {"id": "2", "score": 0.0}], "step": 7},
        ]
    return found


def described(session, looks) -> list[list[dict[str, Any]]]:
    """The rows as the database has them, in the order of the answer; all but what is drawn."""
    found = []
    for look in looks:
        ids = [row.id for row in look.evaluations]
        rows = {row.id: row for row in session.scalars(select(Evaluation))}
        found.append([{name: getattr(rows[key], name) for name in FIELDS} for key in ids])
    return found


def test_rows_and_looks_are_those_of_the_long_way(session, storage, monkeypatch) -> None:
    project = make_project(session)
    waiting = make_job(session, project)
    started, _ = start_job(session)
    started.project_id = project.id
    version = make_model_version(session, started)
    posted = various(of_job(waiting), of_job(started), of_model(version))
    short = post(session, storage, project.id, posted)
    monkeypatch.setattr(results, "record_unwatched", lambda *_: {})
    long = post(session, storage, project.id, posted)
    session.expire_all()
    assert [type(row).__name__ for look in short for row in look.evaluations] == ["PlainRow"] * 9
    assert [type(row).__name__ for look in long for row in look.evaluations] == ["Evaluation"] * 9
    first, second = described(session, short), described(session, long)
    seqs, later = ([row.pop("seq") for look in looks for row in look] for looks in (first, second))
    assert seqs == sorted(seqs)
    assert later[0] > seqs[-1]
    assert first == second
    for look in short:
        for shown in look.evaluations:
            kept = session.get_one(Evaluation, shown.id)
            for name in ("subject_type", "subject_key", "branch", "measured_at", "created_at"):
                assert getattr(shown, name) == getattr(kept, name), name


def test_a_look_with_one_watched_result_goes_the_long_way_whole(session, storage) -> None:
    job, _ = start_job(session)
    subject = of_job(job)
    one = {"subject": subject, "benchmark": "mine", "value": 0.5, "step": 3}
    watched = one | {"benchmark": "multiple_choice", "n_samples": 2000, "value": 0.59}
    for name in ("multiple_choice", "multiple_choice@1", "multiple_choice@9"):
        (look,) = post(session, storage, job.project_id, [one, watched | {"benchmark": name}])
        assert [type(row) for row in look.evaluations] == [Evaluation, Evaluation], name
        assert (look.reading is None) == (name == "multiple_choice@9")
    looks = post(session, storage, job.project_id, [watched | {"step": 4}, one])
    assert [look.is_plain for look in looks] == [False, True]


def test_a_thousand_results_take_as_many_statements_as_two(session, storage) -> None:
    project = make_project(session)
    version = make_model_version(session, make_job(session, project))

    def statements(count: int) -> int:
        posted = [
            {"subject": of_model(version), "benchmark": f"b{n}", "value": 0.5, "step": n % 9}
            for n in range(count)
        ]
        seen: list[str] = []

        def note(_connection, _cursor, statement, *_rest) -> None:
            seen.append(statement)

        engine = session.get_bind()
        event.listen(engine, "before_cursor_execute", note)
        try:
            looks = post(session, storage, project.id, posted)
        finally:
            event.remove(engine, "before_cursor_execute", note)
        assert sum(len(look.evaluations) for look in looks) == count
        return len(seen)

    assert statements(1000) == statements(2) < 10


def test_who_is_unknown_is_refused_and_nothing_of_the_batch_stays(session, storage) -> None:
    project = make_project(session)
    mine, foreign = make_job(session, project), make_job(session)
    one = {"benchmark": "b", "value": 0.5}
    subjects = [
        of_job(foreign),
        of_model(make_model_version(session, foreign)),
        {"type": "fine_tuning.job", "id": "nonsense"},
        {"type": "model", "id": "nobody"},
    ]
    for subject in subjects:
        posted = [one | {"subject": of_job(mine)}, one | {"subject": subject}]
        with pytest.raises(NotFound) as refused, session.begin_nested():
            post(session, storage, project.id, posted)
        assert refused.value.param == "subject.id"
        assert session.scalars(select(Evaluation)).all() == []

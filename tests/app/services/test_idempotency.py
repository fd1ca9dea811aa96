"""The second request with a key gets the first one's answer, also when both come at once."""

import threading
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.db.session import SessionFactory, transaction
from app.errors import BadRequest, UnprocessableKey
from app.services.idempotency import (
    KEPT,
    LONGEST,
    Attempt,
    RequestRunning,
    find_answer,
    hash_body,
    parse_key,
    run_once,
)
from tests.factories import make_project


@pytest.fixture
def project_id(committed_factory: SessionFactory) -> UUID:
    with transaction(committed_factory) as session:
        return make_project(session).id


def attempt(project_id: UUID, *, body: Any = None, route: str = "POST /x") -> Attempt:
    return Attempt(project_id, "key", route, hash_body(body))


def age(factory: SessionFactory, by: timedelta) -> None:
    with transaction(factory) as session:
        session.execute(
            text("UPDATE idempotency_keys SET created_at = created_at - :by"), {"by": by}
        )


def test_the_first_answer_is_given_again(
    committed_factory: SessionFactory, project_id: UUID
) -> None:
    first = run_once(
        committed_factory, attempt(project_id), lambda _: {"n": 1, "secret": "s"}, hidden="secret"
    )
    again = run_once(committed_factory, attempt(project_id), lambda _: {"n": 2})
    assert (first.body, first.is_replay) == ({"n": 1, "secret": "s"}, False)
    assert (again.body, again.is_replay) == ({"n": 1}, True)
    for ask in (run_once, lambda *given: find_answer(*given[:2])):
        with pytest.raises(UnprocessableKey):
            ask(committed_factory, attempt(project_id, body={"a": 1}), lambda _: {"n": 3})
    found = find_answer(committed_factory, attempt(project_id))
    assert found is not None
    assert (found.body, found.is_replay) == ({"n": 1}, True)
    age(committed_factory, KEPT)
    assert run_once(committed_factory, attempt(project_id), lambda _: {"n": 4}).body == {"n": 4}


def test_a_key_means_something_within_its_project_and_route_alone(
    committed_factory: SessionFactory, project_id: UUID
) -> None:
    with transaction(committed_factory) as session:
        other = make_project(session).id
    first = run_once(committed_factory, attempt(project_id), lambda _: {"n": 1}, status_code=201)
    for elsewhere in (attempt(project_id, route="POST /y"), attempt(other)):
        assert find_answer(committed_factory, elsewhere) is None
        assert run_once(committed_factory, elsewhere, lambda _: {"n": 2}).body == {"n": 2}
    again = run_once(committed_factory, attempt(project_id), lambda _: {"n": 3})
    assert (again.body, again.status_code) == (first.body, first.status_code) == ({"n": 1}, 201)


def test_of_two_at_once_one_works_and_the_other_is_told_to_wait(
    committed_factory: SessionFactory, project_id: UUID
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    answers = []

    def slow(_: Session) -> dict[str, Any]:
        inside.set()
        go_on.wait(10)
        return {"n": 1}

    thread = threading.Thread(
        target=lambda: answers.append(run_once(committed_factory, attempt(project_id), slow))
    )
    thread.start()
    assert inside.wait(10)
    with pytest.raises(RequestRunning):
        run_once(committed_factory, attempt(project_id), lambda _: {"n": 2})
    with pytest.raises(RequestRunning):
        find_answer(committed_factory, attempt(project_id))
    go_on.set()
    thread.join(10)
    assert answers[0].body == {"n": 1}
    assert run_once(committed_factory, attempt(project_id), lambda _: {"n": 3}).is_replay


def test_a_failed_request_gives_its_key_back(
    committed_factory: SessionFactory, project_id: UUID
) -> None:
    def fail(_: Session) -> dict[str, Any]:
        raise BadRequest("no")

    with pytest.raises(BadRequest):
        run_once(committed_factory, attempt(project_id), fail)
    assert not run_once(committed_factory, attempt(project_id), lambda _: {"n": 1}).is_replay


def test_a_request_whose_process_died_blocks_its_key_for_a_while_only(
    committed_factory: SessionFactory, project_id: UUID
) -> None:
    with transaction(committed_factory) as session:
        session.execute(
            text(
                "INSERT INTO idempotency_keys (project_id, key, route, body_sha256)"
                " VALUES (:p, 'key', 'POST /x', :h)"
            ),
            {"p": project_id, "h": hash_body(None)},
        )
    with pytest.raises(RequestRunning):
        run_once(committed_factory, attempt(project_id), lambda _: {"n": 1})
    age(committed_factory, LONGEST)
    assert run_once(committed_factory, attempt(project_id), lambda _: {"n": 1}).body == {"n": 1}


def test_the_order_of_keys_in_a_body_does_not_matter() -> None:
    assert hash_body({"a": 1, "b": {"c": 2, "d": 3}}) == hash_body({"b": {"d": 3, "c": 2}, "a": 1})
    assert hash_body({"a": 1}) != hash_body({"a": 2})


def test_keys_may_be_quoted() -> None:
    assert (parse_key('"abc"'), parse_key(" abc "), parse_key(None)) == ("abc", "abc", None)
    for bad in ("", '""', "x" * 256, "a\nb"):
        with pytest.raises(BadRequest):
            parse_key(bad)

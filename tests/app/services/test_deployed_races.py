"""Deployed models under real commits: what comes at once is decided one after the other."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select

from app.control.monitors import sweep
from app.db.models import Alias, AliasChange, Compensation, Job, MonitorLook, WebhookEvent
from app.db.session import SessionFactory, transaction
from app.domain.aliases import Promote
from app.domain.monitors import CreateMonitor
from app.domain.results import PostedResults
from app.domain.states import JobKind
from app.errors import Conflict, PreconditionFailed
from app.services.aliases import Condition, promote
from app.services.monitors import create_monitor
from app.services.posting import post_results
from app.services.registry import delete_version
from app.services.results import RecordedLook
from app.services.storage import Storage
from tests.deployed import ALIAS, NAME, Deployed, items, make_deployed, store_items


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def deployed(committed_factory: SessionFactory, storage: Storage) -> Deployed:
    with transaction(committed_factory) as session:
        found = make_deployed(session, num_versions=3)
        store_items(session, storage, found.benchmark)
        body = {
            "model": f"{NAME}@{ALIAS}",
            "benchmarks": [{"name": found.benchmark_name}],
            "sources": ["watchdog"],
            "schedule": {"every_hours": 1},
        }
        create_monitor(session, found.project.id, CreateMonitor.model_validate(body))
    return found


def at_once(*actions: Callable[[], Any]) -> list[Any]:
    """What each gives; they start together."""
    start = threading.Barrier(len(actions))

    def run(action: Callable[[], Any]) -> Any:
        start.wait()
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, actions))


def poster(factory: SessionFactory, storage: Storage, deployed: Deployed, lost: int) -> Any:
    body = PostedResults.model_validate(
        {
            "results": [
                {
                    "subject": {"type": "model", "id": deployed.models[2].name},
                    "benchmark": deployed.benchmark_name,
                    "items": items(lost=lost),
                }
            ]
        }
    )

    def post() -> RecordedLook:
        with transaction(factory) as session:
            return post_results(session, storage, deployed.caller, body)[0]

    return post


def counts(factory: SessionFactory) -> dict[str, int]:
    with transaction(factory) as session:
        jobs = select(func.count()).where(Job.kind == JobKind.FINE_TUNING)
        told = select(func.count()).where(WebhookEvent.type == "monitor.regression_detected")
        return {
            "looks": session.scalar(select(func.count()).select_from(MonitorLook)) or 0,
            "moves": session.scalar(select(func.count()).select_from(AliasChange)) or 0,
            "compensations": session.scalar(select(func.count()).select_from(Compensation)) or 0,
            "jobs": session.scalar(jobs) or 0,
            "told": session.scalar(told) or 0,
        }


@pytest.mark.parametrize("second", [120, 121])
def test_of_regressions_posted_at_once_one_moves_the_alias(
    committed_factory, storage, deployed, second
) -> None:
    looks = at_once(
        poster(committed_factory, storage, deployed, 120),
        poster(committed_factory, storage, deployed, second),
    )
    assert counts(committed_factory) == {
        "looks": 1,
        "moves": 4,
        "compensations": 1,
        "jobs": 2,
        "told": 1,
    }
    with transaction(committed_factory) as session:
        assert session.scalars(select(Alias)).one().revision == 4
    outcomes = [outcome for look in looks for outcome in look.monitored]
    if second == 120:  # the very same results: both get the one look
        assert sorted(outcome.is_replay for outcome in outcomes) == [False, True]
    else:  # the later one finds that the alias has left the version
        assert len(outcomes) == 1


def test_a_promotion_and_a_regression_at_once_leave_one_history(
    committed_factory, storage, deployed
) -> None:
    def move() -> int | str:
        try:
            with transaction(committed_factory) as session:
                return promote(
                    session, deployed.caller, NAME, ALIAS, Promote(version=1), Condition(revision=3)
                ).alias.revision
        except PreconditionFailed as error:
            return error.code

    promoted, look = at_once(move, poster(committed_factory, storage, deployed, 120))
    with transaction(committed_factory) as session:
        alias = session.scalars(select(Alias)).one()
        changes = session.scalars(select(AliasChange).order_by(AliasChange.revision)).all()
    assert [change.revision for change in changes] == [1, 2, 3, 4]
    assert alias.revision == 4
    if promoted == 4:  # the alias had left the version when the result came
        assert changes[3].action == "promote"
        assert look.monitored == ()
    else:
        assert promoted == "revision_mismatch"
        assert changes[3].action == "regression_rollback"


def test_a_version_is_not_deleted_while_an_alias_moves_to_it(
    committed_factory, storage, deployed
) -> None:
    name = deployed.models[0].name

    def delete() -> str:
        try:
            delete_version(committed_factory, storage, deployed.project.id, name)
        except Conflict as error:
            return error.code
        return "deleted"

    def move() -> str:
        try:
            with transaction(committed_factory) as session:
                promote(session, deployed.caller, NAME, ALIAS, Promote(version=1))
        except Conflict as error:
            return error.code
        return "moved"

    found = at_once(delete, move)
    assert found in (["deleted", "version_not_ready"], ["model_in_use", "moved"])


def test_two_schedulers_queue_an_evaluation_once(committed_factory, deployed) -> None:
    at_once(*[lambda: sweep(committed_factory)] * 3)
    with transaction(committed_factory) as session:
        jobs = session.scalars(select(Job).where(Job.kind == JobKind.EVALUATION)).all()
    assert len(jobs) == 1

"""Keys: what is shown, what is kept, who gets in."""

import hashlib
import re
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from app.db.models import ApiKey
from app.domain.scopes import DEFAULT_SCOPES, Scope, parse_scopes
from app.errors import BadRequest, Forbidden, NotFound, Unauthorized
from app.services.keys import authenticate, create_key, ensure_project, list_keys, revoke_key
from tests.factories import make_project


def test_a_new_key_opens_its_project_with_every_scope_but_making_keys_and_passing_gates(
    session: Session,
) -> None:
    project = make_project(session)
    created = create_key(session, project_id=project.id, name="ci")
    assert re.fullmatch(r"rt_live_[a-z0-9]{8}_[\w-]{43}", created.text)
    caller = authenticate(session, created.text)
    assert caller.project_id == project.id
    assert caller.key_id == created.row.key_id
    by_name_alone = {Scope.KEYS_ADMIN, Scope.MODELS_FORCE, Scope.AUDIT_READ}
    assert caller.scopes == set(Scope) - by_name_alone
    caller.require(Scope.RESULTS_ACT)
    with pytest.raises(Forbidden, match="keys:admin"):
        caller.require(Scope.KEYS_ADMIN)


def test_only_the_digest_of_the_secret_is_kept(session: Session) -> None:
    created = create_key(session, project_id=make_project(session).id, name="ci")
    secret = created.text.split("_", 3)[3]
    assert created.row.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    kept = [str(getattr(created.row, column.name)) for column in ApiKey.__table__.columns]
    assert not any(secret in value for value in kept)


def test_everything_else_is_turned_away_alike(session: Session) -> None:
    created = create_key(session, project_id=make_project(session).id, name="ci")
    other = create_key(session, project_id=make_project(session).id, name="other")
    mixed = f"rt_live_{created.row.key_id}_{other.text.split('_', 3)[3]}"
    wrong = [
        created.text[:-1],
        created.text + "x",
        mixed,
        "",
        "rt_live__",
        "sk-123",
        "rt_live_a\0b_c",
    ]
    messages = set()
    for bearer in [*wrong, "rt_live_zzzzzzzz_" + "x" * 43, "rt_test" + created.text[7:]]:
        with pytest.raises(Unauthorized) as caught:
            authenticate(session, bearer)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_an_expired_or_revoked_key_stops_working(session: Session) -> None:
    project = make_project(session)
    soon = datetime.now(UTC) + timedelta(hours=1)
    expiring = create_key(session, project_id=project.id, name="a", expires_at=soon)
    authenticate(session, expiring.text)
    expiring.row.expires_at = datetime.now(UTC) - timedelta(seconds=1)
    session.flush()
    with pytest.raises(Unauthorized):
        authenticate(session, expiring.text)
    revoked = create_key(session, project_id=project.id, name="b")
    revoke_key(session, revoked.row.key_id)
    with pytest.raises(Unauthorized):
        authenticate(session, revoked.text)
    with pytest.raises(NotFound):
        revoke_key(session, revoked.row.key_id)


def test_another_project_cannot_revoke_a_key(session: Session) -> None:
    created = create_key(session, project_id=make_project(session).id, name="a")
    with pytest.raises(NotFound):
        revoke_key(session, created.row.key_id, project_id=make_project(session).id)
    authenticate(session, created.text)
    revoke_key(session, created.text, project_id=created.row.project_id)


def test_use_is_noted_at_most_once_a_minute(session: Session) -> None:
    created = create_key(session, project_id=make_project(session).id, name="a")

    def used_at() -> datetime | None:
        session.expire(created.row)
        return created.row.last_used_at

    authenticate(session, created.text)
    first = used_at()
    assert first is not None
    authenticate(session, created.text)
    assert used_at() == first
    session.execute(
        update(ApiKey).values(last_used_at=func.clock_timestamp() - timedelta(seconds=61))
    )
    session.expire_all()
    authenticate(session, created.text)
    later = used_at()
    assert later is not None
    assert later > first


def test_a_scope_of_a_later_release_means_nothing(session: Session) -> None:
    created = create_key(
        session, project_id=make_project(session).id, name="a", scopes=parse_scopes(["jobs:read"])
    )
    created.row.scopes = ["jobs:read", "moon:land"]
    session.flush()
    assert authenticate(session, created.text).scopes == {Scope.JOBS_READ}


def test_scopes_are_checked_by_name() -> None:
    assert parse_scopes(["jobs:write", "jobs:read", "jobs:read"]) == (
        Scope.JOBS_READ,
        Scope.JOBS_WRITE,
    )
    assert Scope.KEYS_ADMIN not in DEFAULT_SCOPES
    with pytest.raises(BadRequest, match="moon:land"):
        parse_scopes(["moon:land"])


def test_keys_are_listed_with_their_projects(session: Session) -> None:
    first, second = make_project(session), make_project(session)
    create_key(session, project_id=first.id, name="a")
    create_key(session, project_id=second.id, name="b")
    rows = list_keys(session, project=second.name)
    assert [(key.name, project) for key, project in rows] == [("b", second.name)]
    with pytest.raises(NotFound):
        list_keys(session, project="none")


def test_a_project_is_made_once(session: Session) -> None:
    assert ensure_project(session, "team-a") == ensure_project(session, "team-a")
    with pytest.raises(BadRequest):
        ensure_project(session, "a b")
    with pytest.raises(BadRequest):
        create_key(session, project_id=ensure_project(session, "team-a"), name=" ")

"""A checked key is known for some seconds, and no longer."""

from uuid import uuid4

from app.domain.scopes import Caller, Scope
from app.services.known_keys import MAX_KEPT, KnownKeys


def test_a_key_is_known_from_its_check_for_so_long() -> None:
    now = [100.0]
    known = KnownKeys(3, clock=lambda: now[0])
    caller = Caller(uuid4(), "a", frozenset({Scope.JOBS_READ}))
    assert known.find("text") is None
    known.keep("text", caller, checked_at=99.0)
    assert known.find("text") is caller
    assert known.find("other") is None
    now[0] = 102.0
    assert known.find("text") is None


def test_a_key_that_this_process_revokes_is_forgotten_at_once() -> None:
    known = KnownKeys(3)
    for key_id in ("a", "b"):
        known.keep(key_id, Caller(uuid4(), key_id, frozenset()), checked_at=known.now())
    known.forget("a")
    assert known.find("a") is None
    assert known.find("b") is not None


def test_what_is_kept_has_a_bound_and_zero_keeps_nothing() -> None:
    known, nothing = KnownKeys(60), KnownKeys(0)
    caller = Caller(uuid4(), "a", frozenset())
    nothing.keep("a", caller, checked_at=nothing.now())
    assert nothing.find("a") is None
    for number in range(MAX_KEPT + 1):
        known.keep(str(number), caller, checked_at=known.now())
    assert known.find(str(MAX_KEPT)) is caller
    assert known.find("0") is None

"""The gate of a registered model, and where a rollback goes."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.domain.aliases import (
    CreateRegisteredModel,
    PastMove,
    Promote,
    RollBackAlias,
    VersionFact,
    choose_rollback_target,
    list_objections,
    stack_of,
)


def fact(version: int = 1, **changes: Any) -> VersionFact:
    good = VersionFact(version=version, status="ready", is_deleted=False, retention="held")
    return good._replace(**changes)


def codes(found) -> list[str]:
    return [objection.code for objection in found]


@pytest.mark.parametrize(
    ("retention", "gate", "objections"),
    [
        ("held", "held", []),
        ("held", "unproven", []),
        ("unproven", "unproven", []),
        ("unproven", "held", ["retention_not_held"]),
        ("unwatched", "unproven", ["retention_not_held"]),
        ("off", "unproven", ["retention_not_held"]),
    ],
)
def test_the_gate_lets_through_what_its_word_allows(retention, gate, objections) -> None:
    assert codes(list_objections(fact(retention=retention), gate, None)) == objections


def test_a_regression_and_a_spent_budget_are_objections_too() -> None:
    bad = fact(regression="fell 9 %", cumulative_drop=0.11)
    assert codes(list_objections(bad, "held", 0.1)) == [
        "regressed_when_deployed",
        "cumulative_drop_exceeded",
    ]
    assert codes(list_objections(fact(cumulative_drop=0.1), "held", 0.1)) == []
    assert codes(list_objections(fact(), "held", 0.1)) == ["cumulative_drop_unknown"]
    assert all(objection.can_be_forced for objection in list_objections(bad, "held", 0.1))


@pytest.mark.parametrize(
    "changes", [{"status": "pending"}, {"status": "failed"}, {"is_deleted": True}]
)
def test_what_is_not_there_is_never_forced_through(changes) -> None:
    (objection,) = list_objections(fact(retention="off", **changes), "held", None)
    assert (objection.code, objection.can_be_forced) == ("version_not_ready", False)


def moves(*steps: tuple[str, int | None]) -> list[PastMove]:
    return [PastMove(*step) for step in steps]


def test_a_rollback_takes_down_what_stood_above_its_target() -> None:
    history = moves(("promote", 1), ("promote", 2), ("promote", 3))
    assert stack_of(history) == [1, 2, 3]
    history += moves(("regression_rollback", 2))
    assert stack_of(history) == [1, 2]
    history += moves(("rollback", 1), ("promote", 4), ("delete", None), ("promote", 2))
    assert stack_of(history) == [1, 4, 2]
    assert stack_of(moves(("promote", 1), ("rollback", 7))) == [1, 7]


@pytest.mark.parametrize(
    ("history", "bad", "current", "target"),
    [
        ([("promote", 1), ("promote", 2), ("promote", 3)], (), 3, 2),
        ([("promote", 1), ("promote", 2), ("promote", 3)], (2,), 3, 1),
        ([("promote", 1), ("promote", 2), ("promote", 3)], (1, 2), 3, None),
        ([("promote", 1), ("promote", 2), ("rollback", 1)], (), 1, None),
        ([("promote", 1), ("promote", 2), ("promote", 3), ("rollback", 2)], (), 2, 1),
        ([("promote", 1), ("promote", 2), ("promote", 1)], (), 1, 2),
        ([("promote", 1)], (), 1, None),
    ],
)
def test_the_target_is_the_last_good_version_before(history, bad, current, target) -> None:
    facts = {n: fact(n, regression="fell" if n in bad else None) for n in (1, 2, 3)}
    found = choose_rollback_target(
        moves(*history), facts, current=current, gate="unproven", max_cumulative_drop=None
    )
    assert found == target


def test_a_deleted_version_is_no_target() -> None:
    facts = {1: fact(1), 2: fact(2, is_deleted=True), 3: fact(3)}
    history = moves(("promote", 1), ("promote", 2), ("promote", 3))
    found = choose_rollback_target(history, facts, current=3, gate="held", max_cumulative_drop=None)
    assert found == 1


@pytest.mark.parametrize("body", [Promote, RollBackAlias])
def test_force_wants_a_reason(body) -> None:
    with pytest.raises(ValidationError, match="reason"):
        body.model_validate({"version": 1, "force": True} if body is Promote else {"force": True})


@pytest.mark.parametrize("name", ["", "a@b", "a/b", "-a", "a" * 129])
def test_a_name_holds_nothing_that_means_something_else(name) -> None:
    with pytest.raises(ValidationError):
        CreateRegisteredModel(name=name)

"""Registered models and their aliases: what is asked for, what the gate lets through, where a rollback goes."""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from app.domain.frozen import Frozen

NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"  # no `@`, which names an alias, and no `/`
ALIAS: Final = (
    r"^[A-Za-z][A-Za-z0-9._-]{0,63}$"  # begins with a letter: `name@3` is a version's number
)

DIGITS: Final = r"[1-9][0-9]{0,14}"

Gate = Literal["held", "unproven"]
Move = Literal["promote", "rollback", "regression_rollback", "delete"]
ROLLBACKS: Final = frozenset({"rollback", "regression_rollback"})


def _number_of(value: object) -> object:
    """Other registries write a version's number as text, so both are taken."""
    is_number = isinstance(value, str) and re.fullmatch(DIGITS, value) is not None
    return int(str(value)) if is_number else value


Reason = Annotated[str, Field(min_length=1, max_length=2000)]

_Number = Annotated[int, Field(ge=1, le=2**53)]
_Digits = Annotated[str, Field(pattern=f"^{DIGITS}$")]
VersionNumber = Annotated[
    _Number, BeforeValidator(_number_of, json_schema_input_type=_Number | _Digits)
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
Share = Annotated[float, Field(gt=0, lt=1)]


class CreateRegisteredModel(Frozen):
    """`POST /v1/registered_models`."""

    name: str = Field(pattern=NAME)
    description: str | None = Field(default=None, max_length=4000)
    metadata: Metadata | None = None
    gate: Gate = "unproven"  # the least word on retention that is promoted
    max_cumulative_drop: Share | None = None  # of the general mean against the root; None: no cap


class UpdateRegisteredModel(Frozen):
    """`PATCH /v1/registered_models/{name}`: what is given changes, null clears."""

    description: str | None = Field(default=None, max_length=4000)
    metadata: Metadata | None = None
    gate: Gate = "unproven"
    max_cumulative_drop: Share | None = None


class RegisterVersion(Frozen):
    """`POST /v1/registered_models/{name}/versions`."""

    model: str = Field(min_length=1, max_length=512)  # a published version's name
    description: str | None = Field(default=None, max_length=4000)


class Promote(Frozen):
    """`PUT .../aliases/{alias}` and its `promote`: the alias points at this version from now on."""

    version: VersionNumber
    reason: Reason | None = None
    force: bool = False  # passes the gate; needs a reason and the scope `models:force`

    @model_validator(mode="after")
    def _force_has_a_reason(self) -> "Promote":
        if self.force and self.reason is None:
            raise ValueError("reason: say why the gate is passed by force")
        return self


class RollBackAlias(Frozen):
    """`POST .../aliases/{alias}/rollback`."""

    to: Literal["previous"] | VersionNumber = "previous"
    reason: Reason | None = None
    force: bool = False

    @model_validator(mode="after")
    def _force_has_a_reason(self) -> "RollBackAlias":
        if self.force and self.reason is None:
            raise ValueError("reason: say why the gate is passed by force")
        return self


class VersionFact(NamedTuple):
    """A registered version as the gate sees it."""

    version: int
    status: str  # `pending`, `ready`, `failed`
    is_deleted: bool
    retention: str  # `held`, `unproven`, `unwatched`, `off`
    regression: str | None = None  # what a monitor confirmed of it, in words
    cumulative_drop: float | None = None  # against the root; None: never measured


class Objection(NamedTuple):
    """Why a version is not let through."""

    code: str
    message: str
    can_be_forced: bool = True


class PastMove(NamedTuple):
    """One move of an alias, as a rollback reads its history."""

    action: str
    to_version: int | None


def list_objections(
    fact: VersionFact, gate: Gate, max_cumulative_drop: float | None
) -> tuple[Objection, ...]:
    """What the gate has against a version; nothing: it may be promoted.

    What was never measured is no pass: under a cap a version without numbers is refused.
    """
    if fact.is_deleted or fact.status != "ready":
        word = "deleted" if fact.is_deleted else fact.status
        return (
            Objection(
                "version_not_ready", f"version {fact.version} is {word}", can_be_forced=False
            ),
        )
    found = []
    allowed = {"held"} if gate == "held" else {"held", "unproven"}
    if fact.retention not in allowed:
        found.append(
            Objection(
                "retention_not_held",
                f"its retention is '{fact.retention}', and the gate lets {' and '.join(sorted(allowed))} through",
            )
        )
    if fact.regression is not None:
        found.append(Objection("regressed_when_deployed", fact.regression))
    if max_cumulative_drop is not None:
        if fact.cumulative_drop is None:
            found.append(
                Objection(
                    "cumulative_drop_unknown",
                    "its drop against the lineage's root was never measured, and the registered model caps it",
                )
            )
        elif fact.cumulative_drop > max_cumulative_drop:
            found.append(
                Objection(
                    "cumulative_drop_exceeded",
                    f"general ability is {fact.cumulative_drop:.2%} below the lineage's root,"
                    f" and the registered model caps that at {max_cumulative_drop:.2%}",
                )
            )
    return tuple(found)


def stack_of(moves: Iterable[PastMove]) -> list[int]:
    """The versions that an alias stands on, the present one last.

    A promotion puts a version on top; a rollback takes down to its target all that was above it, so that what
    was rolled back from is never what a later rollback goes to.
    """
    stack: list[int] = []
    for move in moves:
        if move.to_version is None:
            continue
        if move.action in ROLLBACKS and move.to_version in stack:
            while stack[-1] != move.to_version:
                stack.pop()
        else:
            stack.append(move.to_version)
    return stack


def choose_rollback_target(
    moves: Sequence[PastMove],
    facts: dict[int, VersionFact],
    *,
    current: int | None,
    gate: Gate,
    max_cumulative_drop: float | None,
) -> int | None:
    """The last version before the present one that the gate still lets through; None: there is none.

    Args:
        moves: Every move of the alias, oldest first.
        facts: Of the versions it ever pointed at.
        current: Where it points; None when it was deleted.
        gate: Of the registered model.
        max_cumulative_drop: Of the registered model.
    """
    for version in reversed(stack_of(moves)):
        if version != current and not list_objections(facts[version], gate, max_cumulative_drop):
            return version
    return None

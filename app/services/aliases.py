"""Aliases: promoted through a gate, rolled back to the last good version, compared and set by revision."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import func
from sqlalchemy.orm import Session

from app.db.models import Alias, AliasChange, RegisteredModel
from app.db.repositories.deployment import DeploymentRepository, VersionRow
from app.db.repositories.monitors import MonitorRepository
from app.domain.aliases import (
    ROLLBACKS,
    Move,
    Promote,
    RollBackAlias,
)
from app.domain.identifiers import public_id
from app.domain.scopes import Caller, Scope
from app.errors import BadRequest, Conflict, PreconditionFailed
from app.services.aliases_query import ShownAlias
from app.services.gates import check_gate, find_rollback_target
from app.services.webhooks import emit_event


@dataclass(frozen=True, slots=True)
class Condition:
    """What a caller holds the alias to be: `If-Match` (a revision or `*`), or `If-None-Match: *`."""

    revision: int | None = None
    must_exist: bool = False
    must_be_new: bool = False


@dataclass(frozen=True, slots=True)
class _Why:
    """Who moves an alias, and on what grounds."""

    action: Move
    actor: str
    reason: str | None
    forced: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    compensation_job_id: UUID | None = None


ANY = Condition()


def promote(
    session: Session,
    caller: Caller,
    name: str,
    alias: str,
    body: Promote,
    condition: Condition = ANY,
) -> ShownAlias:
    """Points an alias at a version, through the registered model's gate; the alias is made when it is new.

    Raises:
        NotFound: No such registered model or version.
        PreconditionFailed: The alias is not as the caller holds it to be.
        Conflict: The gate refuses, and says why.
        Forbidden: Passing it by force needs the scope `models:force`.
    """
    repository = DeploymentRepository(session)
    registered = repository.get(caller.project_id, name, lock=True)
    row = repository.find_alias(registered, alias, with_deleted=True)
    _check(condition, row)
    target = repository.get_version(registered, body.version, keep=True)
    details = _pass_gate(session, caller, registered, target, force=body.force)
    why = _Why("promote", f"key:{caller.key_id}", body.reason, bool(details), details)
    if row is None:
        row = Alias(registered_model_id=registered.id, name=alias, revision=0)
    _move(session, registered, row, target, why)
    return ShownAlias(registered, row, target)


def roll_back(
    session: Session,
    caller: Caller,
    name: str,
    alias: str,
    body: RollBackAlias,
    condition: Condition = ANY,
) -> ShownAlias:
    """Points an alias back: at the last good version before the present one, or at a given one through the gate.

    Raises:
        NotFound: No such registered model, alias or version.
        PreconditionFailed: The alias is not as the caller holds it to be.
        Conflict: There is no good version to go back to, or the gate refuses the given one.
        Forbidden: Passing the gate by force needs the scope `models:force`.
    """
    repository = DeploymentRepository(session)
    registered = repository.get(caller.project_id, name, lock=True)
    row = repository.get_alias(registered, alias)
    _check(condition, row)
    details: dict[str, Any] = {}
    if body.to == "previous":
        target = find_rollback_target(session, registered, row)
        if target is None:
            raise Conflict(
                f"to: '{name}@{alias}' has no earlier version that the gate lets through; name one.",
                "to",
                "no_good_version",
            )
    else:
        target = repository.get_version(registered, body.to, keep=True)
        details = _pass_gate(session, caller, registered, target, force=body.force)
    why = _Why("rollback", f"key:{caller.key_id}", body.reason, bool(details), details)
    _move(session, registered, row, target, why)
    return ShownAlias(registered, row, target)


def roll_back_regressed(
    session: Session,
    registered: RegisteredModel,
    alias: Alias,
    *,
    actor: str,
    reason: str,
    details: dict[str, Any],
    compensation_job_id: UUID | None,
) -> AliasChange | None:
    """Takes an alias off a regressed version; the caller holds the registered model's lock.

    Returns:
        The move; None when there is no good version to go back to, so that the alias stays.
    """
    target = find_rollback_target(session, registered, alias)
    if target is None:
        return None
    why = _Why(
        "regression_rollback",
        actor,
        reason,
        details=details,
        compensation_job_id=compensation_job_id,
    )
    _move(session, registered, alias, target, why)
    return DeploymentRepository(session).list_changes(alias, limit=1)[0]


def delete_alias(
    session: Session, caller: Caller, name: str, alias: str, condition: Condition = ANY
) -> None:
    """Takes an alias away; its history stays, and its revisions go on when it is made again.

    Raises:
        NotFound: No such registered model or alias.
        PreconditionFailed: The alias is not as the caller holds it to be.
        Conflict: A monitor watches it.
    """
    repository = DeploymentRepository(session)
    registered = repository.get(caller.project_id, name, lock=True)
    row = repository.get_alias(registered, alias)
    _check(condition, row)
    if MonitorRepository(session).find_of_alias(row.id) is not None:
        raise Conflict(
            f"alias: a monitor watches '{name}@{alias}'; delete the monitor first.",
            "alias",
            "alias_is_monitored",
        )
    _move(session, registered, row, None, _Why("delete", f"key:{caller.key_id}", None))


def _check(condition: Condition, alias: Alias | None) -> None:
    exists = alias is not None and alias.version_id is not None
    if condition.must_be_new and exists:
        raise PreconditionFailed(
            "If-None-Match: the alias exists.", "If-None-Match", "alias_exists"
        )
    if not (condition.must_exist or condition.revision is not None):
        return
    if not exists or alias is None:
        raise PreconditionFailed(
            "If-Match: the alias does not exist.", "If-Match", "alias_not_found"
        )
    if condition.revision is not None and alias.revision != condition.revision:
        raise PreconditionFailed(
            f"If-Match: the alias is at revision {alias.revision}, not {condition.revision}; read it again.",
            "If-Match",
            "revision_mismatch",
        )


def _pass_gate(
    session: Session,
    caller: Caller,
    registered: RegisteredModel,
    target: VersionRow,
    *,
    force: bool,
) -> dict[str, Any]:
    """What was passed by force, for the history; empty where the gate has nothing against it."""
    objections = check_gate(session, registered, [target])[target.row.version]
    if not objections:
        return {}
    said = "; ".join(objection.message for objection in objections)
    if not all(objection.can_be_forced for objection in objections):
        raise Conflict(f"version: {said}.", "version", objections[0].code)
    if not force:
        raise Conflict(
            f"version: the gate refuses it: {said}. `force` with a reason passes it.",
            "version",
            objections[0].code,
        )
    caller.require(Scope.MODELS_FORCE)
    return {"passed_by_force": [{"code": o.code, "message": o.message} for o in objections]}


def _move(
    session: Session,
    registered: RegisteredModel,
    alias: Alias,
    target: VersionRow | None,
    why: _Why,
) -> None:
    """Moves an alias, with its line of history and its webhook; the registered model is locked."""
    repository = DeploymentRepository(session)
    came_from = alias.version_id
    if target is not None and came_from == target.row.id and why.action == "promote":
        return  # it is there: nothing moves
    if why.action in ROLLBACKS and target is not None and came_from == target.row.id:
        raise BadRequest(f"to: the alias points at version {target.row.version} already.", "to")
    alias.version_id = None if target is None else target.row.id
    alias.revision += 1
    alias.moved_at = func.clock_timestamp()
    repository.add(alias)
    change = AliasChange(
        alias_id=alias.id,
        revision=alias.revision,
        action=why.action,
        from_version_id=came_from,
        to_version_id=alias.version_id,
        actor=why.actor,
        reason=why.reason,
        forced=why.forced,
        details=why.details,
        compensation_job_id=why.compensation_job_id,
    )
    repository.add(change)
    MonitorRepository(session).start_over(alias.id)
    _tell(session, registered, alias, change, target)


def _tell(
    session: Session,
    registered: RegisteredModel,
    alias: Alias,
    change: AliasChange,
    target: VersionRow | None,
) -> None:
    ids = [key for key in (change.from_version_id, change.to_version_id) if key is not None]
    numbers = DeploymentRepository(session).numbers_of(ids)
    job = change.compensation_job_id
    emit_event(
        session,
        project_id=registered.project_id,
        type="registered_model.alias_moved",
        data={
            "id": public_id("alias_change", change.id),
            "registered_model": registered.name,
            "alias": alias.name,
            "revision": alias.revision,
            "action": change.action,
            "from_version": numbers.get(change.from_version_id) if change.from_version_id else None,
            "to_version": numbers.get(change.to_version_id) if change.to_version_id else None,
            "model": None if target is None else target.model.name,
            "actor": change.actor,
            "reason": change.reason,
            "forced": change.forced,
            "details": change.details,
            "compensation_job_id": None if job is None else public_id("job", job),
        },
    )

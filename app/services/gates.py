"""The gate of a registered model: what it has against a version, and which version is the last good one."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.db.models import Alias, RegisteredModel
from app.db.repositories.deployment import DeploymentRepository, VersionRow
from app.domain.aliases import (
    Gate,
    Objection,
    PastMove,
    VersionFact,
    choose_rollback_target,
    list_objections,
)
from app.domain.decisions import Reading
from app.domain.wording import describe_reading
from app.services.lineage import cumulative_drop


def gate_of(registered: RegisteredModel) -> Gate:
    """The least word on retention that is promoted."""
    return "held" if registered.gate == "held" else "unproven"


def check_gate(
    session: Session, registered: RegisteredModel, rows: Sequence[VersionRow]
) -> dict[int, tuple[Objection, ...]]:
    """What the registered model's gate has against versions, by number."""
    facts = _facts(session, registered, rows)
    return {
        number: list_objections(fact, gate_of(registered), registered.max_cumulative_drop)
        for number, fact in facts.items()
    }


def find_rollback_target(
    session: Session, registered: RegisteredModel, alias: Alias
) -> VersionRow | None:
    """The last version that the alias stood on before the present one and that is still good."""
    repository = DeploymentRepository(session)
    changes = list(reversed(repository.list_changes(alias)))
    ids = {c.to_version_id for c in changes if c.to_version_id is not None}
    numbers = repository.numbers_of(list(ids))
    rows = {
        row.row.version: row
        for row in repository.list_versions(registered, numbers=list(numbers.values()), keep=True)
    }
    moves = [
        PastMove(c.action, None if c.to_version_id is None else numbers[c.to_version_id])
        for c in changes
    ]
    target = choose_rollback_target(
        moves,
        _facts(session, registered, list(rows.values())),
        current=None if alias.version_id is None else numbers[alias.version_id],
        gate=gate_of(registered),
        max_cumulative_drop=registered.max_cumulative_drop,
    )
    return None if target is None else rows[target]


def _facts(
    session: Session, registered: RegisteredModel, rows: Sequence[VersionRow]
) -> dict[int, VersionFact]:
    regressed = DeploymentRepository(session).list_regressed(
        registered, [row.model.id for row in rows]
    )
    facts = {}
    for row, model in rows:
        look = regressed.get(model.id)
        words = None
        if look is not None:
            words = "when deployed: " + describe_reading(Reading.model_validate(look.reading))
        facts[row.version] = VersionFact(
            version=row.version,
            status=model.status,
            is_deleted=model.deleted_at is not None,
            retention=model.retention,
            regression=words,
            cumulative_drop=(
                None if registered.max_cumulative_drop is None else cumulative_drop(session, model)
            ),
        )
    return facts

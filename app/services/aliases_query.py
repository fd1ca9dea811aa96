"""Aliases as they are read: where they point, and every move of theirs."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import Alias, AliasChange, RegisteredModel
from app.db.repositories.deployment import DeploymentRepository, VersionRow
from app.errors import NotFound


@dataclass(frozen=True, slots=True)
class ShownAlias:
    """An alias with where it points."""

    registered: RegisteredModel
    alias: Alias
    version: VersionRow


@dataclass(frozen=True, slots=True)
class ShownChange:
    """A move of an alias with the version numbers of both ends."""

    row: AliasChange
    from_version: int | None
    to_version: int | None


def get_alias(session: Session, project_id: UUID, name: str, alias: str) -> ShownAlias:
    """One alias.

    Raises:
        NotFound: No such registered model or alias.
    """
    repository = DeploymentRepository(session)
    registered = repository.get(project_id, name)
    return _show(session, registered, [repository.get_alias(registered, alias)])[0]


def list_aliases(session: Session, project_id: UUID, name: str) -> list[ShownAlias]:
    """Every alias of a registered model, by name.

    Raises:
        NotFound: No such registered model.
    """
    repository = DeploymentRepository(session)
    registered = repository.get(project_id, name)
    return _show(session, registered, repository.list_aliases([registered.id]))


def list_history(
    session: Session, project_id: UUID, name: str, alias: str, *, after: UUID | None, limit: int
) -> tuple[list[ShownChange], bool]:
    """Moves of an alias, newest first, and whether there are more; also of one that was deleted.

    Raises:
        NotFound: No such registered model, alias or move `after`.
    """
    repository = DeploymentRepository(session)
    registered = repository.get(project_id, name)
    row = repository.find_alias(registered, alias, with_deleted=True)
    if row is None:
        raise NotFound(f"alias: '{name}' has no alias '{alias[:80]}'.", "alias", "alias_not_found")
    below = None
    if after is not None:
        last = repository.find_change(row, after)
        if last is None:
            raise NotFound("after: the alias has no move with this id.", "after")
        below = last.revision
    found = repository.list_changes(row, below=below, limit=limit + 1)
    ids = [key for c in found for key in (c.from_version_id, c.to_version_id) if key is not None]
    numbers = repository.numbers_of(ids)
    shown = [
        ShownChange(
            change,
            None if change.from_version_id is None else numbers[change.from_version_id],
            None if change.to_version_id is None else numbers[change.to_version_id],
        )
        for change in found[:limit]
    ]
    return shown, len(found) > limit


def _show(
    session: Session, registered: RegisteredModel, aliases: Sequence[Alias]
) -> list[ShownAlias]:
    repository = DeploymentRepository(session)
    numbers = repository.numbers_of([a.version_id for a in aliases if a.version_id is not None])
    rows = {
        row.row.id: row
        for row in repository.list_versions(registered, numbers=list(numbers.values()))
    }
    return [
        ShownAlias(registered, alias, rows[alias.version_id])
        for alias in aliases
        if alias.version_id is not None
    ]

"""Registered models: names under which published versions are numbered."""

from typing import NamedTuple
from uuid import UUID

from sqlalchemy import func
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.db.models import ModelVersion, RegisteredModel, RegisteredVersion
from app.db.repositories.deployment import DeploymentRepository, VersionRow
from app.db.repositories.registry import RegistryRepository
from app.domain.aliases import CreateRegisteredModel, RegisterVersion, UpdateRegisteredModel
from app.errors import Conflict
from app.services.lineage import LedgerEntry, list_ledger


class ShownModel(NamedTuple):
    """A registered model with what points where."""

    row: RegisteredModel
    aliases: dict[str, int]  # version numbers by alias


class ShownVersion(NamedTuple):
    """A registered version with its place in the lineage, and the aliases that point at it."""

    registered: RegisteredModel
    version: VersionRow
    entry: LedgerEntry
    aliases: tuple[str, ...]


def create_registered_model(
    session: Session, project_id: UUID, body: CreateRegisteredModel
) -> RegisteredModel:
    """Registers a name.

    Raises:
        Conflict: The project has it already.
    """
    repository = DeploymentRepository(session)
    row = RegisteredModel(
        project_id=project_id,
        name=body.name,
        description=body.description,
        metadata_=body.metadata,
        gate=body.gate,
        max_cumulative_drop=body.max_cumulative_drop,
    )
    try:
        with session.begin_nested():
            repository.add(row)
    except IntegrityError:
        raise Conflict(
            f"name: a registered model '{body.name}' exists.", "name", "registered_model_exists"
        ) from None
    return row


def update_registered_model(
    session: Session, project_id: UUID, name: str, body: UpdateRegisteredModel
) -> RegisteredModel:
    """Changes what is given; aliases stay where they are, also where a tighter gate would refuse them now.

    Raises:
        NotFound: The project has no such registered model.
    """
    row = DeploymentRepository(session).get(project_id, name, lock=True)
    for field in body.model_fields_set:
        setattr(row, "metadata_" if field == "metadata" else field, getattr(body, field))
    row.updated_at = func.clock_timestamp()
    session.flush()
    session.refresh(row)
    return row


def get_registered_model(session: Session, project_id: UUID, name: str) -> ShownModel:
    """One registered model.

    Raises:
        NotFound: The project has none of this name.
    """
    return show_registered(session, [DeploymentRepository(session).get(project_id, name)])[0]


def list_registered_models(
    session: Session, project_id: UUID, *, after: UUID | None, limit: int
) -> tuple[list[ShownModel], bool]:
    """A page of registered models, newest first, and whether there are more."""
    found = DeploymentRepository(session).list_page(project_id, after=after, limit=limit + 1)
    return show_registered(session, found[:limit]), len(found) > limit


def show_registered(session: Session, rows: list[RegisteredModel]) -> list[ShownModel]:
    """Registered models with their aliases."""
    repository = DeploymentRepository(session)
    aliases = repository.list_aliases([row.id for row in rows])
    numbers = repository.numbers_of([a.version_id for a in aliases if a.version_id is not None])
    return [
        ShownModel(
            row,
            {
                alias.name: numbers[alias.version_id]
                for alias in aliases
                if alias.registered_model_id == row.id and alias.version_id is not None
            },
        )
        for row in rows
    ]


def register_version(
    session: Session, project_id: UUID, name: str, body: RegisterVersion
) -> ShownVersion:
    """Makes a published model version number n+1; the same one again gets the number that it has.

    Raises:
        NotFound: No such registered model, or no such published version.
    """
    repository = DeploymentRepository(session)
    registered = repository.get(project_id, name, lock=True)
    model = RegistryRepository(session).get(project_id, body.model, for_update=True)
    row = repository.find_registration(registered, model.id)
    if row is None:
        registered.version_count += 1
        row = RegisteredVersion(
            registered_model_id=registered.id,
            version=registered.version_count,
            model_version_id=model.id,
            description=body.description,
        )
        repository.add(row)
    return show_versions(session, registered, [VersionRow(row, model)])[0]


def get_version(session: Session, project_id: UUID, name: str, number: int) -> ShownVersion:
    """One version.

    Raises:
        NotFound: No such registered model or version.
    """
    repository = DeploymentRepository(session)
    registered = repository.get(project_id, name)
    return show_versions(session, registered, [repository.get_version(registered, number)])[0]


def list_versions(
    session: Session, project_id: UUID, name: str, *, below: int | None, limit: int
) -> tuple[list[ShownVersion], bool]:
    """A page of versions, newest first, and whether there are more: the ledger of the registered model."""
    repository = DeploymentRepository(session)
    registered = repository.get(project_id, name)
    found = repository.list_versions(registered, below=below, limit=limit + 1)
    return show_versions(session, registered, found[:limit]), len(found) > limit


def show_versions(
    session: Session, registered: RegisteredModel, rows: list[VersionRow]
) -> list[ShownVersion]:
    """Versions with their lineage and aliases."""
    repository = DeploymentRepository(session)
    aliases = repository.list_aliases([registered.id])
    entries = list_ledger(session, [row.model for row in rows])
    return [
        ShownVersion(
            registered,
            row,
            entry,
            tuple(alias.name for alias in aliases if alias.version_id == row.row.id),
        )
        for row, entry in zip(rows, entries, strict=True)
    ]


def find_by_reference(session: Session, project_id: UUID, reference: str) -> ModelVersion | None:
    """The model version that `name@alias` or `name@3` means now."""
    name, at, alias = reference.partition("@")
    if not at:
        return None
    return DeploymentRepository(session).find_model_behind(project_id, name, alias)

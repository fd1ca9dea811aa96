"""Queries on registered models, their versions and aliases."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import (
    Alias,
    AliasChange,
    ModelVersion,
    MonitorLook,
    RegisteredModel,
    RegisteredVersion,
)
from app.errors import NotFound

MAX_DIGITS = 10  # of a version's number


class VersionRow(NamedTuple):
    """A registered version with the model version it stands for, deleted ones included."""

    row: RegisteredVersion
    model: ModelVersion


class DeploymentRepository:
    """What a project has registered."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, row: RegisteredModel | RegisteredVersion | Alias | AliasChange) -> None:
        """Keeps a new row."""
        self._session.add(row)
        self._session.flush()
        self._session.refresh(row)

    def find(self, project_id: UUID, name: str, *, lock: bool = False) -> RegisteredModel | None:
        """The registered model of this name; `lock` serialises those who move its aliases."""
        query = select(RegisteredModel).where(
            RegisteredModel.project_id == project_id, RegisteredModel.name == name
        )
        if lock:
            query = query.with_for_update().execution_options(populate_existing=True)
        return self._session.scalar(query)

    def get(self, project_id: UUID, name: str, *, lock: bool = False) -> RegisteredModel:
        """The registered model of this name.

        Raises:
            NotFound: The project has none.
        """
        found = self.find(project_id, name, lock=lock)
        if found is None:
            raise NotFound(
                f"No registered model is called '{name[:200]}'.",
                "registered_model",
                "registered_model_not_found",
            )
        return found

    def lock(self, registered_ids: Sequence[UUID]) -> dict[UUID, RegisteredModel]:
        """Registered models, locked in one order whoever asks."""
        found = self._session.scalars(
            select(RegisteredModel)
            .where(RegisteredModel.id.in_(registered_ids))
            .order_by(RegisteredModel.id)
            .with_for_update()
            .execution_options(populate_existing=True)
        )
        return {row.id: row for row in found}

    def list_page(
        self, project_id: UUID, *, after: UUID | None, limit: int
    ) -> list[RegisteredModel]:
        """Registered models, newest first.

        Raises:
            NotFound: The project has no registered model `after`.
        """
        own = RegisteredModel.project_id == project_id
        query = select(RegisteredModel).where(own)
        if after is not None:
            place = self._session.scalar(
                select(RegisteredModel.seq).where(own, RegisteredModel.id == after)
            )
            if place is None:
                raise NotFound("after: no registered model has this id.", "after")
            query = query.where(RegisteredModel.seq < place)
        return list(self._session.scalars(query.order_by(RegisteredModel.seq.desc()).limit(limit)))

    def list_versions(
        self,
        registered: RegisteredModel,
        *,
        below: int | None = None,
        limit: int | None = None,
        numbers: Sequence[int] | None = None,
        keep: bool = False,
    ) -> list[VersionRow]:
        """Versions, newest first: those below a number, or just these numbers; `keep` holds off their deletion."""
        query = (
            select(RegisteredVersion, ModelVersion)
            .join(ModelVersion, ModelVersion.id == RegisteredVersion.model_version_id)
            .where(RegisteredVersion.registered_model_id == registered.id)
            .order_by(RegisteredVersion.version.desc())
        )
        if below is not None:
            query = query.where(RegisteredVersion.version < below)
        if numbers is not None:
            query = query.where(RegisteredVersion.version.in_(numbers))
        if limit is not None:
            query = query.limit(limit)
        if keep:
            query = query.with_for_update(of=ModelVersion, read=True).execution_options(
                populate_existing=True
            )
        return [VersionRow(*row) for row in self._session.execute(query)]

    def get_version(
        self, registered: RegisteredModel, number: int, *, keep: bool = False
    ) -> VersionRow:
        """The version of this number; `keep` holds off its deletion until the transaction ends.

        Raises:
            NotFound: There is none.
        """
        found = self.list_versions(registered, numbers=[number], keep=keep)
        if not found:
            raise NotFound(
                f"version: '{registered.name}' has no version {number}.",
                "version",
                "version_not_found",
            )
        return found[0]

    def find_registration(
        self, registered: RegisteredModel, model_version_id: UUID
    ) -> RegisteredVersion | None:
        """The registered version that stands for a model version."""
        return self._session.scalar(
            select(RegisteredVersion).where(
                RegisteredVersion.registered_model_id == registered.id,
                RegisteredVersion.model_version_id == model_version_id,
            )
        )

    def numbers_of(self, version_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Version numbers by the registered version's id."""
        query = select(RegisteredVersion.id, RegisteredVersion.version).where(
            RegisteredVersion.id.in_(version_ids)
        )
        return dict(self._session.execute(query).all())

    def find_alias(
        self, registered: RegisteredModel, name: str, *, with_deleted: bool = False
    ) -> Alias | None:
        """The alias of this name, read afresh; the caller locks the registered model to move it."""
        query = select(Alias).where(Alias.registered_model_id == registered.id, Alias.name == name)
        if not with_deleted:
            query = query.where(Alias.version_id.is_not(None))
        return self._session.scalar(query.execution_options(populate_existing=True))

    def get_alias(self, registered: RegisteredModel, name: str) -> Alias:
        """The alias of this name.

        Raises:
            NotFound: There is none, or it was deleted.
        """
        found = self.find_alias(registered, name)
        if found is None:
            raise NotFound(
                f"alias: '{registered.name}' has no alias '{name[:80]}'.",
                "alias",
                "alias_not_found",
            )
        return found

    def list_aliases(self, registered_ids: Sequence[UUID]) -> list[Alias]:
        """Aliases that point somewhere, by name."""
        return list(
            self._session.scalars(
                select(Alias)
                .where(Alias.registered_model_id.in_(registered_ids), Alias.version_id.is_not(None))
                .order_by(Alias.name)
            )
        )

    def list_aliases_of(self, model_version_ids: Sequence[UUID]) -> list[tuple[UUID, str]]:
        """What points at model versions, as (model version, `name@alias`)."""
        rows = self._session.execute(
            select(RegisteredVersion.model_version_id, RegisteredModel.name, Alias.name)
            .join(Alias, Alias.version_id == RegisteredVersion.id)
            .join(RegisteredModel, RegisteredModel.id == Alias.registered_model_id)
            .where(RegisteredVersion.model_version_id.in_(model_version_ids))
            .order_by(RegisteredModel.name, Alias.name)
        )
        return [(model_version_id, f"{model}@{alias}") for model_version_id, model, alias in rows]

    def list_changes(
        self, alias: Alias, *, below: int | None = None, limit: int | None = None
    ) -> list[AliasChange]:
        """Moves of an alias, newest first: those before a revision."""
        query = select(AliasChange).where(AliasChange.alias_id == alias.id)
        if below is not None:
            query = query.where(AliasChange.revision < below)
        query = query.order_by(AliasChange.revision.desc())
        return list(self._session.scalars(query if limit is None else query.limit(limit)))

    def find_change(self, alias: Alias, change_id: UUID) -> AliasChange | None:
        """A move of an alias by its id."""
        return self._session.scalar(
            select(AliasChange).where(AliasChange.alias_id == alias.id, AliasChange.id == change_id)
        )

    def list_regressed(
        self, registered: RegisteredModel, model_version_ids: Sequence[UUID]
    ) -> dict[UUID, MonitorLook]:
        """Model versions of which a monitor of this registered model confirmed a regression, with the first such look."""
        query = (
            select(MonitorLook)
            .join(Alias, Alias.id == MonitorLook.alias_id)
            .where(
                Alias.registered_model_id == registered.id,
                MonitorLook.model_version_id.in_(model_version_ids),
                MonitorLook.verdict == "regress",
            )
            .order_by(MonitorLook.seq.desc())
        )
        return {look.model_version_id: look for look in self._session.scalars(query)}

    def find_model_behind(self, project_id: UUID, name: str, alias: str) -> ModelVersion | None:
        """The model version that `name@alias` means, or `name@3`; None when there is none or it was deleted."""
        query = (
            select(ModelVersion)
            .join(RegisteredVersion, RegisteredVersion.model_version_id == ModelVersion.id)
            .join(RegisteredModel, RegisteredModel.id == RegisteredVersion.registered_model_id)
            .where(
                RegisteredModel.project_id == project_id,
                RegisteredModel.name == name,
                ModelVersion.deleted_at.is_(None),
            )
        )
        if alias.isascii() and alias.isdigit():
            if len(alias) > MAX_DIGITS:
                return None
            query = query.where(RegisteredVersion.version == int(alias))
        else:
            query = query.join(Alias, Alias.version_id == RegisteredVersion.id).where(
                Alias.name == alias
            )
        return self._session.scalar(query)

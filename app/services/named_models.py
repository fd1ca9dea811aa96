"""The other models that a job's strategies name: found at submit, and brought to the worker's disk."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import BaseModel, ModelVersion
from app.db.repositories.catalog import CatalogRepository
from app.db.repositories.registry import RegistryRepository
from app.domain.configs.base import CAUSAL_LM, ModelKind
from app.domain.strategies import StrategyConfig
from app.errors import BadRequest, NotFound, TrainingFailed

READY = "ready"


class StoredModel(NamedTuple):
    """A model's directory in the store."""

    name: str
    path: str  # under the storage root
    sha256: str


def model_kind(base: BaseModel) -> ModelKind:
    """What a registered model is for; models from before kinds were told apart are causal ones."""
    kind: ModelKind = base.details.get("kind", CAUSAL_LM)
    return kind


def check_named_models(
    session: Session, project_id: UUID, strategies: Sequence[StrategyConfig]
) -> None:
    """Refuses strategies that name a model which is not there, or is not of the kind they need.

    Raises:
        NotFound: The project sees no such model; `param` names the field.
        BadRequest: It is of another kind, or is not ready.
    """
    for param, name, kind in _named(strategies):
        found = _find(session, project_id, name, param)
        is_of = CAUSAL_LM if isinstance(found, ModelVersion) else model_kind(found)
        if is_of != kind:
            raise BadRequest(
                f"{param}: '{name[:200]}' is of kind {is_of}; here a model of kind {kind} is needed.",
                param,
                "wrong_model_kind",
            )
        if isinstance(found, ModelVersion) and found.status != READY:
            raise BadRequest(
                f"{param}: '{name[:200]}' is {found.status}, so there is nothing to load.",
                param,
                "model_not_ready",
            )


def list_stored_models(
    session: Session, project_id: UUID, strategies: Sequence[StrategyConfig]
) -> list[StoredModel]:
    """Where the named models lie, each name once: a base model's files, or a version's artifact.

    Raises:
        TrainingFailed: One was deleted after the job was submitted.
    """
    stored: dict[str, StoredModel] = {}
    for param, name, _ in _named(strategies):
        try:
            row = _find(session, project_id, name, param)
        except NotFound as error:
            raise TrainingFailed(
                f"The model '{name[:200]}' is gone.", param, "model_not_found"
            ) from error
        if row.path is None or row.sha256 is None:
            raise TrainingFailed(f"'{name[:200]}' has no artifact.", param, "model_not_ready")
        stored[name] = StoredModel(name, row.path, row.sha256)
    return list(stored.values())


def _named(strategies: Sequence[StrategyConfig]) -> Iterator[tuple[str, str, ModelKind]]:
    for place, config in enumerate(strategies):
        for field, name in config.named_models():
            kind = config.model_kinds.get(field, CAUSAL_LM)
            yield f"retention.strategies.{place}.{field}", name, kind


def _find(session: Session, project_id: UUID, name: str, param: str) -> BaseModel | ModelVersion:
    base = CatalogRepository(session).find_model(name)
    if base is not None:
        return base
    try:
        return RegistryRepository(session).get(project_id, name)
    except NotFound:
        raise NotFound(
            f"{param}: no model is called '{name[:200]}'.", param, "model_not_found"
        ) from None

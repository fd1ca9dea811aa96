"""Models: base models and published versions."""

from fastapi import APIRouter

from app.api.dependencies import ModelsReader, ModelsWriter, ResourcesDep, SessionDep
from app.api.schemas.base import Deleted
from app.api.schemas.models import ModelList, ModelObject, show_model
from app.services import registry

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(session: SessionDep, caller: ModelsReader) -> ModelList:
    """Every model that the project can name."""
    found = registry.list_named_models(session, caller.project_id)
    return ModelList(data=[show_model(model) for model in found])


# A base model's name may hold slashes, so nothing hangs below a model's path.
@router.get("/{model:path}")
def retrieve_model(model: str, session: SessionDep, caller: ModelsReader) -> ModelObject:
    """One model."""
    return show_model(registry.get_named_model(session, caller.project_id, model))


@router.delete("/{model:path}")
def delete_model(model: str, caller: ModelsWriter, resources: ResourcesDep) -> Deleted:
    """Deletes a version; base models are the operator's."""
    registry.delete_version(resources.session_factory, resources.storage, caller.project_id, model)
    return Deleted(id=model, object="model")

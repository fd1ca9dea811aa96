"""The base of every value that crosses a boundary: frozen, and strict about unknown keys and about numbers."""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

#: Parts of a schema that hold no schemas.
_OPAQUE: Final = frozenset({"cls", "default", "metadata", "ref", "serialization", "config"})


def _refuse_disguised(value: object) -> object:
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def _guarded(node: Any) -> Any:  # noqa: ANN401 - any part of a schema
    if isinstance(node, list | tuple):
        return type(node)(_guarded(part) for part in node)
    if not isinstance(node, dict):
        return node
    kind, told = node.get("type"), node.get("function")
    if kind in ("int", "float"):
        return core_schema.no_info_before_validator_function(_refuse_disguised, node)
    if isinstance(told, dict) and told.get("function") is _refuse_disguised:
        return node  # of a model in this one, which was guarded as it was made
    if kind == "model-fields":  # named as the model names them, not as schemas do
        fields = {name: _guarded(field) for name, field in node["fields"].items()}
        return {**node, "fields": fields}
    return {key: part if key in _OPAQUE else _guarded(part) for key, part in node.items()}


class Frozen(BaseModel):
    """Immutable; an unknown key is an error that names its path, and so is a number that is none.

    By itself pydantic takes true for 1, and "5" for 5, which a client never means.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The model's schema with every number guarded."""
        schema: CoreSchema = _guarded(handler(source))
        return schema

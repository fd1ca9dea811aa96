"""Freezing of the bottom layers."""

from typing import Literal

from pydantic import Field

from app.domain.configs.base import StrategyBase


class FreezeConfig(StrategyBase):
    """The bottom layers stay as they are; `strength` is their share of the decoder layers."""

    type: Literal["freeze"] = "freeze"
    strength: float | None = Field(default=None, ge=0, le=0.95)  # share of the decoder layers
    embeddings: bool = True  # embedding tables, and a head tied to them, too

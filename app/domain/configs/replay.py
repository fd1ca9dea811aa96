"""Replay of general rows."""

from typing import Literal

from pydantic import Field

from app.domain.configs.base import StrategyBase


class ReplayConfig(StrategyBase):
    """Rows of general data in the training mix; `strength` is the mix ratio."""

    type: Literal["replay"] = "replay"
    strength: float | None = Field(default=None, ge=0, le=1)  # rows added, as a share of batch_size
    store_fraction: float = Field(default=0.05, gt=0, le=1)
    min_store_rows: int = Field(default=32, ge=1)

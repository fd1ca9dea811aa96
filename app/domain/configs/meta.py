"""Meta-learning: steps that are taken by looking ahead."""

from typing import Literal

from pydantic import Field

from app.domain.configs.base import StrategyBase


class MamlProxConfig(StrategyBase):
    """First-order MAML with a proximal inner loop; `strength` is the prox mu, 0 is plain training."""

    type: Literal["maml_prox"] = "maml_prox"
    strength: float | None = Field(default=None, ge=0, le=1e6)  # mu of the inner loop
    inner_lr: float = Field(default=1e-3, gt=0, le=1)  # alpha of the inner SGD
    inner_steps: int = Field(default=3, ge=1, le=20)  # K; a step costs about K + 1 plain ones
    query_rows: Literal["shuffled", "later"] = "shuffled"  # later: in the order of the file
    query_share: float = Field(default=0.5, gt=0, lt=1)  # of the step's domain rows
    memory_coef: float = Field(default=0.5, ge=0, le=100)  # weight of replayed and memory rows


class ReptileConfig(StrategyBase):
    """Reptile; `strength` is the share epsilon of the way to the inner loop's end, 0 is plain training."""

    type: Literal["reptile"] = "reptile"
    strength: float | None = Field(default=None, ge=0, le=1)  # epsilon
    inner_lr: float = Field(default=1e-3, gt=0, le=1)  # alpha of the inner SGD
    inner_steps: int = Field(default=3, ge=1, le=20)  # K; each reads its share of the step's rows

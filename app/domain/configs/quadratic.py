"""The quadratic anchors."""

from typing import Literal

from pydantic import Field

from app.domain.configs.base import StrategyBase


class EwcConfig(StrategyBase):
    """Elastic weight consolidation: a quadratic anchor weighted by the Fisher information."""

    type: Literal["ewc"] = "ewc"
    penalty_mode: Literal["implicit", "gradient"] = "implicit"  # LoRA always uses the gradient
    fisher_type: Literal["true", "empirical"] = "true"
    fisher_samples: int = Field(default=1024, ge=1, le=1_000_000)  # documents of general data
    fisher_normalize: Literal["none", "mean", "max"] = "mean"
    fisher_clip: float = Field(default=0.999, gt=0, le=1)  # quantile; 1 is off
    gamma: float = Field(default=0.95, gt=0, le=1)
    rho: float | None = Field(default=5.0, gt=1)  # layer-wise cap in gradient mode; None is off


class L2SpConfig(StrategyBase):
    """L2-SP: a quadratic anchor at the starting weights, all parameters alike."""

    type: Literal["l2sp"] = "l2sp"
    penalty_mode: Literal["implicit", "gradient"] = "gradient"

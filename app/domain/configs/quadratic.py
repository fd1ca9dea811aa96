"""The quadratic anchors."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from app.domain.configs.base import StrategyBase
from app.errors import BadRequest


class EwcConfig(StrategyBase):
    """Elastic weight consolidation: a quadratic anchor weighted by the Fisher information."""

    type: Literal["ewc"] = "ewc"
    penalty_mode: Literal["implicit", "gradient"] = "implicit"  # LoRA always uses the gradient
    fisher_type: Literal["true", "empirical"] = "true"
    fisher_estimator: Literal["batch", "document"] = "batch"  # what is squared; document is exact
    fisher_samples: int = Field(default=1024, ge=1, le=1_000_000)  # documents
    fisher_normalize: Literal["none", "mean", "max"] = "mean"
    fisher_clip: float = Field(default=0.999, gt=0, le=1)  # quantile; 1 is off
    anchor: Literal["base", "latest"] = "base"  # of the starting model's Fisher, in later stages
    online: bool = True  # finished stages are anchored, too
    gamma: float = Field(default=0.95, gt=0, le=1)  # decay of finished stages, a stage
    rho: float | None = Field(default=5.0, gt=1)  # layer-wise cap in gradient mode; None is off


class L2SpConfig(StrategyBase):
    """L2-SP: a quadratic anchor at the starting weights, all parameters alike."""

    type: Literal["l2sp"] = "l2sp"
    penalty_mode: Literal["implicit", "gradient"] = "gradient"


class SiConfig(StrategyBase):
    """Synaptic intelligence: a quadratic anchor weighted by what each weight did in the stages before."""

    type: Literal["si"] = "si"
    penalty_mode: Literal["implicit", "gradient"] = "implicit"
    xi: float = Field(default=1e-3, gt=0, le=1)  # squared weights; damps weights that hardly moved
    importance_normalize: Literal["none", "mean", "max"] = "mean"  # `none` is the paper's scale
    importance_clip: float = Field(default=0.999, gt=0, le=1)  # quantile; 1 is off
    rho: float | None = Field(default=5.0, gt=1)  # layer-wise cap in gradient mode; None is off


class MasConfig(StrategyBase):
    """Memory-aware synapses: a quadratic anchor weighted by how far each weight moves the logits."""

    type: Literal["mas"] = "mas"
    penalty_mode: Literal["implicit", "gradient"] = "implicit"  # LoRA always uses the gradient
    importance_samples: int = Field(default=1024, ge=1, le=1_000_000)  # documents
    importance_normalize: Literal["none", "mean", "max"] = "mean"
    importance_clip: float = Field(default=0.999, gt=0, le=1)  # quantile; 1 is off
    anchor: Literal["base", "latest"] = (
        "base"  # of the starting model's importance, in later stages
    )
    online: bool = True  # finished stages are anchored, too
    gamma: float = Field(default=1.0, gt=0, le=1)  # decay of finished stages, a stage
    rho: float | None = Field(default=5.0, gt=1)  # layer-wise cap in gradient mode; None is off


def check_quadratic(strategies: Iterable[StrategyBase], *, lora: bool, num_stages: int) -> None:
    """Refuses an anchor that could do nothing in the job; for submit.

    Raises:
        BadRequest: `si` on an adapter, or in a job of one stage.
    """
    for place, config in enumerate(strategies):
        if not isinstance(config, SiConfig):
            continue
        path = f"retention.strategies.{place}"
        if lora:
            raise BadRequest(
                f"{path}: 'si' needs full fine-tuning: what an adapter's entries did is no property of the"
                " function (the same change has many factors), and the adapted weights themselves get no"
                " gradient. Use 'ewc' or 'mas', which are on the effective weights.",
                path,
            )
        if num_stages < 2:
            raise BadRequest(
                f"{path}: 'si' protects finished stages from the next ones, and this job has one stage; to"
                " protect the base model use 'ewc', 'mas' or 'l2sp'.",
                path,
            )

"""The optimiser of a job, with decay of its own, and what can't go with it."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from app.domain.configs.base import StrategyBase
from app.errors import BadRequest


class HybridOptimizerConfig(StrategyBase):
    """The optimiser with decoupled decay per group of weights; `strength` multiplies both decays.

    The optimiser, its numbers, `trust_ratio`, `layer_decay` and `lora_plus_ratio` are in force at any
    strength, 0 included: they say how the weights move, not how far they may go.
    """

    type: Literal["hybrid_optimizer"] = "hybrid_optimizer"
    optimizer: Literal["adamw", "radam", "sgd", "adafactor"] = "adamw"
    beta1: float = Field(default=0.9, ge=0, lt=1)  # of adamw and radam
    beta2: float = Field(default=0.999, ge=0, lt=1)  # of adamw and radam
    epsilon: float = Field(default=1e-8, gt=0, le=1)  # of adamw and radam
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of sgd
    wd_backbone: float = Field(default=1e-5, ge=0, le=1)  # of matrices, embeddings and heads
    wd_adapter: float = Field(default=1e-3, ge=0, le=1)  # of LoRA factors
    decay_anchor: Literal["auto", "zero", "pretrained"] = "auto"
    decay_mode: Literal["lr_scaled", "lr_free"] = (
        "lr_scaled"  # times the rate, or the schedule alone
    )
    force: bool = False  # lets lr_free shrink by more than half in all
    importance: Literal["none", "gradient_ema"] = "none"
    importance_decay: float = Field(default=0.99, ge=0, lt=1)  # of the average, per step
    trust_ratio: Literal["none", "lars", "lamb"] = "none"
    trust_coefficient: float = Field(default=1e-3, gt=0, le=1)  # of lars
    layer_decay: float = Field(
        default=1.0, gt=0, le=1
    )  # learning rate of each layer below the next
    lora_plus_ratio: float = Field(default=1.0, ge=1, le=64)  # rate of B over that of A

    @property
    def may_decay(self) -> bool:
        """Whether it decays weights, now or once the controller activates it."""
        return (self.wd_backbone > 0 or self.wd_adapter > 0) and (self.armed or self.strength != 0)


def check_hybrid_optimizer(
    strategies: Iterable[StrategyBase], *, lora: bool, weight_decay: float
) -> None:
    """Refuses what the strategy can't be combined with; for submit.

    Args:
        strategies: Those of the job.
        lora: Whether the job trains adapters.
        weight_decay: `training.weight_decay`.

    Raises:
        BadRequest: Weights would decay twice, or a layer-wise step is asked for on adapters.
    """
    for place, config in enumerate(strategies):
        if not isinstance(config, HybridOptimizerConfig):
            continue
        path = f"retention.strategies.{place}"
        if weight_decay > 0 and (config.may_decay or config.optimizer != "adamw"):
            raise BadRequest(
                "training.weight_decay: hybrid_optimizer decays the weights itself (wd_backbone,"
                " wd_adapter); leave weight_decay at 0, or they would decay twice.",
                "training.weight_decay",
                "conflicting_strategies",
            )
        if lora and config.trust_ratio != "none":
            raise BadRequest(
                f"{path}.trust_ratio: an adapter starts at zero, so a step as large as its own weights"
                " would hardly move it; leave it at 'none' with LoRA.",
                f"{path}.trust_ratio",
                "conflicting_strategies",
            )

"""Distillation from the model the job started from."""

from typing import Literal

from pydantic import Field

from app.domain.configs.base import StrategyBase


class DistillationConfig(StrategyBase):
    """Distillation of logits from the model the job started from."""

    type: Literal["distillation"] = "distillation"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0, le=100)
    beta: float = Field(default=0.5, gt=0, lt=1)  # of jsd
    jsd_rescale: bool = True
    on: tuple[Literal["domain", "general", "replay"], ...] | Literal["auto"] = "auto"
    general_ratio: float = Field(default=0.25, gt=0, le=4)  # general rows as a share of batch_size

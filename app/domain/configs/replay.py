"""Replay of general rows, of rows the base decoded, and of earlier domains' rows."""

from typing import Literal

from pydantic import Field, model_validator

from app.domain.configs.base import StrategyBase


class ReplayConfig(StrategyBase):
    """Rows of other data in the training mix; `strength` is the mix ratio."""

    type: Literal["replay"] = "replay"
    strength: float | None = Field(default=None, ge=0, le=1)  # rows added, as a share of batch_size
    source: Literal["general", "generated", "none"] = "general"  # none: earlier domains alone
    store_fraction: float = Field(default=0.05, gt=0, le=1)
    min_store_rows: int = Field(default=32, ge=1)
    weighting: Literal["tokens", "fixed"] = "tokens"
    sampling: Literal["quota", "uniform"] = "quota"  # over the general and earlier domains' rows

    domain_store_fraction: float = Field(default=0.0, ge=0, le=1)  # of each finished domain's rows

    der_alpha: float = Field(default=0.0, ge=0, le=100)  # of the stored distributions; 0: off
    der_beta: float = Field(default=1.0, ge=0, le=100)  # of the replayed labels
    der_temperature: float = Field(default=1.0, gt=0, le=100)
    top_k: int = Field(default=64, ge=1, le=65_536)  # tokens kept of each position

    generated_rows: int = Field(default=256, ge=1, le=100_000)
    generated_tokens: int = Field(default=64, ge=1, le=8192)  # new ones a row, at most
    generated_temperature: float = Field(default=1.0, gt=0, le=10)
    generated_prompts: Literal["prompt", "start"] = "start"

    @model_validator(mode="after")
    def _has_rows(self) -> "ReplayConfig":
        if self.source == "none" and self.domain_store_fraction == 0:
            raise ValueError(
                "source: 'none' replays earlier domains' rows alone, and domain_store_fraction keeps none"
            )
        return self

    @property
    def needs_general_rows(self) -> bool:
        """Whether it reads a file of general rows."""
        return self.source == "general"

    @property
    def keeps_domain_rows(self) -> bool:
        """Whether rows of a domain are trained on in a later one, or their prompts are continued and kept."""
        has_prompts = self.source == "generated" and self.generated_prompts == "prompt"
        return self.domain_store_fraction > 0 or has_prompts

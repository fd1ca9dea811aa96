"""The memory network."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import Field

from app.domain.configs.base import ModelKind, StrategyBase


class MemoryConfig(StrategyBase):
    """A store of representations of general rows and finished domains, and the rows it remembers in the mix."""

    type: Literal["memory"] = "memory"
    strength: float | None = Field(default=None, ge=0, le=0.5)  # rows added, a share of batch_size
    capacity: int = Field(default=10_000, ge=8, le=1_000_000)  # entries
    dim: int = Field(default=512, ge=8, le=8192)  # of a representation
    policy: Literal["quota_reservoir", "reservoir", "herding"] = "quota_reservoir"
    dup_threshold: float | None = Field(default=None, gt=0, le=1)  # cosine; None: by the encoder
    nll_quantile: float = Field(default=0.1, ge=0, lt=1)  # share of rows the base knows best
    fill_rows: int = Field(default=2048, ge=1, le=1_000_000)  # rows read of a finished domain
    encoder: str | None = Field(default=None, min_length=1, max_length=128)  # None: the base model
    general: bool = True  # general rows are remembered, too, from the first task on
    publish: Literal["ids", "texts", "none"] = "ids"  # what the artifact's index says of an entry

    model_kinds: ClassVar[Mapping[str, ModelKind]] = MappingProxyType({"encoder": "encoder"})

    @property
    def keeps_domain_rows(self) -> bool:
        """Entries are rows of finished domains, too."""
        return True

    def named_models(self) -> tuple[tuple[str, str], ...]:
        """The encoder, where it is not the base model itself."""
        return () if self.encoder is None else (("encoder", self.encoder),)

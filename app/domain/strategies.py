"""One typed configuration per mitigation strategy, discriminated by `type`.

`strength` is the coefficient of the strategy's card, in the card's units; None means the strategy's
default (`Card.default_strength`). `armed` prepares everything (anchor, Fisher) at strength 0, and lets
the controller activate it at that default.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from app.domain.frozen import Frozen


class StrategyBase(Frozen):
    """What every strategy has."""

    strength: float | None = Field(default=None, ge=0, le=1e9)
    armed: bool = False

    @model_validator(mode="after")
    def _armed_has_no_strength(self) -> "StrategyBase":
        if self.armed and self.strength:
            raise ValueError(
                "strength: leave it out or 0 when armed is true; activation uses the default"
            )
        return self


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


class ReplayConfig(StrategyBase):
    """Rows of general data in the training mix; `strength` is the mix ratio."""

    type: Literal["replay"] = "replay"
    strength: float | None = Field(default=None, ge=0, le=1)  # rows added, as a share of batch_size
    store_fraction: float = Field(default=0.05, gt=0, le=1)
    min_store_rows: int = Field(default=32, ge=1)


class DistillationConfig(StrategyBase):
    """Distillation of logits from the model the job started from."""

    type: Literal["distillation"] = "distillation"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0, le=100)
    beta: float = Field(default=0.5, gt=0, lt=1)  # of jsd
    jsd_rescale: bool = True
    on: tuple[Literal["domain", "general", "replay"], ...] | Literal["auto"] = "auto"
    general_ratio: float = Field(default=0.25, gt=0, le=4)  # general rows as a share of batch_size


StrategyConfig = Annotated[
    EwcConfig | L2SpConfig | ReplayConfig | DistillationConfig, Field(discriminator="type")
]


class Card(NamedTuple):
    """Facts about a strategy that the API, the controller and the planner share."""

    default_strength: float
    lora_default_strength: float
    cap: float | None  # highest strength the controller sets; None: 1000 x the initial one
    lever_rank: int  # the first present is the default lever
    needs_general_data: bool


CARDS: Mapping[str, Card] = MappingProxyType(
    {
        "ewc": Card(100.0, 0.1, None, 0, needs_general_data=True),
        "l2sp": Card(0.3, 0.1, None, 1, needs_general_data=False),
        "replay": Card(0.1, 0.1, 0.5, 2, needs_general_data=True),
        "distillation": Card(1.0, 1.0, None, 3, needs_general_data=True),
    }
)


def default_strength(strategy: str, *, lora: bool) -> float:
    """The strength a strategy gets when the job names none, and at which an armed one is activated."""
    card = CARDS[strategy]
    return card.lora_default_strength if lora else card.default_strength


def strength_in_force(config: StrategyConfig, *, lora: bool) -> float:
    """The strength at which a run starts: 0 when armed."""
    if config.armed:
        return 0.0
    if config.strength is None:
        return default_strength(config.type, lora=lora)
    return config.strength


def needs_general_data(config: StrategyConfig) -> bool:
    """Whether the strategy reads general rows (distillation on domain rows alone does not)."""
    if isinstance(config, DistillationConfig) and config.on == ("domain",):
        return False
    return CARDS[config.type].needs_general_data

"""The strategies a job may name, discriminated by `type`, and what is known of each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, NamedTuple

from pydantic import Field

from app.domain.configs.adapters import DomainAdaptersConfig
from app.domain.configs.causal import CausalConfig
from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.freeze import FreezeConfig
from app.domain.configs.hybrid import HybridOptimizerConfig
from app.domain.configs.memory import MemoryConfig
from app.domain.configs.meta import MamlProxConfig, ReptileConfig
from app.domain.configs.progressive import ProgressiveConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig, MasConfig, SiConfig
from app.domain.configs.replay import ReplayConfig

StrategyConfig = Annotated[
    DomainAdaptersConfig
    | CausalConfig
    | FreezeConfig
    | HybridOptimizerConfig
    | EwcConfig
    | MasConfig
    | SiConfig
    | MamlProxConfig
    | ReptileConfig
    | L2SpConfig
    | ReplayConfig
    | MemoryConfig
    | DistillationConfig
    | ProgressiveConfig,
    Field(discriminator="type"),
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
        "mas": Card(10.0, 0.1, None, 1, needs_general_data=True),
        "si": Card(100.0, 100.0, None, 2, needs_general_data=False),
        "l2sp": Card(0.3, 0.1, None, 3, needs_general_data=False),
        "replay": Card(0.1, 0.1, 0.5, 4, needs_general_data=True),
        "distillation": Card(1.0, 1.0, None, 5, needs_general_data=True),
        # The cap is the default: no lever, as more of it does not hold more.
        "maml_prox": Card(0.1, 0.1, 0.1, 40, needs_general_data=False),
        "reptile": Card(1.0, 1.0, 1.0, 41, needs_general_data=False),
        "domain_adapters": Card(1.0, 1.0, 100.0, 30, needs_general_data=False),
        "progressive": Card(1.0, 1.0, 1.0, 12, needs_general_data=True),
        "causal": Card(1.0, 1.0, 100.0, 40, needs_general_data=False),
        "memory": Card(0.1, 0.1, 0.5, 10, needs_general_data=False),
        "freeze": Card(0.5, 0.5, 0.9, 21, needs_general_data=False),
        "hybrid_optimizer": Card(1.0, 1.0, None, 20, needs_general_data=False),
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
    """Whether the strategy reads general rows: by its settings, else by its kind."""
    if isinstance(config, DistillationConfig | ReplayConfig):
        return config.needs_general_rows
    if isinstance(config, ProgressiveConfig):
        return config.reads_general_rows
    return CARDS[config.type].needs_general_data

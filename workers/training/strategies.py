"""From a strategy's configuration to the strategy."""

from collections.abc import Sequence
from typing import assert_never

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
from app.domain.strategies import StrategyConfig
from workers.strategies.base import Strategy

SHARED_FIELDS = {"type", "strength", "armed"}  # of every strategy; the run holds them


def build_strategies(configs: Sequence[StrategyConfig]) -> tuple[Strategy, ...]:
    """The strategies of a job, sorted by kind: the order of the list never matters."""
    return tuple(sorted((_build_strategy(config) for config in configs), key=lambda s: s.kind))


def _build_strategy(config: StrategyConfig) -> Strategy:  # noqa: C901, PLR0912 - one branch a strategy
    from workers.strategies.methods.causal import Causal
    from workers.strategies.methods.distillation import Distillation
    from workers.strategies.methods.domain_adapters import DomainAdapters
    from workers.strategies.methods.ewc import Ewc
    from workers.strategies.methods.freeze import Freeze
    from workers.strategies.methods.hybrid_optimizer import HybridOptimizer
    from workers.strategies.methods.l2sp import L2Sp
    from workers.strategies.methods.maml_prox import MamlProx
    from workers.strategies.methods.mas import Mas
    from workers.strategies.methods.memory import Memory
    from workers.strategies.methods.progressive import Progressive
    from workers.strategies.methods.replay import Replay
    from workers.strategies.methods.reptile import Reptile
    from workers.strategies.methods.si import Si

    match config:
        case EwcConfig():
            return Ewc(**config.model_dump(exclude=SHARED_FIELDS))
        case L2SpConfig():
            return L2Sp(**config.model_dump(exclude=SHARED_FIELDS))
        case MasConfig():
            return Mas(**config.model_dump(exclude=SHARED_FIELDS))
        case SiConfig():
            return Si(**config.model_dump(exclude=SHARED_FIELDS))
        case MamlProxConfig():
            return MamlProx(**config.model_dump(exclude=SHARED_FIELDS))
        case ReptileConfig():
            return Reptile(**config.model_dump(exclude=SHARED_FIELDS))
        case ReplayConfig():
            return Replay(**config.model_dump(exclude=SHARED_FIELDS))
        case MemoryConfig():
            return Memory(**config.model_dump(exclude=SHARED_FIELDS))
        case DistillationConfig():
            return Distillation(**config.model_dump(exclude=SHARED_FIELDS))
        case CausalConfig():
            return Causal(**config.model_dump(exclude=SHARED_FIELDS))
        case FreezeConfig():
            return Freeze(**config.model_dump(exclude=SHARED_FIELDS))
        case HybridOptimizerConfig():
            return HybridOptimizer(**config.model_dump(exclude=SHARED_FIELDS))
        case DomainAdaptersConfig():
            return DomainAdapters(**config.model_dump(exclude=SHARED_FIELDS))
        case ProgressiveConfig():
            return Progressive(**config.model_dump(exclude=SHARED_FIELDS))
        case _:
            assert_never(config)

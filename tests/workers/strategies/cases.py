"""Every strategy under the configurations that the generic oracles run over."""

from collections.abc import Callable
from typing import NamedTuple

from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.freeze import FreezeConfig
from app.domain.configs.hybrid import HybridOptimizerConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.strategies import StrategyConfig
from workers.strategies.base import Strategy
from workers.strategies.methods.distillation import Distillation
from workers.strategies.methods.ewc import Ewc
from workers.strategies.methods.freeze import Freeze
from workers.strategies.methods.hybrid_optimizer import HybridOptimizer
from workers.strategies.methods.l2sp import L2Sp
from workers.strategies.methods.replay import Replay

CLASSES: dict[str, Callable[..., Strategy]] = {
    "freeze": Freeze,
    "hybrid_optimizer": HybridOptimizer,
    "ewc": Ewc,
    "l2sp": L2Sp,
    "replay": Replay,
    "distillation": Distillation,
}


class Case(NamedTuple):
    """One strategy and what to expect of it.

    `effect_metric` is the metric that is above 0 once the strategy acts (G2); `only_loss` says that all it
    does is to add terms to the loss, so that its gradient adds up (G6). `num_blocks` gives the tiny model a
    stack of layers, for strategies that tell them apart.
    """

    name: str
    config: StrategyConfig
    effect_metric: str
    only_loss: bool
    num_blocks: int = 0

    @property
    def kind(self) -> str:
        return self.config.type

    @property
    def strength(self) -> float:
        """Large enough to show within a few steps of a tiny model."""
        return float(self.config.strength or 0.0)

    def make(self) -> Strategy:
        """The strategy, built from the scalars of its configuration: their names agree."""
        return CLASSES[self.kind](**self.config.model_dump(exclude={"type", "strength", "armed"}))


CASES = (
    Case("ewc-implicit", EwcConfig(strength=100.0, fisher_samples=16), "applied_norm", False),
    Case(
        "ewc-gradient",
        EwcConfig(strength=10.0, penalty_mode="gradient", fisher_samples=16),
        "applied_norm",
        False,
    ),
    Case(
        "ewc-empirical",
        EwcConfig(
            strength=100.0, fisher_type="empirical", fisher_samples=16, fisher_normalize="max"
        ),
        "applied_norm",
        False,
    ),
    Case("l2sp-implicit", L2SpConfig(strength=3.0, penalty_mode="implicit"), "applied_norm", False),
    Case("l2sp-gradient", L2SpConfig(strength=0.3), "applied_norm", False),
    Case(
        "replay", ReplayConfig(strength=0.25, store_fraction=0.25, min_store_rows=4), "rows", False
    ),
    Case("distillation", DistillationConfig(strength=1.0), "applied_norm", True),
    Case(
        "distillation-jsd",
        DistillationConfig(
            strength=2.0, divergence="jsd", beta=0.3, temperature=2.0, on=("domain", "general")
        ),
        "applied_norm",
        True,
    ),
    Case(
        "distillation-reverse",
        DistillationConfig(strength=1.0, divergence="reverse_kl", on=("domain",)),
        "applied_norm",
        True,
    ),
    Case(
        "hybrid-optimizer",
        HybridOptimizerConfig(strength=2.0, wd_backbone=0.1, wd_adapter=0.2),
        "applied_norm",
        False,
    ),
    Case(
        "hybrid-optimizer-free",
        HybridOptimizerConfig(
            strength=1.0,
            wd_backbone=0.01,
            wd_adapter=0.01,
            decay_mode="lr_free",
            decay_anchor="pretrained",
            importance="gradient_ema",
        ),
        "applied_norm",
        False,
    ),
    Case("freeze", FreezeConfig(strength=0.7), "frozen_parameters", False, num_blocks=3),
)
CASE_IDS = tuple(case.name for case in CASES)

"""Every strategy under the configurations that the generic oracles run over."""

from collections.abc import Callable
from typing import NamedTuple

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

CLASSES: dict[str, Callable[..., Strategy]] = {
    "domain_adapters": DomainAdapters,
    "causal": Causal,
    "freeze": Freeze,
    "hybrid_optimizer": HybridOptimizer,
    "ewc": Ewc,
    "l2sp": L2Sp,
    "maml_prox": MamlProx,
    "mas": Mas,
    "reptile": Reptile,
    "si": Si,
    "progressive": Progressive,
    "memory": Memory,
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
    task_index: int = 0  # 1 where a strategy acts on what an earlier task left
    boundary: int = 0  # steps of a first task, for a strategy that acts once a task has ended
    no_adapters: str = ""  # why it refuses a run that trains adapters

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
    Case(
        "causal-consistency",
        CausalConfig(strength=1.0, consistency_coef=1.0, cf_fraction=0.6, vrex_beta=0.0),
        "applied_norm",
        True,
    ),
    Case(
        "causal-answers",
        CausalConfig(
            strength=1.0,
            consistency_coef=1.0,
            consistency="answer_kl",
            cf_fraction=0.6,
            vrex_beta=0.0,
        ),
        "applied_norm",
        True,
    ),
    Case(
        "causal-risks",
        CausalConfig(strength=5.0, consistency_coef=0.2, irm_lambda=2.0, min_rows_per_env=2),
        "applied_norm",
        True,
    ),
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
    Case(
        "progressive-cone",
        ProgressiveConfig(
            mode="cone", strength=0.999, warmup_ref_steps=1, curriculum="none", mix_start=None
        ),
        "applied_norm",
        False,
    ),
    Case(
        "progressive-cone-global",
        ProgressiveConfig(
            mode="cone", reference="general", scope="global", ref_refresh=2, ref_rows=8
        ),
        "applied_norm",
        False,
    ),
    Case(
        "progressive-gpm",
        ProgressiveConfig(
            mode="gpm", strength=1.0, gpm_threshold=0.8, gpm_rows=16, curriculum="length"
        ),
        "applied_norm",
        False,
    ),
    Case(
        "progressive-none",
        ProgressiveConfig(mode="none", strength=1.0, curriculum="nll"),
        "held_back",
        False,
    ),
    Case(
        "progressive-a-gem",
        ProgressiveConfig(strength=1.0, ref_refresh=1, ref_rows=8, mix_start=None),
        "held_back",
        False,
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
        "distillation-hidden",
        DistillationConfig(strength=1.0, on=("general",), hidden_coef=0.5, hidden_layers=(0, 1)),
        "hidden",
        True,
    ),
    Case(
        "distillation-cached",
        DistillationConfig(strength=1.0, teacher="cached", top_k=4, temperature=2.0),
        "applied_norm",
        True,
    ),
    Case(
        "distillation-generated",
        DistillationConfig(
            strength=1.0,
            on=("generated",),
            every=2,
            generated_rows=6,
            generated_tokens=3,
            generate_every=4,
        ),
        "applied_norm",
        True,
    ),
    Case(
        "replay-der",
        ReplayConfig(strength=0.5, der_alpha=0.5, der_beta=0.5, top_k=3, min_store_rows=4),
        "der_nats",
        False,
    ),
    Case(
        "replay-fixed",
        ReplayConfig(strength=0.5, weighting="fixed", der_beta=0.7, min_store_rows=4),
        "rows",
        False,
    ),
    Case(
        "replay-generated",
        ReplayConfig(strength=0.5, source="generated", generated_rows=5, generated_tokens=4),
        "rows",
        False,
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
    Case("memory", MemoryConfig(strength=0.25, dim=11, capacity=12), "rows", False),
    Case(
        "memory-herding",
        MemoryConfig(strength=0.5, dim=11, capacity=8, policy="herding", nll_quantile=0.2),
        "rows",
        False,
    ),
    Case("mas-implicit", MasConfig(strength=100.0, importance_samples=16), "applied_norm", False),
    Case(
        "mas-gradient",
        MasConfig(strength=10.0, penalty_mode="gradient", importance_samples=16),
        "applied_norm",
        False,
    ),
    Case(
        "ewc-sequence",
        EwcConfig(strength=100.0, fisher_samples=16, fisher_estimator="document"),
        "applied_norm",
        False,
        boundary=1,
    ),
    Case(
        "ewc-latest",
        EwcConfig(strength=100.0, fisher_samples=16, anchor="latest"),
        "applied_norm",
        False,
        boundary=1,
    ),
    Case(
        "si-implicit",
        SiConfig(strength=100.0),
        "applied_norm",
        False,
        boundary=1,
        no_adapters="the entries of an adapter have no path of their own",
    ),
    Case(
        "si-gradient",
        SiConfig(strength=10.0, penalty_mode="gradient"),
        "applied_norm",
        False,
        boundary=1,
        no_adapters="the entries of an adapter have no path of their own",
    ),
    Case("maml_prox", MamlProxConfig(strength=0.5, inner_lr=0.05), "applied_norm", False),
    Case("reptile", ReptileConfig(strength=1.0, inner_lr=0.05), "applied_norm", False),
    Case("freeze", FreezeConfig(strength=0.7), "frozen_parameters", False, num_blocks=3),
    Case(
        "domain_adapters",
        DomainAdaptersConfig(strength=3.0),
        "applied_norm",
        False,
        task_index=1,
    ),
    Case(
        "domain_adapters-hard",
        DomainAdaptersConfig(strength=1.0, orthogonality="hard"),
        "applied_norm",
        False,
        task_index=1,
    ),
)
CASE_IDS = tuple(case.name for case in CASES)

"""What each strategy costs besides plain training, by its configuration alone; a test holds it to the workers' words."""

from functools import singledispatch
from typing import Final

from app.domain.configs.adapters import DomainAdaptersConfig
from app.domain.configs.base import StrategyBase
from app.domain.configs.causal import CausalConfig
from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.hybrid import HybridOptimizerConfig
from app.domain.configs.memory import MemoryConfig
from app.domain.configs.meta import MamlProxConfig, ReptileConfig
from app.domain.configs.progressive import ProgressiveConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig, MasConfig, SiConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.frozen import Frozen
from app.domain.strategies import StrategyConfig, default_strength, strength_in_force

#: A forward is a third of a step of full training.
FORWARD: Final = 1 / 3
#: A pass over the trained parameters in each step.
LIGHT: Final = 0.02


class ExtraCost(Frozen):
    """Of one strategy. Shares are of a plain step; rows a step are shares of the batch."""

    light_share: float = 0.0  # passes over parameters
    added_rows: float = 0.0  # read forward and backward in each step besides the batch
    taught_rows: float = 0.0  # read by the teacher in each step
    reread_rows: float = 0.0  # of the step's own rows, read again or by further gradients
    trainable_copies: float = 0.0  # float32 tensors as large as what is trained
    model_copies: float = 0.0  # a teacher beside a model that is trained whole
    trained_once: int = 0  # rows read forward and backward once, before training
    read_once: int = 0  # rows read forward once
    decoded_once: int = 0  # tokens decoded once
    needs_general: bool = False  # what is read once are general rows, and no more than there are
    keeps_factors: bool = (
        False  # with adapters its state is rows and columns, which is next to nothing
    )

    @property
    def step_share(self) -> float:
        """Extra time of a step, as a share of a plain one."""
        return self.light_share + self.added_rows + self.taught_rows * FORWARD + self.reread_rows


def extra_cost(config: StrategyConfig, *, lora: bool) -> ExtraCost:
    """What a strategy costs at the strength at which it starts; armed ones as if they were activated."""
    strength = strength_in_force(config, lora=lora)
    if config.armed:
        strength = default_strength(config.type, lora=lora)
    return _cost(config.model_copy(update={"strength": strength, "armed": False}))


def strategy_memory(cost: ExtraCost, *, trained: int, model_bytes: int, lora: bool) -> int:
    """Bytes that a strategy keeps on the device.

    Args:
        cost: Its own.
        trained: Parameters that the run trains.
        model_bytes: Of the base model's weights as a teacher holds them.
        lora: Adapters are switched off to have the teacher, and anchors are factors.
    """
    copies = 0.0 if lora and cost.keeps_factors else cost.trainable_copies
    teacher = 0.0 if lora else cost.model_copies * model_bytes
    return int(4 * copies * trained + teacher)


@singledispatch
def _cost(_config: StrategyBase) -> ExtraCost:
    """Nothing: what is frozen saves."""
    return ExtraCost()


@_cost.register
def _(config: EwcConfig) -> ExtraCost:
    return ExtraCost(
        light_share=LIGHT,
        trainable_copies=2.0,
        trained_once=config.fisher_samples,
        needs_general=True,
        keeps_factors=True,
    )


@_cost.register
def _(config: MasConfig) -> ExtraCost:
    return ExtraCost(
        light_share=LIGHT,
        trainable_copies=2.0,
        trained_once=config.importance_samples,
        needs_general=True,
        keeps_factors=True,
    )


@_cost.register
def _(_config: SiConfig) -> ExtraCost:
    return ExtraCost(light_share=0.05, trainable_copies=6.0)


@_cost.register
def _(_config: L2SpConfig) -> ExtraCost:
    return ExtraCost(light_share=LIGHT, trainable_copies=1.0, keeps_factors=True)


@_cost.register
def _(config: DistillationConfig) -> ExtraCost:
    sources = {"replay", "general"} if config.on == "auto" else set(config.on)
    is_cached = config.teacher == "cached"
    added = config.general_ratio * len(sources & {"general", "generated"}) / config.every
    domain = 1.0 / config.every if "domain" in sources else 0.0
    generated = "generated" in sources
    return ExtraCost(
        added_rows=added,
        taught_rows=0.0 if is_cached else added + domain,
        model_copies=0.0 if is_cached else 1.0,
        read_once=config.cache_rows if is_cached else 0,
        decoded_once=config.generated_rows * config.generated_tokens if generated else 0,
        needs_general=is_cached,
    )


@_cost.register
def _(config: ReplayConfig) -> ExtraCost:
    decoded = config.generated_rows * config.generated_tokens
    return ExtraCost(
        added_rows=(config.strength or 0.0) if config.source != "none" else 0.0,
        decoded_once=decoded if config.source == "generated" else 0,
    )


@_cost.register
def _(config: MemoryConfig) -> ExtraCost:
    return ExtraCost(
        added_rows=(config.strength or 0.0) if config.general else 0.0,
        read_once=2 * config.fill_rows if config.general else 0,
        needs_general=True,
    )


@_cost.register
def _(config: ProgressiveConfig) -> ExtraCost:
    reads = config.reference == "general" or (config.mode == "a_gem")
    mixed = 0.0
    if config.mix_start is not None:
        paced = config.curriculum_steps
        share = paced * (config.mix_start + config.mix_end) / 2 + (1 - paced) * config.mix_end
        mixed = share / (1 - share)
    copies = {"cone": 3.0, "a_gem": 1.0, "gpm": 1.0, "none": 0.0}[config.mode]
    return ExtraCost(
        added_rows=mixed,
        reread_rows=1.0 / config.ref_refresh if reads else 0.0,
        trainable_copies=copies + float(config.record_trajectory),
        read_once=config.gpm_rows if config.mode == "gpm" else 0,
        needs_general=True,
    )


@_cost.register
def _(config: MamlProxConfig) -> ExtraCost:
    passes = (1 - config.query_share) * config.inner_steps + config.query_share
    return ExtraCost(reread_rows=max(passes - 1, 0.0), trainable_copies=1.0)


@_cost.register
def _(_config: ReptileConfig) -> ExtraCost:
    return ExtraCost(light_share=0.5, trainable_copies=2.0)


@_cost.register
def _(config: CausalConfig) -> ExtraCost:
    compares = config.vrex_beta > 0 or config.irm_lambda > 0 or config.coral_coef > 0
    general = config.general_ratio if compares else 0.0
    pairs = config.cf_fraction if config.consistency_coef > 0 else 0.0
    return ExtraCost(
        added_rows=pairs + general, reread_rows=(1 + general) * FORWARD if compares else 0.0
    )


@_cost.register
def _(config: HybridOptimizerConfig) -> ExtraCost:
    copies = (
        (config.decay_anchor != "zero")
        + (config.importance != "none")
        + (config.trust_ratio != "none")
    )
    return ExtraCost(light_share=LIGHT * (1 + copies), trainable_copies=float(copies))


@_cost.register
def _(_config: DomainAdaptersConfig) -> ExtraCost:
    return ExtraCost(light_share=LIGHT)

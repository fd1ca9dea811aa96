"""What strategies can't be combined with, each other included; refused at submit with the reason."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from app.domain.configs.adapters import DomainAdaptersConfig, find_adapter_problem
from app.domain.configs.causal import CausalConfig
from app.domain.configs.hybrid import HybridOptimizerConfig, check_hybrid_optimizer
from app.domain.configs.progressive import ProgressiveConfig
from app.domain.configs.quadratic import check_quadratic
from app.domain.strategies import StrategyConfig
from app.errors import BadRequest


class Surroundings(NamedTuple):
    """What of a job decides whether a strategy can be."""

    lora: bool
    late_adapter: bool  # full fine-tuning that ends with an adapter
    no_rows_kept: bool
    num_parameters: int | None
    weight_decay: float
    stage_names: tuple[str, ...]
    compares: bool = False  # two answers a row: direct preference optimisation


def _is(*kinds: str) -> Callable[[StrategyConfig], bool]:
    return lambda config: config.type in kinds


def _is_cone(config: StrategyConfig) -> bool:
    return isinstance(config, ProgressiveConfig) and config.mode == "cone"


def _is_gpm(config: StrategyConfig) -> bool:
    return isinstance(config, ProgressiveConfig) and config.mode == "gpm"


def _compares_environments(config: StrategyConfig) -> bool:
    return isinstance(config, CausalConfig) and bool(
        config.vrex_beta or config.irm_lambda or config.coral_coef
    )


def _has_trust_ratio(config: StrategyConfig) -> bool:
    return isinstance(config, HybridOptimizerConfig) and config.trust_ratio != "none"


def _is_implicit_pull(config: StrategyConfig) -> bool:
    return getattr(config, "penalty_mode", None) == "implicit"


def _is_bottleneck(config: StrategyConfig) -> bool:
    return isinstance(config, DomainAdaptersConfig) and config.kind == "bottleneck"


Test = Callable[[StrategyConfig], bool]

#: What needs rows that show an answer, and why.
NEEDS_ANSWERS: Final[tuple[tuple[Test, str], ...]] = (
    (
        _is("maml_prox", "reptile"),
        "its inner loop reads a step row by row, and the two answers of a pair have to be read together",
    ),
    (
        _is("causal"),
        "it compares the cross-entropies and states of rows that show an answer, and a pair has none;"
        " run it in a job of method.type 'supervised'",
    ),
)

#: Two of a job that can't go together, and why.
CLASHES: Final[tuple[tuple[Test, Test, str], ...]] = (
    (
        _is("maml_prox"),
        _is("reptile"),
        "each of them decides where the step's gradients are taken",
    ),
    (
        _is("maml_prox", "reptile"),
        _compares_environments,
        "the environments of a step are compared as a whole, and an inner loop reads the step in parts;"
        " leave out vrex_beta, irm_lambda and coral_coef",
    ),
    (
        _is("reptile"),
        _is_cone,
        "the cone holds the optimiser's step, and the way of the inner loop leaves it; take mode 'a_gem'",
    ),
    (
        _is("domain_adapters"),
        _is_gpm,
        "each stage begins a new adapter, which has read nothing yet; domain_adapters' own orthogonality"
        " keeps it off what earlier ones read",
    ),
    (
        _is("domain_adapters"),
        _is("freeze"),
        "domain_adapters freezes the whole base already; choose training.lora.target_modules instead",
    ),
    (
        _is_bottleneck,
        _is("ewc", "mas", "si", "l2sp", "progressive"),
        "a bottleneck adapter changes no weight of the base, so there is nothing of the base to hold;"
        " take kind 'lora'",
    ),
    (
        _has_trust_ratio,
        _is_implicit_pull,
        "a layer-wise step would rescale the pull that an implicit penalty has just made; take"
        " penalty_mode 'gradient'",
    ),
)


def check_conflicts(strategies: Sequence[StrategyConfig], job: Surroundings) -> None:
    """Refuses a combination that can't be.

    Raises:
        BadRequest: `param` names the later of the two, `conflicting_strategies` says why.
    """
    for first, second, why in CLASHES:
        ones = [place for place, config in enumerate(strategies) if first(config)]
        others = [place for place, config in enumerate(strategies) if second(config)]
        if ones and others:
            later, earlier = max(ones[0], others[0]), min(ones[0], others[0])
            _refuse(
                f"retention.strategies.{later}",
                f"'{strategies[later].type}' and '{strategies[earlier].type}': {why}.",
            )
    check_hybrid_optimizer(strategies, lora=job.lora, weight_decay=job.weight_decay)
    check_quadratic(strategies, lora=job.lora, num_stages=max(len(job.stage_names), 1))
    for place, config in enumerate(strategies):
        path = f"retention.strategies.{place}"
        if job.no_rows_kept and config.keeps_domain_rows:
            _refuse(
                path,
                f"'{config.type}' keeps rows of the domain, and retention.privacy is 'no_rows_kept'.",
            )
        for is_meant, why in NEEDS_ANSWERS:
            if job.compares and is_meant(config):
                _refuse(path, f"'{config.type}' can't go with method.type 'dpo': {why}.")
        if isinstance(config, DomainAdaptersConfig):
            _check_adapters(config, path, job)


def _check_adapters(config: DomainAdaptersConfig, path: str, job: Surroundings) -> None:
    problem = find_adapter_problem(
        config,
        lora=job.lora,
        num_parameters=job.num_parameters,
        stage_names=job.stage_names,
    )
    if problem is not None:
        field, what = problem
        _refuse("stages" if field == "stages" else f"{path}.{field}", f"{what}.")


def _refuse(param: str, what: str) -> None:
    raise BadRequest(f"{param}: {what}", param, "conflicting_strategies")

"""What strategies can't be combined with, each other included; refused at submit with the reason."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from app.domain.configs.adapters import DomainAdaptersConfig, find_adapter_problem
from app.domain.configs.hybrid import check_hybrid_optimizer
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


#: Pairs of types, and why not both.
PAIRS: Final[dict[frozenset[str], str]] = {
    frozenset(
        {"maml_prox", "reptile"}
    ): "each of them decides where the step's gradients are taken",
    frozenset({"domain_adapters", "freeze"}): (
        "domain_adapters freezes the whole base already, and an adapter whose lower layers stand still is"
        " one of fewer layers: choose target_modules instead"
    ),
}


def check_conflicts(strategies: Sequence[StrategyConfig], job: Surroundings) -> None:
    """Refuses a combination that can't be.

    Raises:
        BadRequest: `param` names the later of the two, `conflicting_strategies` says why.
    """
    places: dict[str, int] = {config.type: place for place, config in enumerate(strategies)}
    for pair, why in PAIRS.items():
        if pair <= places.keys():
            first, second = sorted(pair, key=lambda kind: places[kind])
            _refuse(f"retention.strategies.{places[second]}", f"'{second}' and '{first}': {why}.")
    check_hybrid_optimizer(strategies, lora=job.lora, weight_decay=job.weight_decay)
    check_quadratic(strategies, lora=job.lora, num_stages=max(len(job.stage_names), 1))
    for place, config in enumerate(strategies):
        path = f"retention.strategies.{place}"
        if job.no_rows_kept and config.keeps_domain_rows:
            _refuse(
                path,
                f"'{config.type}' keeps rows of the domain, and retention.privacy is 'no_rows_kept'.",
            )
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

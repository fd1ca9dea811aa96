"""The retention policy: what is watched, how large a drop is tolerated, how to react."""

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from app.domain.frozen import Frozen
from app.domain.strategies import StrategyConfig


class WatchedBenchmark(Frozen):
    """A benchmark a job watches; names a version as `name` (latest) or `name@3`."""

    name: str = Field(min_length=1, max_length=128)
    weight: float = Field(default=1.0, gt=0, le=1e6)
    max_drop: float | None = Field(default=None, gt=0, lt=1)  # own relative limit, Holm-corrected
    expect: Literal["hold", "rise"] = "hold"  # `rise`: the report set must show a gain as well
    min_gain: float | None = Field(
        default=None, ge=0, le=100
    )  # of the mean score, of `nll` in nats per token; None: 0

    @model_validator(mode="after")
    def _only_what_rises_gains(self) -> "WatchedBenchmark":
        if self.min_gain is not None and self.expect != "rise":
            raise ValueError("min_gain: only a benchmark with `expect: rise` has one")
        return self


VALID_LOSS: Final = "valid_loss"


class EarlyStopping(Frozen):
    """Stops when `metric` has not improved for `patience` evaluations.

    `metric` is the validation cross-entropy, or a benchmark that the job watches (`name` or `name@3`) of either kind;
    which way is better follows from its scorer, and `min_delta` is in its units: score points, of `nll` nats per
    token. Results from outside count where they hold every item that the job itself is measured on. Which
    checkpoint is published does not depend on it.
    """

    enabled: bool = True
    metric: str = Field(default=VALID_LOSS, min_length=1, max_length=140)
    patience: int = Field(default=5, ge=1, le=1000)
    min_delta: float = Field(default=0.0, ge=0)
    warmup_evals: int = Field(default=1, ge=0)


class Ladder(Frozen):
    """What the controller tries on a regression, in this order."""

    repair: bool = True
    raise_factor: float = Field(default=2.0, gt=1, le=1000)
    max_raises: int = Field(default=2, ge=0, le=100)  # in a row, one evaluation apart
    learning_rate_factor: float = Field(
        default=0.5, gt=0, le=1
    )  # once, when raises did not shrink the drop
    rollback_strength_factor: float = Field(default=4.0, ge=1, le=1000)
    rollback_learning_rate_factor: float = Field(default=0.5, gt=0, le=1)
    max_rollbacks: int = Field(default=5, ge=0, le=100)
    strength_cap_factor: float = Field(default=1000.0, ge=1)
    lower_factor: float = Field(default=0.9, gt=0, le=1)  # of lower_strength; 1 never lowers
    lower_below: float = Field(
        default=2 / 3, gt=0, le=1
    )  # share of each limit that the 95 % upper bounds must stay under
    cool_down_evals: int = Field(
        default=1, ge=0, le=100
    )  # evaluations after a change before a strength may be lowered


class Dual(Frozen):
    """The law of the `dual` controller: log strength moves by `kappa` times the smoothed (drop / aim - 1)."""

    kappa: float = Field(default=0.5, gt=0, le=10)
    smoothing: float = Field(default=0.5, gt=0, le=1)  # weight of the newest evaluation
    max_factor: float = Field(default=2.0, gt=1, le=1000)  # of one evaluation, either way
    headroom: float = Field(
        default=1.0, ge=0, le=10
    )  # widths of the 95 % upper bound that the aim lies under the limit, at most half the limit
    deadzone: float = Field(default=0.4, ge=0, lt=1)  # share under the aim where nothing is lowered
    floor: float = Field(
        default=1.0, ge=0, le=1
    )  # lowest strength, as a share of the one asked for
    futile_factor: float = Field(
        default=8.0, gt=1, le=1e6
    )  # strength gained on estimates alone, without effect, after which it is held


class Policy(Frozen):
    """How a job's general ability is guarded."""

    benchmarks: tuple[WatchedBenchmark, ...] | None = Field(default=None, max_length=64)
    max_drop: float = Field(default=0.03, gt=0, lt=1)  # relative drop of the weighted general mean
    max_nll_increase: float = Field(default=0.05, gt=0)  # nats per token, each NLL benchmark
    eval_interval: Literal["epoch"] | int | None = (
        None  # steps; None: the evaluation budget chooses
    )
    gate_items: int | None = Field(
        default=None, ge=10, le=1_000_000
    )  # a benchmark; None: 1,000, or what the budget chooses
    eval_budget: float = Field(
        default=0.1, gt=0, le=10
    )  # evaluation time as a share of training time
    controller: Literal["deadband", "dual"] = "deadband"
    dual: Dual = Dual()  # of the controller `dual` alone
    lever: str | None = None  # type of the strategy that is turned; None: by rank
    ladder: Ladder = Ladder()
    early_stopping: EarlyStopping = EarlyStopping()
    on_inconclusive: Literal["publish", "refuse"] = "publish"
    on_no_gain: Literal["publish", "refuse"] = "publish"  # a benchmark that must rise has not
    diagnosis: bool = Field(
        default=True,
        description="On a confirmed regression a handful of replay steps are tried on a throw-away copy of the"
        " weights; what they bring back says whether format or knowledge was lost, and orders the ladder. Needs"
        " general data; it costs time on a regression alone.",
    )
    dry_run: bool = False  # decisions are recorded as proposals and change nothing


class Retention(Frozen):
    """The `retention` object of a job."""

    strategies: tuple[StrategyConfig, ...] | Literal["auto"] = "auto"
    policy: Policy = Policy()
    privacy: Literal["any", "no_rows_kept"] = "any"  # the latter: no strategy keeps domain rows
    merge_back: Annotated[float, Field(ge=0, lt=1)] | Literal["search"] | None = (
        None  # how far the published weights go back to the base; `search`: as far as helps
    )
    shift_report: bool = False  # measure the shift between domain and general rows at the end
    general_data: str | None = None  # id of a file of training rows; None: the base model's own

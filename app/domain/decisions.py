"""What the sensor says and what the controller does, as values that are stored and replayed."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from app.domain.frozen import Frozen


class Verdict(StrEnum):
    """Of the relative drop of the weighted general mean, and of every limit together."""

    REGRESS = "regress"
    PASS = "pass"  # noqa: S105 - a verdict, no secret
    INCONCLUSIVE = "inconclusive"
    NO_DATA = "no_data"
    AT_FLOOR = "at_floor"


class Action(StrEnum):
    """What the controller did."""

    KEEP = "keep"
    RAISE_STRENGTH = "raise_strength"
    LOWER_STRENGTH = "lower_strength"
    LOWER_LEARNING_RATE = "lower_learning_rate"
    REPAIR = "repair"
    ROLL_BACK = "roll_back"
    STOP = "stop"


class BenchmarkReading(Frozen):
    """One benchmark of one look, paired with the baseline on the same items.

    For accuracies `drop` is relative; for `nll` it is the rise in nats per token. Bounds are one-sided:
    `lower` at the alpha this hypothesis was given by Holm's procedure, `upper` at 95 %.
    """

    name: str
    benchmark_version_id: str
    scorer: str
    weight: float
    n_items: int
    paired: bool = True
    baseline: float | None
    value: float | None
    drop: float | None
    lower: float | None
    upper: float | None
    limit: float | None  # None: only the mean is limited
    p_regress: float | None  # of H0 drop <= limit
    verdict: Verdict
    stderr: float | None = None
    mcnemar_p: float | None = (
        None  # exact, two-sided; reported, never a gate; None where scores are shares
    )


class GainReading(Frozen):
    """One benchmark that must rise: its gain in score points, of `nll` in nats per token."""

    name: str
    n_items: int
    baseline: float | None = None
    value: float | None = None
    gain: float | None = None
    lower: float | None = None  # one-sided 95 %
    min_gain: float
    has_risen: bool  # the lower bound is above `min_gain`


class Reading(Frozen):
    """One look of the sensor: the mean, its interval and every benchmark."""

    look: int  # k, counts distinct evaluation points of the job over all branches, from 1
    alpha: float
    drop: float | None
    stderr: float | None
    lower: float | None  # one-sided, at the alpha Holm gave the mean
    upper: float | None  # one-sided 95 %
    limit: float
    p_regress: float | None
    verdict: Verdict
    severe: bool  # some lower bound is above twice its limit
    not_finite: bool = False
    benchmarks: tuple[BenchmarkReading, ...] = ()
    gains: tuple[GainReading, ...] = ()  # of the report set alone


class Damage(StrEnum):
    """What kind of ability a regression cost."""

    FORMAT = "format"  # shallow: a few replay steps bring it back on items they never saw
    KNOWLEDGE = "knowledge"  # they do not: it has to be kept, or fetched back
    UNCLEAR = "unclear"


class Diagnosis(Frozen):
    """What a handful of replay steps, taken on a throw-away copy of the weights, brought back of a drop.

    `share` is 0 where nothing came back and 1 where all did, on gate items that overlap no replay row, each item
    paired with itself before and after; bounds are one-sided 95 %. `reason` says why there are no numbers.
    """

    reason: str | None = None
    benchmarks: tuple[str, ...] = ()  # whose items were scored again
    n_items: int = 0
    drop: float | None = None  # on those items, in limits
    share: float | None = None
    lower: float | None = None
    upper: float | None = None
    steps: int = 0
    rows: int = 0  # read by these steps
    rate: float | None = None  # of them, as a multiple of the job's learning rate
    held_before: float | None = None  # nats per token of other general rows, before the steps
    held_after: float | None = None
    seconds: float = 0.0


class LeverState(Frozen):
    """One strategy the controller may turn."""

    strategy: str
    asked: float  # the strength the job asked for; lower_strength never goes below
    default: float  # where an armed one is activated, and what caps count from then
    cap: float
    armed: bool = False


class ControllerState(Frozen):
    """The coefficients in force, and what the ladder has used up; follows from the decision history."""

    strengths: dict[str, float]
    learning_rate_scale: float = 1.0
    branch: int = 0
    rollbacks: int = 0
    raises_in_a_row: int = 0
    excess_before_raise: float | None = (
        None  # worst estimate as a multiple of its limit, at the latest raise
    )
    repaired: bool = False  # since the last pass or rollback
    learning_rate_lowered: bool = False  # once in a job, by the rung after useless raises
    cool_down: int = 0  # evaluations to go before a strength may be lowered
    could_not_hold: bool = False
    best_valid_loss: float | None = None
    evals_without_improvement: int = 0
    evals: int = 0
    best_scores: tuple[tuple[int, float], ...] = ()  # (step, value) where the benchmark that early
    # stopping watches became better than ever; a rollback drops those after its target
    excess_smoothed: float | None = None  # dual: of drop / aim - 1, the worst, held within a step
    law_factor: float = 1.0  # dual: strength gained in a row on estimates alone
    law_excess: float | None = None  # dual: the worst drop / limit when that row began
    stop_proposed: bool = False  # dry run: since the metric last improved, so it is not said again


class CheckpointFact(Frozen):
    """A checkpoint as decide() sees it; not superseded, evaluated ones and step 0 alone."""

    checkpoint_id: str
    branch: int
    step: int
    status: Literal["good", "unproven", "bad"]
    valid_loss: float | None


class StageFact(Frozen):
    """A stage as decide() sees it: the steps it covers and the strengths asked for in it."""

    name: str
    first_step: int  # accepted steps when it begins
    last_step: int  # and when it is done
    strengths: dict[str, float]


class MetricFact(Frozen):
    """Of a benchmark that early stopping watches: its value at one evaluation point."""

    name: str
    value: float
    higher_is_better: bool


class Look(Frozen):
    """The evidence of one evaluation point."""

    branch: int
    step: int
    is_last: bool
    reading: Reading
    valid_loss: float | None
    metric: MetricFact | None = (
        None  # None: early stopping watches the validation loss, or no value
    )
    train_loss_finite: bool = True
    repair_possible: bool = True
    diagnosis: Diagnosis | None = None  # of a confirmed regression, where the trainer made one
    checkpoints: tuple[CheckpointFact, ...] = ()
    stages: tuple[StageFact, ...] = ()  # empty: one stage

    @property
    def is_finite(self) -> bool:
        """Whether the loss and every score of a general benchmark are numbers."""
        return self.train_loss_finite and not self.reading.not_finite

    @property
    def is_gate(self) -> bool:
        """Whether a stage ends here: what regresses now is not carried into the next."""
        return self.is_last or any(self.step == stage.last_step for stage in self.stages)

    @property
    def is_in_last_stage(self) -> bool:
        """Whether no stage comes after the one being trained."""
        return not self.stages or self.step > self.stages[-1].first_step


class Decision(Frozen):
    """What to do, why, and the coefficients to run with from here."""

    action: Action
    reason: str  # one sentence with the numbers
    code: str  # stable word: `within_limit`, `drop_confirmed`, `could_not_hold`, `early_stopping`, ...
    state: ControllerState
    target_checkpoint_id: str | None = None  # of roll_back
    lever: str | None = None
    alternatives: tuple[str, ...] = ()
    details: dict[str, Any] = Field(default_factory=dict)
    is_proposal: bool = False  # a `dry_run` policy's: nothing was changed

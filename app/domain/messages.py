"""JSON lines between a trainer and its supervisor, over a Unix socket.

Every upward message carries `id`; those that wait get exactly one answer with `reply_to` (`ack` or
`decision`). `order` and `stop_requested` come down unasked at any time.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from app.domain.benchmarks import BenchmarkScores
from app.domain.decisions import ControllerState, Diagnosis
from app.domain.estimates_calibration import Measured
from app.domain.frozen import Frozen


class Carry(Frozen):
    """What a rollback does not rewind: data cursors and RNG states, as the trainer packed them."""

    cursors: dict[str, Any]
    rng: dict[str, str]  # base64


# ---- upward -------------------------------------------------------------------------------------


class StepMetrics(Frozen):
    """One accepted optimiser step; losses in nats per supervised token. A value that is not finite is None."""

    step: int
    branch: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    learning_rate: float
    tokens: int
    seconds: float
    values: dict[str, float | None] = Field(
        default_factory=dict
    )  # `strategy/<type>/...`, `grad_norm`


class Progress(Frozen):
    """At most one a second; carries the metrics of the steps since the last. Not answered."""

    type: Literal["progress"] = "progress"
    id: int
    branch: int
    step: int
    total_steps: int
    seconds_remaining: float | None
    trained_tokens: int
    phase: str  # `loading`, `fisher`, `baseline`, `training`, `evaluating`, `diagnosis`, `frontier`, `exporting`
    metrics: tuple[StepMetrics, ...] = ()


class Note(Frozen):
    """Something the job's owner should read; becomes a job event. Not answered."""

    type: Literal["note"] = "note"
    id: int
    level: Literal["info", "warn"]
    code: str
    message: str
    data: dict[str, Any] = Field(default_factory=dict)


class BaselineMeasured(Frozen):
    """Scores of the starting model, new ones alone. Answered by `ack`."""

    type: Literal["baseline_measured"] = "baseline_measured"
    id: int
    scores: tuple[BenchmarkScores, ...]
    seconds: float


class Planned(Frozen):
    """The evaluation budget's choice; stored in the RunPlan before it is used. Answered by `ack`."""

    type: Literal["planned"] = "planned"
    id: int
    eval_interval: int
    gate_items: int
    seconds_per_step: float
    seconds_per_evaluation: float


class CheckpointSaved(Frozen):
    """A complete checkpoint lies in `directory` under the scratch directory. Answered by `ack`."""

    type: Literal["checkpoint_saved"] = "checkpoint_saved"
    id: int
    branch: int
    step: int
    directory: str
    manifest_sha256: str
    size_bytes: int
    metrics: dict[str, float | None]
    is_evaluated: bool  # an `evaluated` message for it follows


class Evaluated(Frozen):
    """Gate scores of the checkpoint just saved. Answered by `decision`; the trainer waits for it."""

    type: Literal["evaluated"] = "evaluated"
    id: int
    branch: int
    step: int
    is_last: bool
    scores: tuple[BenchmarkScores, ...]  # general and domain benchmarks
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    train_loss: float | None
    seconds: float
    carry: Carry
    values: dict[str, float | None] = Field(
        default_factory=dict
    )  # of pairs of answers: `valid_reward_margin`, `valid_reward_accuracy`, ...
    losses_finite: bool = True  # False: the training or validation loss is NaN or infinite
    diagnosis: Diagnosis | None = None  # where the scores show a regression


class Repaired(Frozen):
    """What a repair order found. Answered by `ack`."""

    type: Literal["repaired"] = "repaired"
    id: int
    branch: int
    step: int
    alpha: float  # 1: nothing was changed; 0: back at the base
    tried: dict[str, float | None]  # alpha -> relative drop on the gate items
    replay_steps: int = 0  # taken before the search, where the diagnosis says that format was lost
    holds: bool | None = None  # what was left has been measured to hold


class OrderApplied(Frozen):
    """An outside order took effect before the given step. Not answered."""

    type: Literal["order_applied"] = "order_applied"
    id: int
    version: int
    branch: int
    step: int


class FrontierPoint(Frozen):
    """One point of the line from base (0) to tuned (1); per-benchmark values on the gate items."""

    alpha: float
    general: float | None  # weighted general mean
    domain: float | None  # weighted domain mean
    valid_loss: float | None
    benchmarks: dict[str, float | None]  # by benchmark name


class Finished(Frozen):
    """The run is over and the artifact lies in `artifact_directory`. Answered by `ack`."""

    type: Literal["finished"] = "finished"
    id: int
    checkpoint_id: str  # as named by the last decision's `publish`
    artifact_directory: str | None  # None: nothing to publish; `failure` says why
    artifact_kind: Literal["adapter", "full"]
    alpha: float  # 1 unless a confirmed regression was shrunk
    report: tuple[BenchmarkScores, ...]  # of what is published, report items
    tuned_report: tuple[BenchmarkScores, ...]  # of the tuned weights at alpha 1, report items
    valid_loss: float | None
    frontier: tuple[FrontierPoint, ...]
    result_csv: str  # path under the scratch directory
    trained_tokens: int
    seconds: dict[str, float]  # by phase
    failure: Literal["retention_not_met"] | None = None
    measured: Measured | None = None  # None: the last attempt had no more than one step
    merged_baseline: tuple[
        BenchmarkScores, ...
    ] = ()  # of the whole base, report items, where adapters of
    # a quantised base were merged into it: what `report` is then compared with


class ExportFinished(Frozen):
    """An export job's artifact lies in `artifact_directory`. Answered by `ack`."""

    type: Literal["export_finished"] = "export_finished"
    id: int
    artifact_directory: str
    artifact_kind: Literal["adapter", "full"]
    report: tuple[BenchmarkScores, ...]
    merged_baseline: tuple[BenchmarkScores, ...] = ()  # as in `Finished`


class EvaluationFinished(Frozen):
    """An evaluation job's scores, of report items. Answered by `ack`."""

    type: Literal["evaluation_finished"] = "evaluation_finished"
    id: int
    scores: tuple[BenchmarkScores, ...]
    baseline: tuple[BenchmarkScores, ...]  # of the base model, new ones alone
    seconds: dict[str, float]  # by phase


class Failed(Frozen):
    """The run cannot go on, and trying again would not help. Answered by `ack`."""

    type: Literal["failed"] = "failed"
    id: int
    code: str
    message: str
    param: str | None = None


class Stopped(Frozen):
    """Saved and leaving, as it was told to. Answered by `ack`."""

    type: Literal["stopped"] = "stopped"
    id: int
    mode: Literal["pause", "cancel", "drain"]
    branch: int
    step: int


Upward = Annotated[
    Progress
    | Note
    | BaselineMeasured
    | Planned
    | CheckpointSaved
    | Evaluated
    | Repaired
    | OrderApplied
    | Finished
    | ExportFinished
    | EvaluationFinished
    | Failed
    | Stopped,
    Field(discriminator="type"),
]
UPWARD: TypeAdapter[Upward] = TypeAdapter(Upward)


# ---- downward -----------------------------------------------------------------------------------


class RollBack(Frozen):
    """Load the target; run on as `branch` with the coefficients of `state`, cursors and RNGs kept."""

    checkpoint_id: str
    checkpoint_directory: str  # local
    step: int
    branch: int


class Order(Frozen):
    """A change of coefficients from outside; keyed (branch, version)."""

    version: int
    branch: int
    state: ControllerState
    effective_step: int | None = None  # set once the trainer applied it
    roll_back: RollBack | None = None
    stop: bool = False
    reason: str = ""


class PublishTarget(Frozen):
    """The checkpoint to publish, chosen by the rule of design section 2.5."""

    checkpoint_id: str
    checkpoint_directory: str  # local
    branch: int
    step: int
    status: Literal["good", "unproven"]


class Ack(Frozen):
    """Received and durable."""

    type: Literal["ack"] = "ack"
    reply_to: int


class DecisionReply(Frozen):
    """The recorded decision of an evaluation point, as the trainer carries it out, in this order:

    repair, then the coefficients of `state`, then the rollback, then the end.
    """

    type: Literal["decision"] = "decision"
    reply_to: int
    action: str
    reason: str
    state: ControllerState
    repair: bool = False
    replay_rate: float | None = (
        None  # with repair: replay steps come first, at this multiple of the learning rate
    )
    roll_back: RollBack | None = None
    finish: bool = False  # early stop, stop, or the last step: publish and end
    publish: PublishTarget | None = None  # with finish; None: nothing can be published
    failure: Literal["retention_not_met"] | None = None


class OrderMessage(Frozen):
    """An order from outside; applied before the next step, then reported by `order_applied`."""

    type: Literal["order"] = "order"
    order: Order


class StopMessage(Frozen):
    """Save a checkpoint (not for cancel) and leave with `stopped`."""

    type: Literal["stop_requested"] = "stop_requested"
    mode: Literal["pause", "cancel", "drain"]


Downward = Annotated[Ack | DecisionReply | OrderMessage | StopMessage, Field(discriminator="type")]
DOWNWARD: TypeAdapter[Downward] = TypeAdapter(Downward)


# ---- exit codes of a trainer ----------------------------------------------------------------------

EXIT_DONE = 0
EXIT_RELEASED = 75  # stopped as told; the checkpoint is saved
EXIT_FAILED = 64  # said `failed`: never tried again
EXIT_CUDA = 71  # device error: tried again elsewhere

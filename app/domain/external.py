"""Runs that are trained elsewhere: what is registered, what they post, and what they are told to do."""

from collections.abc import Sequence
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    Decision,
    LeverState,
    Look,
)
from app.domain.frozen import Frozen
from app.domain.policy import Policy
from app.domain.runplan import BenchmarkPlan
from app.errors import BadRequest

START: Final = CheckpointFact(
    checkpoint_id="start", branch=0, step=0, status="good", valid_loss=None
)


class RunLever(Frozen):
    """A strength that the trainer can be told to set; the name is the trainer's own."""

    type: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    strength: float = Field(default=0.0, ge=0)  # at which the run starts; never lowered below it
    default: float | None = Field(default=None, gt=0)  # where an armed one is activated
    cap: float | None = Field(default=None, gt=0)  # None: by the policy's `strength_cap_factor`
    armed: bool = False  # prepared at strength 0; the first regression activates it

    @model_validator(mode="after")
    def _can_be_turned(self) -> "RunLever":
        if self.armed and (self.strength != 0 or self.default is None):
            raise ValueError("armed: an armed strategy starts at strength 0 and needs a default")
        if not self.armed and self.strength == 0:
            raise ValueError("strength: 0 can't be turned; arm the strategy to have it activated")
        if self.cap is not None and self.cap < max(self.strength, self.default or 0.0):
            raise ValueError("cap: lies below the strength or the default")
        return self


class CreateRun(Frozen):
    """`POST /v1/runs`."""

    model: str = Field(min_length=1, max_length=512)  # a base model's name, or free text
    name: str | None = Field(default=None, min_length=1, max_length=128)
    policy: Policy | None = None  # None: the project's default
    levers: tuple[RunLever, ...] = Field(default=(), max_length=32)  # in the order they are taken
    baseline: str = Field(default="posted", min_length=1, max_length=64)
    total_steps: int | None = Field(default=None, ge=1)
    metadata: (
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None
    ) = Field(default=None, max_length=16)


class RunSpec(Frozen):
    """A registered run: the request, and the policy and benchmarks that hold for good."""

    request: CreateRun
    policy: Policy
    benchmarks: tuple[BenchmarkPlan, ...]
    baseline_key: str  # whose scores the run's are paired with


class ScoredItem(Frozen):
    """The score of one item; of `nll` the nats summed over its text, with its number of tokens."""

    id: str = Field(min_length=1, max_length=256)
    score: float | None  # None: the model gave no finite number
    tokens: int | None = Field(default=None, ge=1)


class ScoredBenchmark(Frozen):
    """One benchmark's scores."""

    benchmark: str = Field(min_length=1, max_length=256)  # `name` or `name@3`
    items: tuple[ScoredItem, ...] = Field(min_length=1, max_length=1_000_000)
    suite_sha256: str | None = Field(default=None, min_length=64, max_length=64)

    @model_validator(mode="after")
    def _ids_are_unique(self) -> "ScoredBenchmark":
        if len({item.id for item in self.items}) < len(self.items):
            raise ValueError("items: an id occurs twice")
        return self


class PostBaseline(Frozen):
    """`POST /v1/runs/{id}/baseline`: scores of the model that the run starts from."""

    scores: tuple[ScoredBenchmark, ...] = Field(min_length=1, max_length=64)


class PostEvaluation(Frozen):
    """`POST /v1/runs/{id}/evaluations`: every benchmark of one point of the run."""

    branch: int = Field(default=0, ge=0)  # rollbacks carried out so far
    step: int = Field(ge=1)
    scores: tuple[ScoredBenchmark, ...] = Field(min_length=1, max_length=64)
    valid_loss: float | None = None
    losses_finite: bool = True
    is_last: bool = False
    #: Steps that can still be restored, 0 for the start; None: the start and every evaluated step.
    checkpoints: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, max_length=10_000
    )


class Acknowledge(Frozen):
    """`POST /v1/runs/{id}/decisions/{id}/acknowledge`: the decision has taken effect."""

    step: int = Field(ge=0)  # before this step


class FinishRun(Frozen):
    """`POST /v1/runs/{id}/finish`."""

    status: Literal["succeeded", "failed", "cancelled"] = "succeeded"
    message: str | None = Field(default=None, min_length=1, max_length=1000)


class SetStrength(Frozen):
    """Train on with this strength."""

    type: Literal["set_strength"] = "set_strength"
    strategy: str
    strength: float


class SetLearningRate(Frozen):
    """Train on at this multiple of the trainer's own schedule; it replaces an earlier one."""

    type: Literal["set_learning_rate"] = "set_learning_rate"
    scale: float


class GoBack(Frozen):
    """Restore what was saved at this step (0: the start), and report as this branch from here."""

    type: Literal["roll_back"] = "roll_back"
    step: int
    branch: int


class Halt(Frozen):
    """Stop training."""

    type: Literal["stop"] = "stop"


Instruction = Annotated[SetStrength | SetLearningRate | GoBack | Halt, Field(discriminator="type")]


def run_levers(levers: tuple[RunLever, ...], policy: Policy) -> tuple[LeverState, ...]:
    """The strengths that may be turned, in the order in which they are taken; `policy.lever` comes first."""
    found = []
    for lever in sorted(levers, key=lambda lever: lever.type != policy.lever):
        initial = lever.default if lever.armed and lever.default is not None else lever.strength
        cap = policy.ladder.strength_cap_factor * initial if lever.cap is None else lever.cap
        found.append(
            LeverState(
                strategy=lever.type,
                asked=lever.strength,
                default=initial if lever.default is None else lever.default,
                cap=cap,
                armed=lever.armed,
            )
        )
    return tuple(found)


def run_state(levers: tuple[RunLever, ...]) -> ControllerState:
    """The coefficients at which a run starts."""
    return ControllerState(strengths={lever.type: lever.strength for lever in levers})


def check_levers(levers: tuple[RunLever, ...], policy: Policy) -> None:
    """Refuses what can't be turned.

    Raises:
        BadRequest: A type occurs twice, or `policy.lever` names none of them.
    """
    seen: set[str] = set()
    for place, lever in enumerate(levers):
        path = f"levers.{place}.type"
        if lever.type in seen:
            raise BadRequest(f"{path}: '{lever.type}' occurs twice.", path, "duplicate_strategy")
        seen.add(lever.type)
    if policy.lever is not None and policy.lever not in seen:
        raise BadRequest(
            f"policy.lever: '{policy.lever}' is none of the run's levers.",
            "policy.lever",
            "unknown_lever",
        )


def point_id(branch: int, step: int) -> str:
    """How a saved state of an external run is named."""
    return f"{branch}:{step}"


def live_checkpoints(
    look: Look | None, carried_out: Sequence[Decision]
) -> tuple[CheckpointFact, ...]:
    """What can be gone back to: a rollback left behind what lay after its target.

    Args:
        look: The latest evidence, whose checkpoints are all there were then; None before the first.
        carried_out: What was decided on it and since.
    """
    if look is None:
        return (START,)
    facts = look.checkpoints
    for decision in carried_out:
        if decision.action is Action.ROLL_BACK:
            facts = tuple(fact for fact in facts if fact.step <= target_step(decision))
    return facts


def target_step(decision: Decision) -> int:
    """The step that a rollback goes back to."""
    return int(decision.details["target_step"])


def instructions(before: ControllerState, decision: Decision) -> tuple[Instruction, ...]:
    """What a trainer does to carry a decision out, in this order; nothing for `keep`.

    A rollback names every coefficient, since restoring a state may restore older ones.
    """
    after, told = decision.state, list[Instruction]()
    is_rollback = decision.action is Action.ROLL_BACK
    if is_rollback:
        told.append(GoBack(step=target_step(decision), branch=after.branch))
    for strategy, strength in sorted(after.strengths.items()):
        if is_rollback or strength != before.strengths.get(strategy):
            told.append(SetStrength(strategy=strategy, strength=strength))
    if is_rollback or after.learning_rate_scale != before.learning_rate_scale:
        told.append(SetLearningRate(scale=after.learning_rate_scale))
    if decision.action is Action.STOP:
        told.append(Halt())
    return tuple(told)

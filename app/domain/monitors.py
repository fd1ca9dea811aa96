"""Monitors of deployed models: what is asked for, what they tolerate, and what a look of theirs led to."""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Self

from pydantic import Field, model_validator

from app.domain.frozen import Frozen
from app.domain.policy import EarlyStopping, Policy
from app.domain.results import PostedResult

SCHEDULE: Final = "schedule"  # the source of evaluations that workers run
WINDOW: Final = timedelta(days=30)  # over which an alias spends its error once
REFERENCE: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}@[A-Za-z][A-Za-z0-9._-]{0,63}$"

Source = Annotated[str, Field(min_length=1, max_length=128)]
Hours = Annotated[float, Field(ge=0.01, le=8784)]


class MonitoredBenchmark(Frozen):
    """A general benchmark that is watched after deployment: `name` (newest version now) or `name@3`."""

    name: str = Field(min_length=1, max_length=140)
    weight: float = Field(default=1.0, gt=0, le=1e6)
    max_drop: float | None = Field(default=None, gt=0, lt=1)


class MonitorLimits(Frozen):
    """The part of a policy that a deployed model is held to, against its root."""

    max_drop: float = Field(default=0.03, gt=0, lt=1)
    max_nll_increase: float = Field(default=0.05, gt=0, le=100)


class OnRegression(Frozen):
    """What a confirmed regression leads to, beside its event."""

    roll_back: bool = True
    compensate: bool = True


class Schedule(Frozen):
    """Evaluations that workers run."""

    every_hours: Hours


class MonitorWish(Frozen):
    """What may be said of a monitor, when it is made and later."""

    benchmarks: tuple[MonitoredBenchmark, ...] | None = Field(
        default=None, min_length=1, max_length=64
    )  # None when made: the suite of the base of what the alias points at
    limits: MonitorLimits = MonitorLimits()
    sources: tuple[Source, ...] = Field(default=(), max_length=64)
    schedule: Schedule | None = None
    stale_after_hours: Hours | None = None  # left out when made: thrice `every_hours`; null: never
    on_regression: OnRegression = OnRegression()
    enabled: bool = True

    @model_validator(mode="after")
    def _sources_are_outside(self) -> Self:
        check_sources(self.sources)
        return self


class CreateMonitor(MonitorWish):
    """`POST /v1/monitors`."""

    model: str = Field(pattern=REFERENCE, max_length=256)  # `name@alias`

    @model_validator(mode="after")
    def _hears_of_something(self) -> Self:
        if not self.sources and self.schedule is None:
            raise ValueError("sources: name who may post results, or give a schedule")
        return self


class UpdateMonitor(MonitorWish):
    """`PATCH /v1/monitors/{id}`: what is given changes; null clears schedule and stale_after_hours."""


class MonitorSettings(Frozen):
    """What a monitor watches and how it reacts, as it is stored; benchmarks are pinned to versions."""

    benchmarks: tuple[MonitoredBenchmark, ...]
    limits: MonitorLimits
    schedule: Schedule | None
    on_regression: OnRegression

    def policy(self) -> Policy:
        """The limits as the sensor takes them."""
        return Policy(
            max_drop=self.limits.max_drop,
            max_nll_increase=self.limits.max_nll_increase,
            early_stopping=EarlyStopping(enabled=False),
        )


class EvaluationSpec(Frozen):
    """What an evaluation job does: scores what an alias points at on what its monitor watches."""

    monitor_id: str  # public id
    model_version_id: str  # uuid, 32 hex digits
    benchmarks: tuple[MonitoredBenchmark, ...]


class MonitorOutcome(Frozen):
    """What one monitor made of results, and what it did."""

    monitor_id: str
    alias: str  # `name@alias`
    verdict: str | None
    look: int | None  # k of the alias's last 30 days; None: no look of its own
    acted: bool  # whether the results could move anything
    is_replay: bool = False
    why: str | None = None  # why they could not, or why nothing more was done
    rolled_back_to: int | None = None
    compensation_job_id: str | None = None


def check_sources(sources: Sequence[str]) -> None:
    """Refuses names that mean something else.

    Raises:
        ValueError: One is `schedule`, or occurs twice.
    """
    if SCHEDULE in sources:
        raise ValueError(f"sources: '{SCHEDULE}' means the server's own evaluations")
    if len(set(sources)) < len(sources):
        raise ValueError("sources: a name occurs twice")


def is_too_old(
    measured_at: datetime | None, now: datetime, stale_after_hours: float | None
) -> bool:
    """Whether a result says too little of how the model does now; one without a time was measured just now."""
    if measured_at is None or stale_after_hours is None:
        return False
    return now - measured_at > timedelta(hours=stale_after_hours)


def digest_results(model: str, source: str, results: Sequence[PostedResult]) -> str:
    """What is the same for results that are posted again, in whatever order their benchmarks come."""
    said = sorted(
        json.dumps(result.model_dump(mode="json", exclude={"subject", "source"}), sort_keys=True)
        for result in results
    )
    text = json.dumps([model, source, said])
    return hashlib.sha256(text.encode()).hexdigest()


def describe_outcome(outcome: dict[str, Any]) -> str:
    """What a confirmed regression led to, in words."""
    parts = []
    target = outcome.get("rolled_back_to")
    parts.append(
        f"rolled back to version {target}"
        if target is not None
        else f"not rolled back: {outcome.get('not_rolled_back')}"
    )
    if outcome.get("compensation_job_id") is not None:
        parts.append(f"compensation job {outcome['compensation_job_id']}")
    elif outcome.get("not_compensated") is not None:
        parts.append(f"no compensation job: {outcome['not_compensated']}")
    return "; ".join(parts)

"""The states of a job, of a checkpoint and of a delivery, and which moves are allowed."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class JobKind(StrEnum):
    """Everything a GPU does is a job of one of these kinds."""

    FINE_TUNING = "fine_tuning"
    EVALUATION = "evaluation"
    EXPORT = "export"
    EXTERNAL = "external"  # trained elsewhere: watched and steered, never claimed


class JobState(StrEnum):
    """Where a job stands; `running` and `pausing` are the leased states."""

    VALIDATING_FILES = (
        "validating_files"  # its file is still being checked; the reconciler moves it on
    )
    QUEUED = "queued"  # waiting for a worker; the reconciler rings lost doorbells again
    RUNNING = "running"  # a worker holds the lease and renews it
    PAUSING = "pausing"  # leased; the trainer was told to save and stop
    PAUSED = "paused"  # no lease; a resume moves it to queued
    SUCCEEDED = "succeeded"  # final; its model version exists
    FAILED = "failed"  # final; `error` says why
    CANCELLED = "cancelled"  # final

    @property
    def is_terminal(self) -> bool:
        """No move leads out of it."""
        return not TRANSITIONS[self]

    @property
    def is_leased(self) -> bool:
        """A worker holds it."""
        return self in LEASED


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.VALIDATING_FILES: frozenset(
            {JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}
        ),
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
        JobState.RUNNING: frozenset(
            {
                JobState.SUCCEEDED,
                JobState.FAILED,
                JobState.CANCELLED,
                JobState.PAUSING,
                JobState.QUEUED,
            }
        ),
        JobState.PAUSING: frozenset(
            {JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
        ),
        JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
        JobState.SUCCEEDED: frozenset(),
        JobState.FAILED: frozenset(),
        JobState.CANCELLED: frozenset(),
    }
)
LEASED = frozenset({JobState.RUNNING, JobState.PAUSING})


class StopRequest(StrEnum):
    """What a client asked of a leased job; seen at the next beat."""

    CANCEL = "cancel"
    PAUSE = "pause"


class CheckpointStatus(StrEnum):
    """What the sensor said of a checkpoint."""

    GOOD = "good"  # the evaluation passed
    UNPROVEN = "unproven"  # inconclusive, or never evaluated
    BAD = "bad"  # regressed


class DeliveryState(StrEnum):
    """Where a webhook delivery stands."""

    PENDING = "pending"  # waiting for its next try
    DELIVERED = "delivered"  # a 2xx answer came
    DEAD = "dead"  # tries are used up, or the endpoint is gone; can be redelivered

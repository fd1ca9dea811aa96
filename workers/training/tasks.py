"""The tasks of a run, one after the other: a job has one, or one for each of its stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.domain.runplan import RunPlan
from app.domain.spec import ResolvedTraining
from workers.data.batches import DOMAIN
from workers.strategies.batch import Stream


@dataclass(frozen=True, slots=True)
class Task:
    """A stretch of accepted steps with rows, schedule and trained parameters of its own."""

    name: str
    first_step: int
    training: ResolvedTraining  # `total_steps` are this task's
    stream: Stream
    trained: frozenset[str] | None = None  # parameters; None: all of the run

    @property
    def last_step(self) -> int:
        """The accepted steps when it is done."""
        return self.first_step + self.training.total_steps


def store_name(stage: int) -> str:
    """The store of a stage's rows."""
    return f"training-{stage}" if stage else "training"


def task_at(tasks: Sequence[Task], step: int) -> int:
    """The task that trains the step after `step` accepted ones; the last one after all."""
    return max(index for index, task in enumerate(tasks) if task.first_step <= step or index == 0)


def build_tasks(
    plan: RunPlan, num_rows: Sequence[int], trained: Sequence[frozenset[str] | None]
) -> tuple[Task, ...]:
    """The plan's stages as tasks; a plan without stages is one task.

    Args:
        plan: Of the run.
        num_rows: Training rows of each stage.
        trained: Parameters that each stage trains; None: all.
    """
    stages = [(stage.name, stage.training) for stage in plan.stages] or [("", plan.training)]
    tasks: list[Task] = []
    for index, (name, training) in enumerate(stages):
        tasks.append(
            Task(
                name=name,
                first_step=tasks[-1].last_step if tasks else 0,
                training=training,
                stream=Stream(
                    DOMAIN,
                    tuple(range(num_rows[index])),
                    store_name(index),
                    1.0,
                    counts_as_task=True,
                ),
                trained=trained[index],
            )
        )
    return tuple(tasks)

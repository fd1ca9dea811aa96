"""A job's stages as clients see them."""

from app.api.schemas.base import Schema
from app.domain.spec import JobSpec
from app.domain.staging import stage_facts


class ShownStage(Schema):
    """A stretch of training: the accepted steps it covers, its rows and its numbers."""

    name: str
    training_file: str
    trains: str
    first_step: int
    last_step: int
    n_epochs: int
    learning_rate: float
    strengths: dict[str, float]


class ShownStudent(Schema):
    """The student that is distilled from the tuned model at the end."""

    name: str
    layers: float
    steps: int
    n_epochs: int
    learning_rate: float


def show_stages(spec: JobSpec) -> list[ShownStage]:
    """Empty where the job has one stage alone."""
    facts = stage_facts(spec.stages, spec.strategies, lora=spec.training.type == "lora")
    return [
        ShownStage(
            name=stage.name,
            training_file=stage.training_file,
            trains=stage.trains,
            first_step=fact.first_step,
            last_step=fact.last_step,
            n_epochs=stage.training.n_epochs,
            learning_rate=stage.training.learning_rate,
            strengths=fact.strengths,
        )
        for stage, fact in zip(spec.stages, facts, strict=True)
    ]


def show_student(spec: JobSpec) -> ShownStudent | None:
    """None where none is distilled."""
    if spec.student is None:
        return None
    training = spec.student.training
    return ShownStudent(
        name=spec.student.name,
        layers=spec.student.layers,
        steps=training.total_steps,
        n_epochs=training.n_epochs,
        learning_rate=training.learning_rate,
    )

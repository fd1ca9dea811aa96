"""The stages of a job as a request names them: stretches of training one after the other, and a student at the end."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from app.domain.frozen import Frozen

StageName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]


class TrainStage(Frozen):
    """A stretch of training with rows, schedule and strengths of its own; what it leaves out is the job's."""

    type: Literal["train"] = "train"
    name: StageName
    training_file: str | None = Field(default=None, max_length=64)
    n_epochs: int | None = Field(default=None, ge=1, le=1000)
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    lr_scheduler: Literal["constant", "linear", "cosine"] | None = None
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    # `backbone` and `adapter` split full fine-tuning: an adapter is trained on the tuned, then frozen, weights
    trains: Literal["all", "backbone", "adapter"] = "all"
    strengths: dict[str, Annotated[float, Field(ge=0, le=1e9)]] = Field(
        default_factory=dict, max_length=32
    )  # of the job's strategies, by type, while the stage is trained


class StudentStage(Frozen):
    """Distils the tuned model into one with fewer layers; last, and published only where it holds."""

    type: Literal["student"] = "student"
    name: StageName = "student"
    layers: float = Field(
        default=0.5, gt=0, le=1
    )  # share of the teacher's; first and last are kept
    n_epochs: int | None = Field(default=None, ge=1, le=1000)  # of the job's training file
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    kd_coef: float = Field(default=1.0, gt=0, le=1e3)  # of the forward KL to the teacher
    ce_coef: float = Field(default=0.5, gt=0, le=1e3)  # of the cross-entropy on the domain rows
    temperature: float = Field(default=1.0, gt=0, le=100)
    general_ratio: float = Field(
        default=0.25, ge=0, le=4
    )  # general rows a step, as a share of batch_size: a fifth of all rows


def _kind(stage: Any) -> Any:  # noqa: ANN401 - whatever the request holds there
    """A stage that does not say what it is trains."""
    return stage.get("type", "train") if isinstance(stage, dict) else getattr(stage, "type", None)


Stage = Annotated[
    Annotated[TrainStage, Tag("train")] | Annotated[StudentStage, Tag("student")],
    Discriminator(_kind),
]

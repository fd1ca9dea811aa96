"""The body of a job request as OpenAI defines it with Retain's siblings, and the spec it becomes."""

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from app.domain.frozen import Frozen
from app.domain.policy import Policy, Retention
from app.domain.stages import Stage
from app.domain.strategies import StrategyConfig

Auto = Literal["auto"]
Quantization = Literal["none", "int8", "nf4"]  # of the frozen base
INSTEAD: Final = (
    "use method.type 'supervised' on rows that show answers, or 'dpo' on rows that compare two"
)


class Hyperparameters(Frozen):
    """OpenAI's three; `auto` is resolved at submit."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1e4)] = "auto"


class DpoHyperparameters(Hyperparameters):
    """Those of `method.dpo`; a higher `beta` holds the model nearer to the one it starts from."""

    beta: Auto | Annotated[float, Field(gt=0, le=2)] = "auto"


class Supervised(Frozen):
    """`method.supervised`."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Frozen):
    """`method.dpo`."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


def _offered(value: object) -> object:
    if value == "reinforcement":
        raise ValueError(f"'reinforcement' is not offered; {INSTEAD}")
    return value


def _never(value: object) -> object:
    if value is not None:
        raise ValueError(f"reinforcement is not offered; {INSTEAD}")
    return value


class Method(Frozen):
    """`method`: supervised fine-tuning, or direct preference optimisation on pairs of answers."""

    type: Annotated[Literal["supervised", "dpo"], BeforeValidator(_offered)] = "supervised"
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Annotated[None, BeforeValidator(_never)] = Field(default=None, exclude=True)

    @field_validator("supervised", "dpo")
    @classmethod
    def _belongs_to_the_type(cls, value: Frozen | None, info: ValidationInfo) -> Frozen | None:
        chosen = info.data.get("type")
        if value is not None and chosen is not None and info.field_name != chosen:
            raise ValueError(
                f"belongs to method.type '{info.field_name}', and it is '{chosen}'; set method.type, or"
                f" give method.{chosen}"
            )
        return value

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Those of the method that was chosen."""
        if self.type == "dpo":
            return (self.dpo or Dpo()).hyperparameters
        return (self.supervised or Supervised()).hyperparameters


class LoraConfig(Frozen):
    """Low-rank adapters on the linear layers."""

    r: int = Field(default=8, ge=1, le=1024)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Training(Frozen):
    """The `training` object: what the OpenAI body has no words for."""

    type: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    quantization: Quantization = "none"  # of the base under adapters
    learning_rate: float | None = Field(default=None, gt=0, le=10)  # None: 2e-4 LoRA, 2e-5 full
    max_seq_length: int | None = Field(
        default=None, ge=8, le=1_048_576
    )  # None: the model's context, at most 2,048
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_tokens_per_micro_batch: int = Field(default=8192, ge=16)  # padded tokens of one forward
    gradient_checkpointing: bool = False
    checkpoint_interval: int | None = Field(default=None, ge=1)  # steps; None: every evaluation


class Resources(Frozen):
    """The `resources` object."""

    num_gpus: int = Field(default=1, ge=0, le=64)  # counts CPU slots where a node has no GPU
    num_processes: int | None = Field(default=None, ge=1, le=64)  # ranks; None: one a GPU
    memory_gb: float | None = Field(default=None, gt=0, le=1e5)  # of a device; what `auto` keeps to
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class CreateJob(Frozen):
    """`POST /v1/fine_tuning/jobs`."""

    model: str = Field(min_length=1, max_length=512)
    training_file: str = Field(min_length=1, max_length=64)
    validation_file: str | None = Field(default=None, max_length=64)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None  # deprecated by OpenAI, still accepted
    suffix: str | None = Field(
        default=None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$"
    )
    seed: int | None = Field(default=None, ge=0, le=2_147_483_647)
    metadata: (
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None
    ) = Field(default=None, max_length=16)
    integrations: tuple[()] | None = None
    retention: Retention | None = Retention()  # null turns retention off
    training: Training = Training()
    stages: tuple[Stage, ...] = Field(default=(), max_length=32)
    preset: Literal["roadmap"] | None = None  # stages that are written out at submit
    resources: Resources = Resources()
    priority: int = Field(default=0, ge=-100, le=100)

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ResolvedTraining(Frozen):
    """Every number of a run, `auto` and defaults resolved at submit; `total_steps` are accepted steps."""

    type: Literal["lora", "full"]
    lora: LoraConfig
    n_epochs: int
    batch_size: int
    total_steps: int
    learning_rate: float
    max_seq_length: int
    warmup_ratio: float
    lr_scheduler: Literal["constant", "linear", "cosine"]
    weight_decay: float
    max_grad_norm: float
    max_tokens_per_micro_batch: int
    gradient_checkpointing: bool
    checkpoint_interval: int | None
    precision: Literal["auto", "fp32", "bf16"]
    seed: int
    late_adapter: bool = False  # full fine-tuning whose later stage trains an adapter
    quantization: Quantization = "none"
    beta: float | None = None  # of direct preference optimisation; None: supervised


class ResolvedStage(Frozen):
    """A stage of training; `training.total_steps` are its own."""

    name: str
    training_file: str  # public id
    training: ResolvedTraining
    trains: Literal["all", "backbone", "adapter"] = "all"
    strengths: dict[str, float] = Field(default_factory=dict)


class ResolvedStudent(Frozen):
    """The student that is distilled from the tuned model; `training.total_steps` are its own."""

    name: str
    layers: float
    training: ResolvedTraining
    kd_coef: float
    ce_coef: float
    temperature: float
    general_ratio: float


class JobSpec(Frozen):
    """A validated job, stored with it and never changed."""

    request: CreateJob
    training: ResolvedTraining
    strategies: tuple[StrategyConfig, ...]  # empty: plain training
    strategies_why: str | None  # what `auto` chose and why
    policy: Policy | None  # None: retention off, or no suite to watch
    stages: tuple[ResolvedStage, ...] = ()  # empty: one stage, the training file
    student: ResolvedStudent | None = None
    start: str | None = None  # version or checkpoint that `request.model` meant; None: a base model

    @property
    def no_rows_kept(self) -> bool:
        """Whether nothing of the domain's rows may outlive the job, beside the files themselves."""
        retention = self.request.retention
        return retention is not None and retention.privacy == "no_rows_kept"

    @property
    def is_unwatched_by_wish(self) -> bool:
        """Whether the job turned retention off, and its project requires nothing to be watched all the same."""
        return self.request.retention is None and self.policy is None


class ExportSpec(Frozen):
    """What an export job does: writes one point of a job's line from base to tuned as a model version."""

    source_job_id: str  # public id of the fine-tuning job
    checkpoint_id: str  # public id of the tuned checkpoint
    model_version_id: str  # uuid of the pending model version, 32 hex digits
    alpha: float = Field(ge=0, le=1)

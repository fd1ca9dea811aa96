"""RunPlan: everything a trainer needs, in one JSON file; stored with the job, so a run is reproducible."""

from typing import Literal

from pydantic import Field

from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.decisions import ControllerState
from app.domain.frozen import Frozen
from app.domain.messages import Carry, DecisionReply, Order
from app.domain.policy import Policy
from app.domain.spec import Quantization, ResolvedStudent, ResolvedTraining
from app.domain.strategies import StrategyConfig


class LayerPlan(Frozen):
    """What lies over a model's weights where a job starts: a published adapter, or another job's checkpoint."""

    kind: Literal["adapter", "checkpoint"]
    directory: str
    training: ResolvedTraining | None = None  # of the job that saved the checkpoint

    @property
    def is_adapter(self) -> bool:
        """Whether it changes the weights by adapters alone."""
        return self.training is None or self.training.type == "lora"


class BasePlan(Frozen):
    """The model the job starts from, on local disk; `sha256` covers all its files, and its layers'."""

    name: str
    directory: str
    sha256: str
    default_template: bool  # the base has no chat template: the built-in plain one is used
    layers: tuple[LayerPlan, ...] = ()  # over the weights in `directory`, the first one first
    root_sha256: str | None = None  # of the registered base model; None: it is `sha256`
    is_over_root: bool = True  # the layers lie over the registered base's own weights
    quantization: Quantization = "none"  # what a run makes of it; the files are never quantised

    @property
    def registered_sha256(self) -> str:
        """Of the registered base model that the start goes back to."""
        return self.root_sha256 or self.sha256

    def quantized(self, quantization: Quantization) -> "BasePlan":
        """The same base as a run with this quantisation has it; `none` is the base as its files are."""
        return self.model_copy(update={"quantization": quantization})

    @property
    def takes_adapters(self) -> bool:
        """Whether what a job makes of it can be told as an adapter of the registered base model."""
        return self.is_over_root and all(layer.is_adapter for layer in self.layers)


class RowsPlan(Frozen):
    """A file of training rows on local disk."""

    path: str
    sha256: str


class BenchmarkPlan(Frozen):
    """A benchmark version on local disk, with the baseline where one is cached."""

    benchmark_version_id: str
    name: str
    kind: BenchmarkKind
    scorer: Scorer
    weight: float
    max_drop: float | None
    path: str
    sha256: str
    baseline_scores: str | None = None  # packed, NaN where not scored
    baseline_tokens: str | None = None


class ResumePoint(Frozen):
    """Where an attempt takes up the run."""

    checkpoint_directory: str
    branch: int
    step: int
    decision: DecisionReply | None = (
        None  # already recorded for this (branch, step): not evaluated again
    )
    carry: Carry | None = None  # after a rollback: cursors and RNGs to run on with
    state: ControllerState | None = None  # after a rollback: coefficients to run on with
    orders: tuple[
        Order, ...
    ] = ()  # outside orders of this branch, with the step at which each took effect


class StagePlan(Frozen):
    """One stage of a job: its rows, its numbers, and which weights it trains."""

    name: str
    training_rows: RowsPlan
    training: ResolvedTraining  # `total_steps` are this stage's
    trains: Literal["all", "backbone", "adapter"] = "all"
    strengths: dict[str, float] = Field(default_factory=dict)  # where the stage's differ


class RunPlan(Frozen):
    """One fine-tuning attempt."""

    kind: Literal["fine_tuning"] = "fine_tuning"
    job_id: str
    attempt: int
    branch: int
    base: BasePlan
    training_rows: RowsPlan
    validation_rows: RowsPlan | None
    general_rows: RowsPlan | None
    training: ResolvedTraining  # `total_steps` are those of all stages together
    strategies: tuple[StrategyConfig, ...]
    stages: tuple[StagePlan, ...] = ()  # empty: one stage, all of the training rows
    student: ResolvedStudent | None = None
    merge_back: float | Literal["search"] | None = None
    shift_report: bool = False  # also without a strategy that asks for it
    models: dict[str, str] = Field(
        default_factory=dict
    )  # other models that strategies name, as local directories
    policy: Policy | None
    benchmarks: tuple[BenchmarkPlan, ...] = ()
    eval_interval: int | None = None  # steps; None until the evaluation budget has chosen
    gate_items: int | None = None
    num_processes: int = 1
    threads: int = 1
    scratch_directory: str
    cache_directory: str
    resume: ResumePoint | None = None


class ExportPlan(Frozen):
    """One point of the line from base to tuned, written as a model version's artifact."""

    kind: Literal["export"] = "export"
    job_id: str
    attempt: int
    base: BasePlan
    checkpoint_directory: str
    training: ResolvedTraining
    strategies: tuple[StrategyConfig, ...] = ()  # of the job that trained it
    stage_names: tuple[str, ...] = ()  # of that job; empty without stages
    alpha: float = Field(ge=0, le=1)
    benchmarks: tuple[BenchmarkPlan, ...] = ()
    threads: int = 1
    scratch_directory: str
    cache_directory: str


class EvaluationPlan(Frozen):
    """A published version, and its base where no baseline is cached, scored on the report items."""

    kind: Literal["evaluation"] = "evaluation"
    job_id: str
    attempt: int
    base: BasePlan
    artifact_directory: str
    artifact_kind: Literal["adapter", "full"]
    training: ResolvedTraining  # of the job that made it: precision, and rows of a forward
    benchmarks: tuple[BenchmarkPlan, ...]
    threads: int = 1
    scratch_directory: str
    cache_directory: str

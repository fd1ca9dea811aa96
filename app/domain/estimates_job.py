"""A job as estimates see it: its model, its rows, and what of the model it trains."""

import math
from collections.abc import Sequence
from typing import Final

from app.domain.configs.adapters import DomainAdaptersConfig
from app.domain.configs.freeze import FreezeConfig
from app.domain.configs.hybrid import HybridOptimizerConfig
from app.domain.estimates_evaluation import EvaluationRows
from app.domain.estimates_memory import MOMENTS, Trained
from app.domain.estimates_shapes import ModelShape
from app.domain.estimates_work import RowTokens
from app.domain.frozen import Frozen
from app.domain.spec import ResolvedStudent, ResolvedTraining
from app.domain.strategies import StrategyConfig, strength_in_force

#: Of a share of layers: 0.3 of 10 layers are 3.
ROUNDING: Final = 1e-9


class RowSample(Frozen):
    """Rows of a file; where it was not read to its end, those of its beginning stand for all."""

    rows: tuple[RowTokens, ...]
    num_rows: int

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row."""
        return sum(row.read for row in self.rows) / max(len(self.rows), 1)

    @property
    def tokens(self) -> int:
        """Of the whole file."""
        return round(self.mean_tokens * self.num_rows)


class StageRows(Frozen):
    """A stage of training and the rows it reads."""

    training: ResolvedTraining
    rows: RowSample


class Asked(Frozen):
    """A job as it would be run."""

    shape: ModelShape
    training: ResolvedTraining
    strategies: tuple[StrategyConfig, ...]
    stages: tuple[StageRows, ...]  # one where the job has none
    general: RowSample | None
    evaluation: EvaluationRows
    num_ranks: int = 1
    student: ResolvedStudent | None = None

    @property
    def sides(self) -> int:
        """Rows that are read of each that is drawn: two where answers are compared."""
        return count_sides(self.training)

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.training.total_steps for stage in self.stages)


def count_sides(training: ResolvedTraining) -> int:
    """Rows that a run reads of each that it draws."""
    return 1 if training.beta is None else 2


def find_trained(
    shape: ModelShape, training: ResolvedTraining, strategies: Sequence[StrategyConfig]
) -> Trained:
    """What a run trains: adapters or all weights, without what is frozen from below."""
    lora = training.type == "lora"
    frozen = next((s for s in strategies if isinstance(s, FreezeConfig)), None)
    strength = strength_in_force(frozen, lora=lora) if frozen else 0.0
    bottom = min(math.floor(strength * shape.num_layers + ROUNDING), shape.num_layers - 1)
    top = shape.num_layers - bottom
    optimizer = next(
        (s.optimizer for s in strategies if isinstance(s, HybridOptimizerConfig)), "adamw"
    )
    adapters = next((s for s in strategies if isinstance(s, DomainAdaptersConfig)), None)
    rank, adapted = 0, 0
    if lora:
        rank = training.lora.r if adapters is None else _domain_rank(shape, adapters)
        targets = "all-linear" if adapters is not None else training.lora.target_modules
        counts = [m.count for m in shape.matrices if targets == "all-linear" or m.name in targets]
        adapted = sum(counts) * top // max(shape.num_layers, 1)
        parameters = shape.lora_parameters(rank, targets) * top // max(shape.num_layers, 1)
    else:
        parameters = shape.num_parameters - sum(shape.layer_parameters[:bottom])
        if frozen is not None and strength > 0 and frozen.embeddings:
            parameters -= shape.embedding_parameters
    passes_all = not lora and not (frozen is not None and strength > 0 and frozen.embeddings)
    return Trained(
        parameters=parameters,
        is_lora=lora,
        rank=rank,
        adapted=adapted,
        top_layers=shape.num_layers if passes_all else top,
        moments=MOMENTS[optimizer],
        checkpointing=training.gradient_checkpointing,
        quantization=training.quantization,
    )


def _domain_rank(shape: ModelShape, config: DomainAdaptersConfig) -> int:
    """As the trainer derives it from the budget."""
    a_rank = shape.lora_parameters(1, "all-linear")
    return config.r or max(1, int(config.budget * shape.num_parameters / a_rank))

"""`auto`: a default combination from what the job has, and why it was chosen."""

from typing import Final, NamedTuple

from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.hybrid import HybridOptimizerConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.strategies import StrategyConfig

#: Bytes a parameter of full fine-tuning in float32: weight, gradient and AdamW's two moments.
TRAINED_BYTES: Final = 16
#: And those that ewc adds: Fisher information and anchor.
EWC_BYTES: Final = 8
GB: Final = 1e9
#: Of the roadmap: the learning rate of a layer as a share of that of the layer above.
LAYER_DECAY: Final = 0.9


class Job(NamedTuple):
    """What `auto` looks at."""

    lora: bool
    has_general_data: bool
    no_rows_kept: bool  # no strategy may keep rows of the domain
    num_parameters: int | None
    memory_gb: float | None  # of a device
    is_roadmap: bool = False


class Choice(NamedTuple):
    """The strategies, and one sentence on why."""

    strategies: tuple[StrategyConfig, ...]
    why: str


def choose_strategies(job: Job) -> Choice:
    """The default combination.

    With general data: replay and distillation on the replayed rows for adapters (card 8's default), implicit
    ewc and replay for full fine-tuning, without ewc where the device can't hold its two copies. Without:
    l2sp, which needs no data at all. The roadmap adds learning rates that fall from layer to layer.
    """
    if job.is_roadmap:
        chosen = choose_strategies(job._replace(is_roadmap=False))
        layered = HybridOptimizerConfig(layer_decay=LAYER_DECAY)
        return Choice(
            (*chosen.strategies, layered),
            f"{chosen.why} The roadmap moves each layer {LAYER_DECAY:g} times as far as the one above it.",
        )
    if not job.has_general_data:
        kept = " and keeps no rows" if job.no_rows_kept else ""
        return Choice(
            (L2SpConfig(),),
            f"There is no general data, so l2sp, which needs none{kept}, holds the weights near the base.",
        )
    if job.lora:
        return Choice(
            (ReplayConfig(), DistillationConfig(on=("replay",))),
            "There is general data and the job trains an adapter, so a tenth of general rows is mixed in"
            " (replay) and the base model teaches on those rows (distillation).",
        )
    if not _fits_ewc(job):
        return Choice(
            (ReplayConfig(strength=0.25),),
            f"There is general data and the job trains all weights, but {job.memory_gb:g} GB do not hold the"
            " two further copies of the weights that ewc needs, so a quarter of general rows is mixed in"
            " (replay).",
        )
    return Choice(
        (EwcConfig(penalty_mode="implicit"), ReplayConfig()),
        "There is general data and the job trains all weights, so ewc holds those that general ability"
        " rests on and a tenth of general rows is mixed in (replay).",
    )


def _fits_ewc(job: Job) -> bool:
    if job.memory_gb is None or job.num_parameters is None:
        return True
    return job.num_parameters * (TRAINED_BYTES + EWC_BYTES) <= job.memory_gb * GB

"""One adapter a domain."""

from collections.abc import Sequence
from typing import Final, Literal

from pydantic import Field, model_validator

from app.domain.configs.base import StrategyBase

#: Share of the base's parameters that an adapter may have without being asked for (card 3).
LEAST_SHARE: Final = 0.003
MOST_SHARE: Final = 0.01
#: Below so many parameters the share is a warning: a model of 172,000 has 1.5 % at rank 1.
REFUSED_FROM_PARAMETERS: Final = 100_000_000
#: Names that an adapter can't have: attributes of the container that peft keeps adapters in, and the artifact's own.
RESERVED_NAMES: Final = frozenset(
    [
        "merged",
        "T_destination",
        "add_module",
        "apply",
        "bfloat16",
        "buffers",
        "call_super_init",
        "children",
        "clear",
        "compile",
        "cpu",
        "cuda",
        "double",
        "dump_patches",
        "eval",
        "extra_repr",
        "float",
        "forward",
        "get_buffer",
        "get_extra_state",
        "get_parameter",
        "get_submodule",
        "half",
        "ipu",
        "items",
        "keys",
        "load_state_dict",
        "modules",
        "mtia",
        "named_buffers",
        "named_children",
        "named_modules",
        "named_parameters",
        "parameters",
        "pop",
        "register_backward_hook",
        "register_buffer",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_module",
        "register_parameter",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "requires_grad_",
        "set_extra_state",
        "set_submodule",
        "share_memory",
        "smart_apply",  # transformers adds it
        "state_dict",
        "to",
        "to_empty",
        "train",
        "training",
        "type",
        "update",
        "values",
        "xpu",
        "zero_grad",
    ]
)


class DomainAdaptersConfig(StrategyBase):
    """One adapter a stage on a frozen base; `strength` keeps an adapter off what earlier ones read (O-LoRA)."""

    type: Literal["domain_adapters"] = "domain_adapters"
    kind: Literal["lora", "bottleneck"] = "lora"
    budget: float = Field(
        default=0.005, gt=0, le=1
    )  # parameters of an adapter, as a share of the base's; gives rank or width
    r: int | None = Field(default=None, ge=1, le=4096)  # rank or width; None: by the budget
    allow_any_share: bool = False  # also outside 0.3-1 % of a large model
    compose: Literal["separate", "stacked"] = (
        "separate"  # stacked: earlier adapters stay active, frozen
    )
    orthogonality: Literal["penalty", "hard"] = "penalty"
    merge: Literal["none", "cat", "svd", "ties", "dare"] = "none"
    merge_weights: tuple[float, ...] | None = Field(
        default=None, min_length=1, max_length=32
    )  # one a stage; None: 1 each
    merge_rank: int | None = Field(
        default=None, ge=1, le=65_536
    )  # None: an adapter's for svd, the sum of all for the others
    density: float = Field(default=0.5, gt=0, le=1)  # entries kept by ties and dare
    route: bool = True  # centroids and a threshold are published for routing

    @model_validator(mode="after")
    def _bottlenecks_stay_apart(self) -> "DomainAdaptersConfig":
        if self.kind == "bottleneck" and self.merge != "none":
            raise ValueError(
                "merge: bottleneck adapters are no change of a weight, so they can't be merged"
            )
        return self


def share_problem(share: float) -> str | None:
    """What is wrong with an adapter of this share of the base, in words; None where nothing is."""
    if LEAST_SHARE <= share <= MOST_SHARE:
        return None
    return (
        f"an adapter would have {100 * share:.2g} % of the base's parameters; 0.3 to 1 % is what adapters"
        " are known to need"
    )


def find_adapter_problem(
    config: DomainAdaptersConfig,
    *,
    lora: bool,
    num_parameters: int | None,
    stage_names: Sequence[str],
) -> tuple[str, str] | None:
    """Why a job can't have these adapters: the field below the strategy's (or `stages`), and what is wrong.

    Args:
        config: Of the strategy.
        lora: Whether the job's `training.type` is `lora`.
        num_parameters: Of the base; None when it is not known.
        stage_names: Of the job; empty without stages.
    """
    if not lora:
        return "type", "domain_adapters keeps the base frozen, so it needs training.type 'lora'"
    is_large = num_parameters is not None and num_parameters >= REFUSED_FROM_PARAMETERS
    problem = share_problem(config.budget)
    if config.r is None and is_large and not config.allow_any_share and problem:
        return "budget", f"{problem}; set allow_any_share to train it all the same"
    weights, count = config.merge_weights, max(len(stage_names), 1)
    if weights is not None and len(weights) != count:
        return "merge_weights", f"{len(weights)} weights are given for {count} adapters"
    for name in stage_names:
        if name in RESERVED_NAMES or name in "lora_":
            return "stages", f"'{name}' can't name an adapter; give the stage another name"
    return None

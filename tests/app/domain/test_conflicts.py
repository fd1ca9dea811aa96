"""Combinations of strategies that are refused at submit, each with the reason."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from app.domain.conflicts import Surroundings, check_conflicts
from app.domain.strategies import CARDS, StrategyConfig
from app.errors import BadRequest

CONFIGS: TypeAdapter[tuple[StrategyConfig, ...]] = TypeAdapter(tuple[StrategyConfig, ...])


def surroundings(**overrides: Any) -> Surroundings:
    values: dict[str, Any] = {
        "lora": False,
        "late_adapter": False,
        "no_rows_kept": False,
        "num_parameters": 100_000,
        "weight_decay": 0.0,
        "stage_names": ("one", "two"),
    }
    return Surroundings(**values | overrides)


@pytest.mark.parametrize(
    ("entries", "around", "param", "words"),
    [
        ([{"type": "maml_prox"}, {"type": "reptile"}], {}, "retention.strategies.1", "gradients"),
        (
            [{"type": "causal"}, {"type": "l2sp"}, {"type": "maml_prox"}],
            {},
            "retention.strategies.2",
            "environments",
        ),
        (
            [{"type": "reptile"}, {"type": "progressive", "mode": "cone"}],
            {},
            "retention.strategies.1",
            "cone",
        ),
        (
            [{"type": "progressive", "mode": "gpm"}, {"type": "domain_adapters"}],
            {"lora": True},
            "retention.strategies.1",
            "adapter",
        ),
        (
            [{"type": "ewc"}, {"type": "hybrid_optimizer", "trust_ratio": "lamb"}],
            {},
            "retention.strategies.1",
            "gradient",
        ),
        (
            [{"type": "l2sp"}, {"type": "domain_adapters", "kind": "bottleneck"}],
            {"lora": True},
            "retention.strategies.1",
            "bottleneck",
        ),
        ([{"type": "domain_adapters"}], {}, "retention.strategies.0.type", "lora"),
        ([{"type": "si"}], {"lora": True}, "retention.strategies.0", "adapter"),
        ([{"type": "si"}], {"stage_names": ()}, "retention.strategies.0", "stage"),
        ([{"type": "memory"}], {"no_rows_kept": True}, "retention.strategies.0", "no_rows_kept"),
        (
            [{"type": "replay", "domain_store_fraction": 0.1}],
            {"no_rows_kept": True},
            "retention.strategies.0",
            "no_rows_kept",
        ),
        ([{"type": "hybrid_optimizer"}], {"weight_decay": 0.1}, "training.weight_decay", "twice"),
    ],
)
def test_what_cannot_go_together_is_refused(
    entries: list[dict[str, Any]], around: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        check_conflicts(CONFIGS.validate_python(entries), surroundings(**around))
    assert (refused.value.param or "").startswith(param)
    assert words in refused.value.message


@pytest.mark.parametrize("kind", sorted(CARDS))
def test_every_strategy_can_be_had_alone(kind: str) -> None:
    lora = kind == "domain_adapters"
    check_conflicts(CONFIGS.validate_python([{"type": kind}]), surroundings(lora=lora))


@pytest.mark.parametrize(
    "entries",
    [
        [{"type": "replay"}, {"type": "distillation"}],
        [{"type": "ewc"}, {"type": "replay"}, {"type": "distillation"}],
        [{"type": "causal", "vrex_beta": 0}, {"type": "maml_prox"}],
        [{"type": "progressive", "mode": "gpm"}, {"type": "replay"}, {"type": "ewc"}],
        [{"type": "l2sp"}, {"type": "hybrid_optimizer", "trust_ratio": "lamb"}],
    ],
)
def test_the_recommended_combinations_are_let_through(entries: list[dict[str, Any]]) -> None:
    check_conflicts(CONFIGS.validate_python(entries), surroundings())

"""What distillation and replay may be configured to, and which of it needs general data."""

import pytest
from pydantic import ValidationError

from app.domain.configs.distillation import DistillationConfig, find_distillation_problem
from app.domain.configs.replay import ReplayConfig
from app.domain.strategies import StrategyConfig, needs_general_data


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DistillationConfig(), True),
        (DistillationConfig(on=("general",)), True),
        (DistillationConfig(on=("domain", "general")), True),
        (DistillationConfig(on=("generated", "general"), every=2), True),
        (DistillationConfig(on=("domain",)), False),
        (DistillationConfig(on=("generated",)), False),
        (DistillationConfig(on=("domain", "generated"), every=2), False),
        (DistillationConfig(on=("replay",)), False),  # the replay strategy's own need
        (DistillationConfig(on=("replay",), teacher="cached"), False),
        (DistillationConfig(teacher="cached"), True),
        (ReplayConfig(), True),
        (ReplayConfig(der_alpha=0.5), True),
        (ReplayConfig(source="generated"), False),
        (ReplayConfig(source="generated", der_alpha=0.5), False),
        (ReplayConfig(source="none", domain_store_fraction=0.05), False),
        (ReplayConfig(domain_store_fraction=0.05), True),
    ],
)
def test_what_needs_general_data(config: StrategyConfig, expected: bool) -> None:
    assert needs_general_data(config) == expected


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({"teacher": "cached", "divergence": "jsd"}, "forward_kl alone"),
        ({"teacher": "cached", "hidden_coef": 0.1}, "no hidden states"),
        ({"teacher": "cached", "on": ("domain",)}, "'domain' are not cached"),
        ({"teacher": "cached", "on": ("general", "generated")}, "'generated' are not cached"),
        ({"on": ()}, "at least 1"),
        ({"every": 0}, "greater than or equal to 1"),
        ({"on": ("elsewhere",)}, "on"),
    ],
)
def test_distillation_that_can_not_be_is_refused(knobs: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        DistillationConfig.model_validate(knobs)


def test_replay_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="domain_store_fraction keeps none"):
        ReplayConfig(source="none")


def test_replayed_rows_can_be_distilled_only_where_there_are_any() -> None:
    config = DistillationConfig(on=("replay",))
    assert find_distillation_problem(config, ReplayConfig(source="generated")) is None
    assert "has none" in str(find_distillation_problem(config, None))
    earlier = ReplayConfig(source="none", domain_store_fraction=0.1)
    assert "no teacher" in str(find_distillation_problem(config, earlier))
    assert find_distillation_problem(DistillationConfig(on=("domain",)), None) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DistillationConfig(), False),
        (DistillationConfig(on=("domain",), every=2), False),
        (DistillationConfig(on=("generated",)), True),
        (DistillationConfig(on=("generated",), generated_prompts="start"), False),
        (ReplayConfig(), False),
        (ReplayConfig(source="generated"), False),
        (ReplayConfig(source="generated", generated_prompts="prompt"), True),
        (ReplayConfig(domain_store_fraction=0.05), True),
    ],
)
def test_what_keeps_rows_of_the_domain(
    config: DistillationConfig | ReplayConfig, expected: bool
) -> None:
    assert config.keeps_domain_rows == expected

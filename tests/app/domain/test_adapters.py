"""The configuration of domain adapters: what it takes, and which jobs can't have it."""

import pytest
from pydantic import ValidationError

from app.domain.configs.adapters import (
    DomainAdaptersConfig,
    find_adapter_problem,
    share_problem,
)
from app.domain.strategies import CARDS, needs_general_data

LARGE = 7_000_000_000


def problem(config, *, lora=True, num_parameters=LARGE, stage_names=()):
    return find_adapter_problem(
        config, lora=lora, num_parameters=num_parameters, stage_names=stage_names
    )


def test_the_defaults_fit_a_large_model_and_need_no_general_data():
    config = DomainAdaptersConfig()
    assert problem(config, stage_names=("law", "medicine")) is None
    assert (config.budget, config.compose, config.merge, config.route) == (
        0.005,
        "separate",
        "none",
        True,
    )
    assert not needs_general_data(config)
    assert CARDS["domain_adapters"].cap == 100.0


@pytest.mark.parametrize("budget", [0.0029, 0.0101, 0.5])
def test_a_share_out_of_bounds_is_refused_for_a_large_model_alone(budget):
    config = DomainAdaptersConfig(budget=budget)
    field, what = problem(config) or ("", "")
    assert field == "budget"
    assert "allow_any_share" in what
    assert problem(config, num_parameters=99_999_999) is None
    assert problem(config, num_parameters=None) is None
    assert problem(config.model_copy(update={"allow_any_share": True})) is None
    assert problem(config.model_copy(update={"r": 8})) is None  # its share shows when it is built


@pytest.mark.parametrize(
    ("share", "is_fine"), [(0.003, True), (0.01, True), (0.00299, False), (0.011, False)]
)
def test_the_bounds_belong_to_what_is_fine(share, is_fine):
    assert (share_problem(share) is None) == is_fine


def test_full_fine_tuning_has_no_domain_adapters():
    assert (problem(DomainAdaptersConfig(), lora=False) or ("",))[0] == "type"


def test_there_is_one_weight_a_stage():
    config = DomainAdaptersConfig(merge="cat", merge_weights=(0.5, 0.5))
    assert problem(config, stage_names=("law", "code")) is None
    assert problem(config) == ("merge_weights", "2 weights are given for 1 adapters")
    assert (problem(config, stage_names=("a1", "b1", "c1")) or ("",))[0] == "merge_weights"


@pytest.mark.parametrize("name", ["merged", "keys", "train", "half", "lora", "a"])
def test_names_that_an_adapter_can_not_have_are_refused(name):
    field, what = problem(DomainAdaptersConfig(), stage_names=("law", name)) or ("", "")
    assert field == "stages"
    assert f"'{name}'" in what


@pytest.mark.parametrize(
    "knobs",
    [
        {"budget": 0},
        {"budget": 1.1},
        {"r": 0},
        {"density": 0},
        {"density": 1.5},
        {"merge": "linear"},
        {"compose": "both"},
        {"merge_weights": ()},
        {"kind": "bottleneck", "merge": "cat"},
    ],
)
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(ValidationError):
        DomainAdaptersConfig(**knobs)

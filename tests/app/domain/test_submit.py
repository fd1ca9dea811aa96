"""What a request leaves open, resolved."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.policy import Retention
from app.domain.spec import CreateJob
from app.domain.submit import (
    LARGEST_BATCH,
    MOST_EPOCHS,
    auto_batch_size,
    auto_epochs,
    resolve_policy,
    resolve_strategies,
    resolve_training,
)
from app.errors import BadRequest


def request(**fields: object) -> CreateJob:
    return CreateJob.model_validate({"model": "m", "training_file": "file-0"} | fields)


@given(st.integers(1, 5_000_000))
def test_auto_stays_within_bounds_and_sees_every_row(num_rows: int) -> None:
    batch, epochs = auto_batch_size(num_rows), auto_epochs(num_rows)
    assert 1 <= batch <= min(LARGEST_BATCH, num_rows)
    assert 1 <= epochs <= MOST_EPOCHS
    training = resolve_training(request(), num_rows=num_rows, context_length=None, seed=1)
    assert training.total_steps == epochs * math.ceil(num_rows / batch)


@pytest.mark.parametrize(
    ("num_rows", "batch", "epochs"),
    [
        (1, 1, 25),
        (10, 4, 25),
        (40, 4, 8),
        (100, 4, 3),
        (1000, 16, 3),
        (10_000, 32, 3),
        (50_000, 32, 1),
    ],
)
def test_auto_epochs_and_batch_size(num_rows: int, batch: int, epochs: int) -> None:
    assert (auto_batch_size(num_rows), auto_epochs(num_rows)) == (batch, epochs)


@pytest.mark.parametrize(
    ("training", "multiplier", "expected"),
    [({}, "auto", 2e-4), ({"type": "full"}, 2, 4e-5), ({"learning_rate": 1e-3}, 0.5, 5e-4)],
)
def test_learning_rates(training: dict[str, object], multiplier: object, expected: float) -> None:
    asked = request(training=training, hyperparameters={"learning_rate_multiplier": multiplier})
    found = resolve_training(asked, num_rows=10, context_length=None, seed=0)
    assert found.learning_rate == pytest.approx(expected)


def test_method_goes_before_the_deprecated_field() -> None:
    asked = request(
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        hyperparameters={"n_epochs": 9},
    )
    assert resolve_training(asked, num_rows=10, context_length=None, seed=0).n_epochs == 2


@pytest.mark.parametrize(
    ("asked", "context", "length"),
    [(None, None, 2048), (None, 256, 256), (None, 8192, 2048), (64, 256, 64)],
)
def test_sequence_length(asked: int | None, context: int | None, length: int) -> None:
    body = request(training={"max_seq_length": asked})
    assert (
        resolve_training(body, num_rows=9, context_length=context, seed=0).max_seq_length == length
    )


def test_the_seed_of_the_request_goes_first() -> None:
    assert resolve_training(request(seed=0), num_rows=9, context_length=None, seed=5).seed == 0
    assert resolve_training(request(), num_rows=9, context_length=None, seed=5).seed == 5


def test_named_strategies_are_kept_as_they_are() -> None:
    named = Retention.model_validate({"strategies": [{"type": "l2sp", "strength": 2}]})
    found = resolve_strategies(named, lora=True, has_general_data=False, num_parameters=None)
    assert (found.strategies, found.why, found.is_extrapolated) == (named.strategies, None, False)


def test_distillation_on_replayed_rows_needs_a_replay() -> None:
    named = Retention.model_validate({"strategies": [{"type": "distillation", "on": ["replay"]}]})
    with pytest.raises(BadRequest) as refused:
        resolve_strategies(named, lora=True, has_general_data=True, num_parameters=None)
    assert refused.value.param == "retention.strategies.0.on"


def test_distillation_on_domain_rows_needs_no_general_data() -> None:
    named = Retention.model_validate({"strategies": [{"type": "distillation", "on": ["domain"]}]})
    found = resolve_strategies(named, lora=True, has_general_data=False, num_parameters=None)
    assert [s.type for s in found.strategies] == ["distillation"]


def test_the_lever_must_be_turnable() -> None:
    off = Retention.model_validate(
        {"strategies": [{"type": "l2sp", "strength": 0}], "policy": {"lever": "l2sp"}}
    )
    assert not isinstance(off.strategies, str)
    with pytest.raises(BadRequest) as refused:
        resolve_policy(off, off.strategies, None)
    assert refused.value.param == "retention.policy.lever"


def test_a_quantised_base_is_under_adapters_alone() -> None:
    found = resolve_training(
        request(training={"quantization": "nf4"}), num_rows=10, context_length=None, seed=0
    )
    assert found.quantization == "nf4"
    assert request().training.quantization == "none"
    with pytest.raises(BadRequest, match=r"needs training\.type 'lora'") as caught:
        resolve_training(
            request(training={"quantization": "int8", "type": "full"}),
            num_rows=10,
            context_length=None,
            seed=0,
        )
    assert (caught.value.param, caught.value.code) == (
        "training.quantization",
        "quantization_unsupported",
    )


@pytest.mark.parametrize(("encoder", "is_refused"), [(None, True), ("reader", False)])
def test_a_memory_over_a_quantised_base_has_an_encoder_of_its_own(
    encoder: str | None, is_refused: bool
) -> None:
    asked = request(
        training={"quantization": "int8"},
        retention={"strategies": [{"type": "l2sp"}, {"type": "memory", "encoder": encoder}]},
    )
    if not is_refused:
        resolve_training(asked, num_rows=10, context_length=None, seed=0)
        return
    with pytest.raises(BadRequest, match="an encoder of its own") as caught:
        resolve_training(asked, num_rows=10, context_length=None, seed=0)
    assert caught.value.param == "retention.strategies.1.encoder"

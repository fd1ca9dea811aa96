"""The arithmetic of estimates: known sums, what makes a job larger, and what calibration learns."""

import pytest

from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.freeze import FreezeConfig
from app.domain.configs.hybrid import HybridOptimizerConfig
from app.domain.configs.quadratic import EwcConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.estimates import Estimate, estimate
from app.domain.estimates_calibration import Run, calibrate
from app.domain.estimates_devices import KNOWN_GPUS, Rates, cpu, known_gpu, usable_bytes
from app.domain.estimates_evaluation import BenchmarkRows, EvaluationRows, evaluation_work
from app.domain.estimates_job import Asked, RowSample, StageRows, find_trained
from app.domain.estimates_memory import MicroSize, Numbers, Trained, measure_memory, sharded_peak
from app.domain.estimates_shapes import describe_shape
from app.domain.estimates_strategies import extra_cost, strategy_memory
from app.domain.estimates_work import RowTokens, Work, plan_steps
from tests.factories import make_training
from tests.shapes import FIVE_B, llama_shape

A100 = known_gpu("NVIDIA A100-80GB")
TINY = llama_shape()


def make_asked(**changes: object) -> Asked:
    training = changes.pop("training", None) or make_training(
        precision="auto", max_tokens_per_micro_batch=4096, batch_size=8
    )
    rows = RowSample(rows=(RowTokens(129, 60),) * 16, num_rows=160)
    return Asked.model_validate(
        {
            "shape": TINY,
            "training": training,
            "strategies": (),
            "stages": (StageRows(training=training, rows=rows),),
            "general": rows,
            "evaluation": EvaluationRows(),
        }
        | changes
    )


def reckon(**changes: object) -> Estimate:
    return estimate(make_asked(**changes), A100)


def test_counts_are_those_of_a_llama() -> None:
    assert TINY.num_parameters == 300 * 32 + 32 + 2 * (4 * 32 * 32 + 3 * 64 * 32 + 2 * 32)
    assert llama_shape(**FIVE_B).num_parameters == 4_988_276_736
    assert TINY.lora_parameters(8, "all-linear") == 2 * 8 * (4 * 64 + 3 * 96)
    assert TINY.lora_parameters(8, ("q_proj",)) == 2 * 8 * 64
    assert TINY.is_tied
    assert TINY.head_parameters == 0


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": 32},
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    ],
)
def test_what_is_no_decoder_has_no_shape(config: dict[str, int]) -> None:
    tensors = {"embed.weight": [10, 32], "layers.0.w.weight": [32, 32]}
    assert describe_shape(config, tensors) is None


def test_full_training_in_float32_takes_sixteen_bytes_a_parameter() -> None:
    shape = llama_shape(**FIVE_B)
    whole = Trained(parameters=shape.num_parameters, is_lora=False, top_layers=24)
    memory = measure_memory(shape, whole, Numbers(is_mixed=True, base_bytes=4), MicroSize(1, 8, 4))
    state = memory.weights + memory.gradients + memory.optimizer
    assert state == 16 * 4_988_276_736
    assert memory.peak >= state


def test_gradients_come_as_activations_go_where_a_step_is_one_micro_batch() -> None:
    whole = Trained(parameters=TINY.num_parameters, is_lora=False, top_layers=2)
    numbers, micro = Numbers(is_mixed=False, base_bytes=4), MicroSize(8, 128, 500)
    one = measure_memory(TINY, whole, numbers, micro, is_split=False)
    many = measure_memory(TINY, whole, numbers, micro, is_split=True)
    assert many.peak - one.peak == one.gradients


def test_row_8_of_the_targets() -> None:
    """5B on GPUs of 80 GB: replay and caches cost little, a live teacher a third, adapters save over 30 %."""
    from tests.benchmarks.five_billion import five_billion_lines

    plain, replay, live, cached, ewc, lora, taught = five_billion_lines()
    base = plain.estimate.seconds_per_step
    assert plain.estimate.fits is False
    assert lora.estimate.fits is True
    assert plain.sharded < usable_bytes(A100.memory_bytes or 0)
    assert replay.general_rows_kept == 0.05
    assert replay.estimate.seconds_per_step / base == pytest.approx(1.05, abs=0.02)
    assert live.estimate.seconds_per_step / base == pytest.approx(1.32, abs=0.04)
    assert cached.estimate.seconds_per_step == pytest.approx(replay.estimate.seconds_per_step)
    assert ewc.estimate.memory.peak - plain.estimate.memory.peak == 8 * 4_988_276_736
    assert 1 - lora.estimate.memory.peak / plain.estimate.memory.peak > 0.30
    assert taught.estimate.memory.strategies == 0  # adapters off: the base itself is the teacher
    assert lora.estimate.checkpoint_bytes < plain.estimate.checkpoint_bytes / 100


def test_the_table_that_is_published_is_the_one_that_is_reckoned() -> None:
    from tests.benchmarks.estimates import OUTPUT
    from tests.benchmarks.five_billion import five_billion_table

    assert five_billion_table() in OUTPUT.read_text()


def test_state_that_is_spread_shrinks_with_the_gpus() -> None:
    shape, numbers = llama_shape(**FIVE_B), Numbers(is_mixed=True, base_bytes=4)
    whole = Trained(parameters=shape.num_parameters, is_lora=False, top_layers=24)
    memory = measure_memory(shape, whole, numbers, MicroSize(4, 512, 1000))
    two, eight = (sharded_peak(memory, shape, numbers, n) for n in (2, 8))
    assert two - eight == pytest.approx(16 * shape.num_parameters * (1 / 2 - 1 / 8), rel=0.001)


def test_freezing_takes_parameters_and_layers_away() -> None:
    training = make_training()
    all_of_it = find_trained(TINY, training, ())
    half = find_trained(TINY, training, (FreezeConfig(strength=0.5),))
    assert (all_of_it.parameters, all_of_it.top_layers) == (TINY.num_parameters, 2)
    assert half.top_layers == 1
    assert half.parameters == TINY.num_parameters - TINY.layer_parameters[0] - 300 * 32
    assert find_trained(TINY, training, (FreezeConfig(armed=True),)) == all_of_it
    assert find_trained(TINY, training, (HybridOptimizerConfig(optimizer="sgd"),)).moments == 1


def test_strategies_add_to_memory_time_and_tokens() -> None:
    plain = reckon()
    ewc = reckon(strategies=(EwcConfig(fisher_samples=100),))
    assert ewc.memory.peak - plain.memory.peak == 8 * TINY.num_parameters
    assert ewc.strategies[0].tokens == 100 * 129
    assert ewc.checkpoint_bytes - plain.checkpoint_bytes == 8 * TINY.num_parameters
    replay = reckon(strategies=(ReplayConfig(strength=0.5),))
    assert replay.strategies[0].tokens == pytest.approx(0.5 * 20 * 8 * 129)
    assert replay.seconds > plain.seconds
    cached = DistillationConfig(on=("general",), teacher="cached", cache_rows=10)
    assert reckon(strategies=(cached,)).strategies[0].memory_bytes == 0


def test_adapters_switched_off_are_the_teacher() -> None:
    cost = extra_cost(DistillationConfig(on=("domain",)), lora=True)
    assert strategy_memory(cost, trained=10, model_bytes=1000, lora=True) == 0
    assert strategy_memory(cost, trained=10, model_bytes=1000, lora=False) == 1000
    factors = extra_cost(EwcConfig(), lora=True)
    assert strategy_memory(factors, trained=10, model_bytes=0, lora=True) == 0


def test_checkpointing_trades_memory_for_time() -> None:
    longer = {"batch_size": 8, "max_tokens_per_micro_batch": 4096}
    plain = reckon(training=make_training(**longer))
    saving = reckon(training=make_training(**longer, gradient_checkpointing=True))
    assert saving.memory.activations < plain.memory.activations
    assert saving.seconds_per_step > plain.seconds_per_step


def test_padding_and_the_largest_micro_batch_follow_from_the_lengths() -> None:
    rows = [RowTokens(11, 5)] * 4 + [RowTokens(101, 50)] * 4
    steps = plan_steps(rows, batch_size=8, max_tokens=1000, spare=64)
    assert (steps.micros, steps.tokens) == (2, 4 * 10 + 4 * 100)
    assert steps.largest == (4, 100, 200)
    together = plan_steps(rows, batch_size=8, max_tokens=1000, spare=10_000)
    assert (together.micros, together.tokens) == (1, 800)


def test_evaluations_are_counted_by_their_phases() -> None:
    rows = EvaluationRows(
        benchmarks=(
            BenchmarkRows(name="a", num_items=1000, item_tokens=10, generates=False),
            BenchmarkRows(
                name="b", num_items=100, item_tokens=20, generates=True, has_baseline=True
            ),
        ),
        validation_tokens=500,
        eval_interval=10,
        gate_items=50,
    )
    work = evaluation_work(rows, steps=40, train_seconds=1.0)
    assert work.num_evaluations == 4
    assert work.by_phase["baseline"] == (10_000, 0)
    assert work.by_phase["evaluating"] == (4 * (500 + 1000 + 500) + 6000, 4 * 800 + 800)
    assert work.by_phase["frontier"] == (11 * 2000, 11 * 800)
    budget = evaluation_work(
        rows.model_copy(update={"eval_interval": "budget"}), steps=40, train_seconds=100.0
    )
    assert budget.budget_seconds == pytest.approx(10.0)


def test_calibration_finds_the_rates_that_runs_were_made_with() -> None:
    true = Rates(seconds_per_flop=2e-11, seconds_per_byte=3e-10, seconds_per_call=5e-4)
    works = [
        Work(flops=f * 1e9, moved=m * 1e8, calls=c)
        for f, m, c in ((100, 1, 10), (10, 10, 20), (20, 2, 300), (50, 8, 100), (300, 3, 50))
    ]
    runs = [
        Run(w, w.seconds(true), 100_000_000, 50_000_000 * i, 130_000_000 + 60_000_000 * i)
        for i, w in enumerate(works, start=1)
    ]
    found = calibrate("cpu", runs, cpu("cpu", 1).rates)
    fresh = Work(flops=80e9, moved=5e8, calls=70)
    assert fresh.seconds(found.rates) == pytest.approx(fresh.seconds(true), rel=0.02)
    assert found.peak_bytes(100_000_000, 125_000_000) == pytest.approx(280_000_000, rel=0.02)


def test_one_run_scales_what_the_data_sheet_says() -> None:
    prior = cpu("cpu", 1).rates
    work = Work(flops=1e11, moved=1e9, calls=100)
    found = calibrate("cpu", [Run(work, 3 * work.seconds(prior), 1000, 1000, 3000)], prior)
    assert found.rates.seconds_per_flop == pytest.approx(3 * prior.seconds_per_flop, rel=0.01)
    assert found.rates.seconds_per_call == pytest.approx(3 * prior.seconds_per_call, rel=0.01)


def test_the_table_of_gpus_is_plausible() -> None:
    assert len({gpu.name for gpu in KNOWN_GPUS}) == len(KNOWN_GPUS)
    for gpu in KNOWN_GPUS:
        assert gpu.memory_bytes is not None
        assert 0 < usable_bytes(gpu.memory_bytes) < gpu.memory_bytes


def test_a_pair_is_read_twice_and_once_more_by_what_it_is_held_to() -> None:
    """Twice the rows of a step in training; before it one forward over both answers of each."""
    shown = make_training(precision="auto", max_tokens_per_micro_batch=4096, batch_size=8)
    compared = shown.model_copy(update={"beta": 0.1})
    rows = RowSample(rows=(RowTokens(129, 60),) * 16, num_rows=160)
    sides = rows.model_copy(update={"num_rows": 320})
    shape = llama_shape(**FIVE_B)
    one = reckon(shape=shape, training=shown)
    two = reckon(
        shape=shape,
        training=compared,
        stages=(StageRows(training=compared, rows=sides),),
        strategies=(ReplayConfig(strength=0.25),),
    )
    assert (two.steps, two.train_tokens) == (one.steps, 2 * one.train_tokens)
    assert two.padded_tokens == 2 * one.padded_tokens
    assert 1.5 < two.seconds_by_phase["training"] / one.seconds_by_phase["training"] < 3
    assert "reference" not in one.seconds_by_phase
    epoch = two.seconds_by_phase["training"] * 20 / two.steps
    assert 0.1 < two.seconds_by_phase["reference"] / epoch < 0.5  # a forward is a third of a step
    (replay,) = two.strategies
    same = reckon(shape=shape, strategies=(ReplayConfig(strength=0.25),)).strategies[0]
    assert replay.tokens == pytest.approx(same.tokens, rel=1e-6)  # rows, not pairs, are replayed
    longer = one.memory.peak
    assert two.memory.peak == pytest.approx(longer, rel=0.5)
    assert two.memory.peak >= longer

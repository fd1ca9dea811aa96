"""A measured run beside what arithmetic says of it: what device classes are calibrated by."""

from collections.abc import Sequence

from app.domain.estimates_calibration import Measured, Run
from app.domain.estimates_job import count_sides, find_trained
from app.domain.estimates_memory import Numbers, layer_activation_bytes, measure_memory
from app.domain.estimates_shapes import ModelShape
from app.domain.estimates_strategies import extra_cost, strategy_memory
from app.domain.estimates_work import StepRows, forward_work, step_work, update_work
from app.domain.spec import ResolvedTraining
from app.domain.strategies import StrategyConfig


def reckon_run(
    shape: ModelShape,
    training: ResolvedTraining,
    strategies: Sequence[StrategyConfig],
    measured: Measured,
) -> Run:
    """What arithmetic says of a run that was measured, from the rows that it counted itself."""
    lora, n = training.type == "lora", measured.steps
    device = measured.device_type
    numbers = Numbers.of(device=device, precision=training.precision, lora=lora)
    trained = find_trained(shape, training, strategies)
    costs = [extra_cost(config, lora=lora) for config in strategies]
    rows = StepRows(
        rows=measured.rows / n,
        tokens=measured.tokens / n,
        real_tokens=measured.tokens / n,
        supervised=measured.supervised / n,
        pairs=measured.pairs / n,
        micros=measured.micros / n,
        largest=measured.largest,
    )
    layer = layer_activation_bytes(
        shape, trained, numbers, width=round(rows.pairs / rows.tokens), device=device
    )
    # The rows that strategies add are among those counted; what else they do is a share of the plain ones.
    sides = count_sides(training)
    plain = 1 / (1 + sum(cost.added_rows for cost in costs) / sides)
    passes = step_work(shape, trained, rows, layer)
    again = 1 + plain * sum(cost.reread_rows + cost.light_share for cost in costs)
    taught = plain * sum(cost.taught_rows for cost in costs) / sides
    work = passes.times(again) + forward_work(shape, rows, layer).times(taught)
    teacher = Numbers.of(device=device, precision=training.precision, lora=True)
    kept = sum(
        strategy_memory(
            cost,
            trained=trained.parameters,
            model_bytes=teacher.base_bytes * shape.num_parameters,
            lora=lora,
        )
        for cost in costs
    )
    memory = measure_memory(
        shape,
        trained,
        numbers,
        rows.largest_micro,
        strategy_bytes=kept,
        device=device,
        is_split=rows.micros > 1,
    )
    return Run(
        work=(work + update_work(trained)).times(n),
        seconds=measured.step_seconds,
        lasting_bytes=memory.lasting,
        passing_bytes=memory.peak - memory.lasting,
        peak_bytes=measured.peak_bytes,
        is_lora=lora,
    )

"""The cost of the quadratic anchors' step against a fused AdamW step on the same parameters."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from workers.strategies.penalties import add_pull_gradients, apply_pulls
from workers.strategies.pulls import TALLY_INTERVAL, Pull, Tally

Shape = tuple[int, ...]
REPEATS = TALLY_INTERVAL  # steps timed together: one of them is measured by the tally
GOAL = 1.6


def llama_shapes(*, vocabulary: int, hidden: int, layers: int, intermediate: int) -> list[Shape]:
    """Tied head, four attention heads with two for keys and values, gated linear units."""
    layer: list[Shape] = [
        (hidden, hidden),
        (hidden // 2, hidden),
        (hidden // 2, hidden),
        (hidden, hidden),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
        (hidden,),
        (hidden,),
    ]
    return [(vocabulary, hidden), *layer * layers, (hidden,)]


MODELS: Mapping[str, list[Shape]] = {
    "S": llama_shapes(vocabulary=4096, hidden=256, layers=6, intermediate=768),
    "M": llama_shapes(vocabulary=8192, hidden=512, layers=8, intermediate=1536),
}


def run(rounds: int = 5) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of CPU time and ratios to AdamW, interleaved, one thread.

    Args:
        rounds: Each times every variant once, in rotating order, after one round of warm-up.

    Returns:
        For each model and variant `milliseconds`, `ratio` (medians), `ratio_low`, `ratio_high`, and
        `parameters`; the anchor in implicit mode is meant to stay at or below a ratio of 1.6.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _measure(shapes, rounds) for name, shapes in MODELS.items()}
    finally:
        torch.set_num_threads(before)


def _measure(shapes: Sequence[Shape], rounds: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    params = {f"p{i}": nn.Parameter(0.02 * torch.randn(shape)) for i, shape in enumerate(shapes)}
    for parameter in params.values():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    steps = _variants(params)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for index in range(rounds + 1):
        rotated = order[index % len(order) :] + order[: index % len(order)]
        for name in rotated:
            started = time.process_time()
            for _ in range(REPEATS):
                steps[name]()
            if index:
                seconds[name].append((time.process_time() - started) / REPEATS)
    size = float(sum(parameter.numel() for parameter in params.values()))
    return {name: _summary(own, seconds["adamw_fused"], size) for name, own in seconds.items()}


def _variants(params: dict[str, nn.Parameter]) -> dict[str, Callable[[], object]]:
    optimizer = torch.optim.AdamW(params.values(), lr=1e-6, fused=True)
    fisher = {name: torch.rand_like(p) for name, p in params.items()}
    anchor = {name: p.detach().clone() for name, p in params.items()}
    rates = dict.fromkeys(params, 1e-6)
    tally = Tally()
    counter = itertools.count()

    def pulls(importance: Mapping[str, Tensor | None]) -> dict[str, Pull]:
        measured = tally.begin(next(counter), 1.0)
        return {name: Pull(1.0, importance[name], anchor[name], measured) for name in params}

    def implicit(*importances: Mapping[str, Tensor | None]) -> None:
        apply_pulls(params, [pulls(importance) for importance in importances], rates)

    def gradient(importance: Mapping[str, Tensor | None], rho: float | None) -> None:
        add_pull_gradients(params, pulls(importance), rho=rho)

    ones: dict[str, Tensor | None] = dict.fromkeys(params)
    return {
        "adamw_fused": optimizer.step,
        "ewc_implicit": lambda: implicit(fisher),
        "l2sp_implicit": lambda: implicit(ones),
        "both_implicit": lambda: implicit(fisher, ones),
        "ewc_gradient": lambda: gradient(fisher, 5.0),
        "l2sp_gradient": lambda: gradient(ones, None),
    }


def _summary(own: Sequence[float], adamw: Sequence[float], size: float) -> dict[str, float]:
    ratios = [mine / theirs for mine, theirs in zip(own, adamw, strict=True)]
    return {
        "milliseconds": 1000 * statistics.median(own),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "parameters": size,
    }


if __name__ == "__main__":
    for model, variants in run().items():
        for variant, numbers in variants.items():
            shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            print(f"{model} {variant}: {shown}")

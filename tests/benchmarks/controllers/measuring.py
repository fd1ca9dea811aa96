"""The parts of the page that processes may share out: one plant, or one controller's activations."""

import sys
from collections.abc import Sequence

from tests.benchmarks.controllers.activation import Summary, measure
from tests.benchmarks.controllers.figures import summarise, sweep
from tests.benchmarks.controllers.pilots import Contender
from tests.benchmarks.controllers.plants import Plant
from tests.benchmarks.controllers.report import Block, Row


def build_block(contenders: Sequence[Contender], seeds: Sequence[int], plant: Plant) -> Block:
    """Every contender on one plant, all with the same seeds."""
    best = sweep(plant)
    rows = [
        Row(one.name, one.is_ours, summarise([one.run(plant, seed) for seed in seeds], best))
        for one in contenders
    ]
    sys.stderr.write(f"{plant.name}: done\n")
    return Block(plant, best, tuple(rows))


def build_activation(seeds: Sequence[int], contender: Contender) -> tuple[str, Summary]:
    """What an armed strategy comes to under one of ours."""
    return contender.name, measure(contender.policy, seeds)

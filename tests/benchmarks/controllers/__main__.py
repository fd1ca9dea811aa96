"""`python -m tests.benchmarks.controllers`: the controllers beside three that do not look, written as a page."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.benchmarks.controllers.activation import measure
from tests.benchmarks.controllers.figures import summarise, sweep
from tests.benchmarks.controllers.pilots import OTHERS, OURS, SHARPER, Contender
from tests.benchmarks.controllers.plants import HOPELESS, MENDED, MILD, STEERABLE, Plant
from tests.benchmarks.controllers.report import Block, Row, write_page

PAGE: Final = Path(__file__).parent.parent / "CONTROLLERS.md"
PLANTS: Final = (*STEERABLE, *MILD, MENDED, *HOPELESS)
CONTENDERS: Final = (*OURS, SHARPER, *OTHERS)
JOBS, QUICK_JOBS = 40, 6
ACTIVATIONS, QUICK_ACTIVATIONS = 200, 30


def build_block(plant: Plant, contenders: Sequence[Contender], seeds: Sequence[int]) -> Block:
    """Every contender on one plant, all with the same seeds."""
    best = sweep(plant)
    rows = [
        Row(one.name, one.is_ours, summarise([one.run(plant, seed) for seed in seeds], best))
        for one in contenders
    ]
    return Block(plant, best, tuple(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything on one core and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.controllers", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="few jobs, printed and not written")
    parser.add_argument("--jobs", type=int, help=f"a row of the tables; {JOBS} by default")
    parser.add_argument("--activations", type=int, help=f"{ACTIVATIONS} by default")
    parser.add_argument(
        "--out", type=Path, default=PAGE, help=f"default: {PAGE.name} in tests/benchmarks"
    )
    asked = parser.parse_args(arguments)
    jobs = asked.jobs or (QUICK_JOBS if asked.quick else JOBS)
    activations = asked.activations or (QUICK_ACTIVATIONS if asked.quick else ACTIVATIONS)
    started = time.process_time()
    blocks = []
    for plant in PLANTS:
        blocks.append(build_block(plant, CONTENDERS, range(jobs)))
        sys.stderr.write(f"{plant.name}: {time.process_time() - started:.0f} s\n")
    found = [(one.name, measure(one.policy, range(activations))) for one in OURS]
    options = "".join(f" {word}" for word in (arguments if arguments is not None else sys.argv[1:]))
    page = write_page(
        blocks,
        found,
        command=f"python -m tests.benchmarks.controllers{options}",
        seconds=time.process_time() - started,
    )
    if asked.quick:
        sys.stdout.write(page)
    else:
        asked.out.write_text(page)


if __name__ == "__main__":
    main()

"""`python -m tests.benchmarks.controllers`: the controllers beside three that do not look, written as a page."""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from tests.benchmarks.controllers.measuring import build_activation, build_block
from tests.benchmarks.controllers.pilots import OTHERS, OURS, SHARPER
from tests.benchmarks.controllers.plants import HOPELESS, MENDED, MILD, STEERABLE
from tests.benchmarks.controllers.report import write_page

PAGE: Final = Path(__file__).parent.parent / "CONTROLLERS.md"
PLANTS: Final = (*STEERABLE, *MILD, MENDED, *HOPELESS)
CONTENDERS: Final = (*OURS, SHARPER, *OTHERS)
FIRST_SEED: Final = 1000  # the constants of `dual` were set while looking at seeds below 100
JOBS, QUICK_JOBS = 24, 6
ACTIVATIONS, QUICK_ACTIVATIONS = 150, 30


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything, by default in this process, and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.controllers", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="few jobs, printed and not written")
    parser.add_argument(
        "--plant", action="append", choices=[p.name for p in PLANTS], help="repeatable"
    )
    parser.add_argument("--jobs", type=int, help=f"a row of the tables; {JOBS} by default")
    parser.add_argument("--activations", type=int, help=f"{ACTIVATIONS} by default")
    parser.add_argument(
        "--processes", type=int, default=1, help="1 by default; the figures are the same"
    )
    parser.add_argument(
        "--out", type=Path, default=PAGE, help=f"default: {PAGE.name} in tests/benchmarks"
    )
    asked = parser.parse_args(arguments)
    jobs = asked.jobs or (QUICK_JOBS if asked.quick else JOBS)
    activations = asked.activations or (QUICK_ACTIVATIONS if asked.quick else ACTIVATIONS)
    plants = [p for p in PLANTS if asked.plant is None or p.name in asked.plant]
    make_block = partial(build_block, CONTENDERS, range(FIRST_SEED, FIRST_SEED + jobs))
    activate = partial(build_activation, range(FIRST_SEED, FIRST_SEED + activations))
    if asked.processes == 1:
        blocks, found = [make_block(p) for p in plants], [activate(one) for one in OURS]
    else:
        with ProcessPoolExecutor(asked.processes, get_context("spawn")) as pool:
            first = pool.map(make_block, plants)
            second = pool.map(activate, OURS)
            blocks, found = list(first), list(second)
    options = "".join(f" {word}" for word in (arguments if arguments is not None else sys.argv[1:]))
    page = write_page(
        blocks,
        found,
        command=f"python -m tests.benchmarks.controllers{options}",
        seconds=sum(os.times()[:4]),
    )
    if asked.quick:
        sys.stdout.write(page)
    else:
        asked.out.write_text(page)


if __name__ == "__main__":
    main()

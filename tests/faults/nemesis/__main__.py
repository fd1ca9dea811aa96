"""Many seeds of the nemesis: `python -m tests.faults.nemesis --seeds 50`; 1 where a promise was broken."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.conftest import start_servers
from tests.faults.fleet import measured
from tests.faults.nemesis.nursery import Nursery
from tests.faults.nemesis.runs import run_seed


def main() -> int:
    """Runs the seeds one after the other and prints what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--faults", type=int, default=20)
    options = parser.parse_args()
    broken = 0
    with tempfile.TemporaryDirectory() as root, start_servers(Path(root)) as servers:
        nursery = Nursery(servers.redis_url)
        for seed in range(options.first, options.first + options.seeds):
            try:
                run = run_seed(
                    *(servers, nursery, Path(root) / f"seed-{seed}", seed),
                    num_jobs=options.jobs,
                    num_faults=options.faults,
                )
            except AssertionError as error:  # jobs that never end are a broken promise too
                sys.stdout.write(f"  seed {seed}: {error}\n")
                broken += 1
                continue
            measured("nemesis", **run.figures)
            for violation in run.violations:
                sys.stdout.write(f"  seed {seed}: {violation}\n")
            broken += bool(run.violations)
        nursery.close()
    sys.stdout.write(f"{options.seeds} seeds, {broken} with broken promises\n")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())

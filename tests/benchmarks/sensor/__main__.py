"""`python -m tests.benchmarks.sensor`: simulates watched jobs and writes SENSOR.md."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.benchmarks.sensor.report import find_promises, write_report
from tests.benchmarks.sensor.running import Outcome, Scenario, run
from tests.benchmarks.sensor.scenarios import Size, everything

ROOT = Path(__file__).resolve().parents[3]
REPORT = Path(__file__).resolve().parent.parent / "SENSOR.md"
COMMAND = "python -m tests.benchmarks.sensor"
N_JOBS = 1000


def main(arguments: list[str]) -> int:
    """Simulates and reports; 1 when a promise is broken."""
    options = _parse(arguments)
    size = Size(200, looks=(20, 200), read_all_until=2) if options.quick else Size(options.n_jobs)
    scenarios = everything(size)
    began = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    for scenario, outcome in _run_all(scenarios, options.jobs):
        outcomes[scenario.key] = outcome
        print(
            f"{len(outcomes)}/{len(scenarios)} {scenario.key}: {outcome.acted_by(size.most)} of"
            f" {scenario.n_jobs} acted on, {outcome.n_read} looks read, {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    measured = [(scenario, outcomes[scenario.key]) for scenario in scenarios]
    command = f"{COMMAND} --quick" if options.quick else COMMAND
    if not options.quick and options.n_jobs != N_JOBS:
        command += f" --n-jobs {options.n_jobs}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(write_report(measured, size, command))
    print(f"wrote {options.out}", file=sys.stderr)
    broken = [promise for promise in find_promises(measured, size) if promise.state == "broken"]
    for promise in broken:
        print(f"broken: {promise.what}: {promise.share}", file=sys.stderr)
    return int(bool(broken))


def _run_all(scenarios: Sequence[Scenario], jobs: int) -> Iterator[tuple[Scenario, Outcome]]:
    """Each with its outcome, as they come; equal whatever the number of processes."""
    if jobs == 1:
        for scenario in scenarios:
            yield scenario, run(scenario)
        return
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {pool.submit(run, scenario): scenario for scenario in scenarios}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--n-jobs", type=int, default=N_JOBS, help="simulated jobs a scenario")
    parser.add_argument("--quick", action="store_true", help="200 jobs, up to 200 looks")
    parser.add_argument("--out", type=Path, help="file to write, in place of SENSOR.md")
    options = parser.parse_args(arguments)
    if options.jobs < 1 or options.n_jobs < 1:
        parser.error("--jobs and --n-jobs are at least 1")
    if options.out is None:  # a part of the figures must not replace all of them
        is_whole = not options.quick and options.n_jobs >= N_JOBS
        options.out = REPORT if is_whole else ROOT / ".retain" / "SENSOR.md"
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

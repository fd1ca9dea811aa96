"""`python -m tests.benchmarks.api_load`: the API under load; figures as JSON, and as API.md beside this folder."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.api_load.measures import (
    CONNECTIONS,
    Found,
    compare_pages,
    fill_table,
    load_average,
    submit,
    wait_in_crowds,
)
from tests.benchmarks.api_load.place import Place, open_place
from tests.benchmarks.api_load.report import write_report

MANY_JOBS = 100_000
REPORT = Path(__file__).resolve().parents[1] / "API.md"

Measure = Callable[[Place], Found]


def main() -> None:
    """Runs everything, or what is named, each on a database of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="pages, submit, table, crowd")
    parser.add_argument("--quick", action="store_true", help="small, for a look; writes no report")
    asked = parser.parse_args()
    is_quick = asked.quick
    measures: dict[str, Measure] = {
        "pages": lambda place: compare_pages(
            place, rounds=2 if is_quick else 5, seconds=2 if is_quick else 3
        ),
        "submit": lambda place: submit(place, seconds=5 if is_quick else 40),
        "table": lambda place: fill_table(
            place, jobs=5000 if is_quick else MANY_JOBS, requests=50 if is_quick else 100
        ),
        "crowd": lambda place: wait_in_crowds(
            place, streams=100 if is_quick else 1000, polls=100 if is_quick else 1000
        ),
    }
    found: Found = {}
    for name, measure in measures.items():
        if asked.only and name not in asked.only:
            continue
        before = load_average()
        with tempfile.TemporaryDirectory() as directory, open_place(Path(directory)) as place:
            found[name] = measure(place)
        found[name]["load"] = f"{before} before, {load_average()} after"
        sys.stdout.write(f"{name}: {json.dumps(found[name], indent=1)}\n")
        sys.stdout.flush()
    if not is_quick and len(found) == len(measures):
        write_report(found, REPORT, connections=CONNECTIONS, jobs=MANY_JOBS)


if __name__ == "__main__":
    main()

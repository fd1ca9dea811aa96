"""The figures as a page."""

from pathlib import Path
from typing import Any

HEAD = """# The API under load

Command: `python -m tests.benchmarks.api_load` (minutes; one part by its name: `pages`, `submit`, `table`, `crowd`). One uvicorn
process, its embedded Postgres (fsync on) and the client share one two-core machine. Rate limits and the quota of queued jobs
are off by settings; keys are checked as always. The load average beside each part (over one and five minutes, the measurement's
own load in it) says what else the machine did: ratios taken in turns hold, milliseconds on a busy machine are too high.
"""
PAGES = """
## Reading beside a bare application (load {load})

Bare: FastAPI and SQLAlchemy's ORM with default engine settings, one query on the same table, the row through a response model;
no keys, projects, limits, error envelopes, request ids. {connections} connections, the sides take turns; medians of the rounds, and
the ratio's range.

| route | unit | Retain | bare | ratio | range | goal | met |
|---|---|---|---|---|---|---|---|
"""
SUBMIT = """
## Submitting (load {load})

20 submits a second offered over 50 open connections whatever becomes of earlier ones; seconds count from when each was due.

| submits | server CPU ms each | p50 ms | p90 ms | p99 ms | max ms | goal for p99 | met |
|---|---|---|---|---|---|---|---|
"""
TABLE = """
## A long table (load {load})

Medians of single requests in ms, with 1,000 jobs in the table and with {jobs:,} more.

| page | 1,000 | many | ratio | goal | met |
|---|---|---|---|---|---|
"""
CROWD = """
## A crowd that waits (load {load})

{waiting} clients on one API process, half of them streams and half long polls, on jobs that then all end in one commit.

| figure | value |
|---|---|
"""


def write_report(found: dict[str, Any], path: Path, *, connections: int, jobs: int) -> None:
    """Writes all parts."""
    text = HEAD + PAGES.format(load=found["pages"].pop("load"), connections=connections)
    for route, units in found["pages"].items():
        for unit, row in units.items():
            cells = (route, f"requests {unit}", row["retain"], row["bare"], row["ratio"])
            spread = f"{row['lowest']} to {row['highest']}"
            text += _line(*cells, spread, ">= 0.7", _met(row["ratio"] >= 0.7))
    row = found["submit"]
    text += SUBMIT.format(load=row["load"])
    times = [
        row[name]
        for name in ("submits", "server CPU ms each", "p50 ms", "p90 ms", "p99 ms", "max ms")
    ]
    text += _line(*times, "< 150", _met(row["p99 ms"] < 150))
    text += TABLE.format(load=found["table"].pop("load"), jobs=jobs)
    for page, row in found["table"].items():
        text += _line(page, row["few"], row["many"], row["ratio"], "< 2", _met(row["ratio"] < 2))
    row = dict(found["crowd"])
    text += CROWD.format(load=row.pop("load"), waiting=row.pop("waiting"))
    for name, value in row.items():
        text += _line(name, value)
    text += f"\nGoal: under 400 MB; {_met(row['MB at most'] < 400)}.\n"
    path.write_text(text)


def _line(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |\n"


def _met(is_met: object) -> str:
    return "met" if is_met else "missed"

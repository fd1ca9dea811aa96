"""One run of the nemesis from its seed to the checker's word."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from app.db.session import build_engine, build_session_factory
from app.settings import Settings
from tests.databases import clone_database, drop_database
from tests.faults.conftest import SHORT, Servers
from tests.faults.fleet import Fleet, make_fleet
from tests.faults.nemesis.checker import Violation, check
from tests.faults.nemesis.fleet import Nemesis
from tests.faults.nemesis.history import History, read_history
from tests.faults.nemesis.nursery import Nursery

BOUND_SECONDS = 90.0  # from the last fault to the last job's end


class Run(NamedTuple):
    """What came of a seed."""

    seed: int
    history: History
    violations: list[Violation]
    faults: Counter[str]
    recovered_seconds: float
    seconds: float

    @property
    def figures(self) -> dict[str, float | str]:
        """For the table of results."""
        return {
            "seed": str(self.seed),
            "jobs": str(len(self.history.jobs)),
            "states": _list(Counter(self.history.states)),
            "faults": str(self.faults.total()),
            "most_attempts": str(max(job.attempt for job in self.history.jobs)),
            "violations": str(len(self.violations)),
            "recovered_s": self.recovered_seconds,
            "wall_s": self.seconds,
            "kinds": _list(self.faults),
        }


def run_seed(
    servers: Servers,
    nursery: Nursery,
    root: Path,
    seed: int,
    *,
    num_jobs: int = 14,
    num_faults: int = 20,
    unfenced: bool = False,
) -> Run:
    """Runs a fleet under the faults of a seed and checks its history.

    Raises:
        AssertionError: Jobs don't come to their end; of mutants that is not asked.
    """
    began = time.monotonic()
    with _fleet(servers, root) as fleet:
        nemesis = Nemesis(fleet, servers, nursery, seed, unfenced=unfenced)
        nemesis.begin(num_jobs)
        nemesis.harm(num_faults)
        recovered = 0.0
        if not unfenced:
            recovered = nemesis.recover(BOUND_SECONDS)
        nemesis.settle(fleet.settings.lease_ttl_seconds * (2 if unfenced else 0.5))
        assert fleet.settings.database_url is not None
        history = read_history(
            fleet.settings.database_url,
            submitted=nemesis.submitted,
            storage=Path(fleet.settings.storage_root),
        )
        found = check(history)
    seconds = time.monotonic() - began
    return Run(seed, history, found, nemesis.done, recovered, seconds)


@contextmanager
def _fleet(servers: Servers, root: Path) -> Iterator[Fleet]:
    database = clone_database(servers.template_url)
    root.mkdir(parents=True)
    settings = Settings(
        data_dir=root / "data",
        database_url=database,
        redis_url=servers.redis_url,
        **SHORT,  # type: ignore[arg-type]
    )
    engine = build_engine(database)
    fleet = make_fleet(build_session_factory(engine), settings, root)
    try:
        yield fleet
    finally:
        fleet.stop()
        engine.dispose()
        _drop(database)


def _drop(database: str) -> None:
    try:
        drop_database(database)
    except psycopg.OperationalError:  # the server may have been restarted under its connections
        drop_database(database)


def _list(counts: Counter[str]) -> str:
    return " ".join(f"{name}:{count}" for name, count in sorted(counts.items()))

"""Results at scale: pages, latest results and ingest over HTTP, beside MLflow when an interpreter has it.

`python -m tests.benchmarks.history [--rows N] [--quick] [--mlflow PYTHON]` prints JSON; the Postgres, the API and
MLflow's server are its own, and end with it.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg

from app.db.session import build_engine, build_session_factory, transaction
from app.domain.identifiers import public_id
from app.domain.scopes import Scope
from app.embedded import EmbeddedServices
from app.services.keys import create_key
from tests.databases import create_database, migrate
from tests.factories import make_benchmark, make_job, make_model_version, make_project

ROOT = Path(__file__).resolve().parents[2]
BATCH = 1000
POINTS = 10_000
VERSIONS, NAMES = 50, 50  # subjects of the filling, and its benchmarks
READY_SECONDS = 120.0
GOALS = {"single": 5, "batch": 8, "history": 20}  # times MLflow

#: One in ten rows is another project's; each own version has rows on each benchmark, under steps that rise.
FILL = """
INSERT INTO evaluations (id, project_id, subject_type, subject_key, model_version_id, benchmark_version_id,
                         benchmark, metric, purpose, source, step, value, n_samples, is_paired)
SELECT gen_random_uuid(),
       CASE WHEN n %% 10 = 9 THEN %(rival)s ELSE %(own)s END,
       'model',
       CASE WHEN n %% 10 = 9 THEN 'theirs' ELSE (%(names)s::text[])[1 + n / 10 %% %(versions)s] END,
       CASE WHEN n %% 10 = 9 THEN NULL ELSE (%(ids)s::uuid[])[1 + n / 10 %% %(versions)s] END,
       CASE WHEN n / 500 %% %(benchmarks)s = 0 THEN %(known)s END,
       'suite-' || n / 500 %% %(benchmarks)s,
       'accuracy', 'monitor', 'external', n / 25000, random(), 500, false
FROM generate_series(0, %(rows)s - 1) AS n
"""


@dataclass(frozen=True)
class Place:
    """A filled database behind a running API."""

    client: httpx.Client
    database: str
    version: str  # a model version of the filling
    target: dict[str, str]  # the subject of what is posted here
    plotted: str  # a version with 10,000 points of one benchmark


def run(*, rows: int = 1_000_000, rounds: int = 30, mlflow: str | None = None) -> dict[str, Any]:
    """All measurements, by name: the median of the rounds and their range, milliseconds unless a rate."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        services = EmbeddedServices(root / "servers")
        try:
            servers = services.start()
            migrate(servers.database_url)
            with _api(servers.database_url, root, rows) as place:
                found: dict[str, Any] = {"rows": rows, "load": os.getloadavg()[0]}
                found |= {name: _time(read, rounds) for name, read in _reads(place).items()}
                found |= _ingest(place, rounds)
                if mlflow is not None:
                    store = create_database(servers.database_url)
                    with _mlflow(mlflow, store, root) as peer:
                        found |= _compare(place, peer, max(rounds // 2, 5))
                return found
        finally:
            services.stop()


def _reads(place: Place) -> dict[str, Callable[[], object]]:
    def get(**query: Any) -> Callable[[], httpx.Response]:
        def read() -> httpx.Response:
            answer = place.client.get("/v1/benchmark_results", params=query)
            answer.raise_for_status()
            return answer

        return read

    one = {"benchmark": "suite-7", "limit": 100}
    deep = _deep(place, "suite-7")
    return {
        "hello (/healthz)": lambda: place.client.get("/healthz").raise_for_status(),
        "page of a benchmark": get(**one),
        "page of a benchmark, 20 results": get(benchmark="suite-7"),
        "page of a benchmark with a version": get(benchmark="suite-0", limit=100),
        "page of a benchmark, deep": get(after=deep, **one),
        "page of a benchmark, deep, oldest first": get(after=deep, order="asc", **one),
        "page of an unknown benchmark": get(benchmark="none-such", limit=100),
        "page of a benchmark of a version": get(subject_id=place.version, **one),
        "page of a version": get(subject_id=place.version, limit=100),
        "page of the project": get(limit=100),
        "latest of each benchmark of a version": get(
            subject_id=place.version, latest="true", limit=100
        ),
        "10,000 points": lambda: _history(place),
    }


def _deep(place: Place, benchmark: str) -> str:
    """The id of a result in the middle of a benchmark's history."""
    with psycopg.connect(place.database) as connection:
        row = connection.execute(
            "SELECT id FROM evaluations WHERE benchmark = %s AND subject_key = %s"
            " ORDER BY abs(seq - (SELECT max(seq) / 2 FROM evaluations)) LIMIT 1",
            (benchmark, place.version),
        ).fetchone()
    assert row is not None
    return public_id("evaluation", row[0])


def _history(place: Place) -> None:
    query = {"subject_id": place.plotted, "benchmark": "curve", "order": "asc"}
    query |= {"format": "points", "limit": str(POINTS)}
    answer = place.client.get("/v1/benchmark_results", params=query)
    answer.raise_for_status()
    assert len(answer.json()["values"]) == POINTS, "the whole history comes in one page"


def _ingest(place: Place, rounds: int) -> dict[str, Any]:
    full = _time(lambda: _post(place, BATCH), rounds)
    light = _time(lambda: _post(place, BATCH, prefer="return=minimal"), rounds)
    return {
        "single result": _time(lambda: _post(place, 1), rounds * 3),
        f"batch of {BATCH}, every result in the answer": full | {"results/s": _rate(full)},
        f"batch of {BATCH}, Prefer: return=minimal": light | {"results/s": _rate(light)},
    }


def _post(place: Place, count: int, prefer: str | None = None) -> None:
    results = [
        {
            "subject": place.target,
            "benchmark": f"suite-{n % NAMES}",
            "metric": "accuracy",
            "value": n / count,
            "step": n // NAMES,
            "n_samples": 500,
        }
        for n in range(count)
    ]
    body = results[0] if count == 1 else {"results": results}
    headers = {} if prefer is None else {"prefer": prefer}
    answer = place.client.post("/v1/benchmark_results", json=body, headers=headers)
    answer.raise_for_status()


@contextmanager
def _api(database: str, root: Path, rows: int) -> Iterator[Place]:
    engine = build_engine(database)
    with transaction(build_session_factory(engine)) as session:
        own, rival = make_project(session), make_project(session)
        scopes = frozenset({Scope.RESULTS_READ, Scope.RESULTS_WRITE})
        key = create_key(session, project_id=own.id, name="bench", scopes=scopes).text
        job = make_job(session, own)
        versions = [make_model_version(session, job) for _ in range(VERSIONS + 1)]
        known = make_benchmark(session, own, name="suite-0")
        job_id, known_id = job.id, known.id
        names, ids = [v.name for v in versions], [v.id for v in versions]
        fill = {
            "own": own.id,
            "rival": rival.id,
            "rows": rows,
            "versions": VERSIONS,
            "benchmarks": NAMES,
            "names": names,
            "ids": ids,
            "known": known_id,
        }
    engine.dispose()
    curve = FILL.replace("'suite-' || n / 500 %% %(benchmarks)s", "'curve'")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(FILL, fill)
        connection.execute(
            curve.replace("n %% 10 = 9", "false").replace("n / 25000", "n"),
            fill | {"rows": POINTS, "versions": 1, "names": names[-1:], "ids": ids[-1:]},
        )
        connection.execute("VACUUM ANALYZE evaluations")
    command = [sys.executable, "-m", "uvicorn", "app.main:create_app_from_environment", "--factory"]
    settings = {"RETAIN_DATABASE_URL": database, "RETAIN_DATA_DIR": str(root / "data")}
    with (
        _server([*command, "--no-access-log"], root / "api.log", settings, "/healthz") as url,
        httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60.0
        ) as client,
    ):
        target = {"type": "fine_tuning.job", "id": public_id("job", job_id)}
        yield Place(client, database, names[0], target, names[-1])


@contextmanager
def _mlflow(python: str, database: str, root: Path) -> Iterator[httpx.Client]:
    """MLflow's server, one process, over a database of its own in the same Postgres."""
    store = f"postgresql+psycopg2://{database.partition('://')[2]}"
    command = [python, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--default-artifact-root", str(root / "artifacts")]
    with (
        _server(command, root / "mlflow.log", {}, "/health") as url,
        httpx.Client(base_url=f"{url}/api/2.0/mlflow", timeout=60.0) as client,
    ):
        yield client


def _compare(place: Place, peer: httpx.Client, rounds: int) -> dict[str, Any]:
    """Ours and MLflow's for the same work, in turns."""
    made = peer.post("/runs/create", json={"experiment_id": "0"}).raise_for_status().json()
    run_id = made["run"]["info"]["run_id"]
    now = int(time.time() * 1000)

    def single() -> None:
        body = {"run_id": run_id, "key": "one", "value": 0.5, "timestamp": now, "step": 1}
        peer.post("/runs/log-metric", json=body).raise_for_status()

    def batch(key: str | None = None, first: int = 0) -> None:
        metrics = [
            {
                "key": key or f"suite-{n % NAMES}",
                "value": n / BATCH,
                "timestamp": now,
                "step": first + n,
            }
            for n in range(BATCH)
        ]
        body = {"run_id": run_id, "metrics": metrics}
        peer.post("/runs/log-batch", json=body).raise_for_status()

    def history() -> None:
        query = {"run_id": run_id, "metric_key": "curve", "max_results": POINTS}
        answer = peer.get("/metrics/get-history", params=query).raise_for_status()
        assert len(answer.json()["metrics"]) == POINTS, "the whole history comes in one page"

    for page in range(POINTS // BATCH):
        batch("curve", page * BATCH)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "single": (lambda: _post(place, 1), single),
        "batch": (lambda: _post(place, BATCH, prefer="return=minimal"), batch),
        "history": (lambda: _history(place), history),
    }
    found: dict[str, Any] = {}
    for name, (ours, theirs) in pairs.items():
        ratios, mine, other = [], [], []
        for _ in range(rounds):
            mine.append(_elapsed(ours))
            other.append(_elapsed(theirs))
            ratios.append(other[-1] / mine[-1])
        found[f"{name}, beside MLflow"] = {
            "retain": _spread(mine),
            "mlflow": _spread(other),
            "times faster": _spread(ratios),
            "goal": GOALS[name],
        }
    return found


@contextmanager
def _server(
    command: list[str], log: Path, environment: dict[str, str], health: str
) -> Iterator[str]:
    """A server process on a free loopback port, once it answers; killed with its children afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + READY_SECONDS
        while not _answers(f"{url}{health}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(errors="replace")[-2000:])
            time.sleep(0.1)
        yield url
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0).is_success
    except httpx.TransportError:
        return False


def _time(work: Callable[[], object], rounds: int) -> dict[str, float]:
    for _ in range(3):
        work()
    return _spread([_elapsed(work) for _ in range(rounds)])


def _elapsed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def _spread(found: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(found), 2),
        "lowest": round(min(found), 2),
        "highest": round(max(found), 2),
    }


def _rate(spread: dict[str, float]) -> int:
    return round(BATCH / spread["median"] * 1000)


def main() -> None:
    """Prints the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="20,000 rows and five rounds")
    parser.add_argument("--mlflow", metavar="PYTHON", help="an interpreter that has MLflow")
    asked = parser.parse_args()
    rows, rounds = (20_000, 5) if asked.quick else (asked.rows, asked.rounds)
    found = run(rows=rows, rounds=rounds, mlflow=asked.mlflow)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

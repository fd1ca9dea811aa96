"""What happened to a fleet's jobs, read from the database's rows alone: plain SQL, none of the server's code."""

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row


@dataclass(frozen=True)
class Event:
    """A line of a job's log."""

    sequence: int
    at: datetime
    type: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A registered checkpoint."""

    id: str
    at: datetime
    attempt: int
    branch: int
    step: int
    is_superseded: bool
    is_deleted: bool
    path: str
    manifest_sha256: str


@dataclass(frozen=True)
class Decision:
    """What was decided at an evaluation point."""

    id: str
    at: datetime
    branch: int
    step: int
    action: str
    target_step: int  # of a rollback


@dataclass(frozen=True)
class Webhook:
    """An event for receivers, and to how many endpoints it goes how often."""

    type: str
    sequence: int
    decision_id: str | None
    deliveries: int
    endpoints: int


@dataclass(frozen=True)
class JobHistory:
    """One job with everything that names it."""

    id: str
    state: str
    attempt: int
    branch: int
    event_count: int
    webhook_count: int
    ended_by: int | None  # the attempt that a succeeded job's report was signed with
    events: tuple[Event, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    decisions: tuple[Decision, ...] = ()
    webhooks: tuple[Webhook, ...] = ()
    bells: int = 0  # rows of the outbox
    versions: int = 0  # published models


@dataclass(frozen=True)
class History:
    """Everything there is to check."""

    submitted: frozenset[str]  # ids whose creation was acknowledged
    states: dict[str, int]  # how many jobs are in which state
    jobs: tuple[JobHistory, ...]
    endpoints: int  # that want every event
    storage: Path | None = field(default=None)  # where files lie; None: not looked at


def read_history(url: str, *, submitted: set[str], storage: Path) -> History:
    """Reads one consistent snapshot."""
    with psycopg.connect(url, row_factory=dict_row) as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        parts = {name: _by_job(connection, query) for name, query in _QUERIES.items()}
        jobs = connection.execute(
            "SELECT id::text, state, attempt, branch, event_count, webhook_count,"
            " (report #>> '{seconds,attempt}')::float::int AS ended_by FROM jobs ORDER BY seq"
        ).fetchall()
        states = connection.execute("SELECT state, count(*) AS n FROM jobs GROUP BY state")
        endpoints = connection.execute("SELECT count(*) AS n FROM webhook_endpoints").fetchone()
        return History(
            submitted=frozenset(submitted),
            states={row["state"]: row["n"] for row in states},
            jobs=tuple(
                JobHistory(
                    **job,
                    events=tuple(Event(**row) for row in parts["events"][job["id"]]),
                    checkpoints=tuple(Checkpoint(**row) for row in parts["saved"][job["id"]]),
                    decisions=tuple(Decision(**row) for row in parts["decided"][job["id"]]),
                    webhooks=tuple(Webhook(**row) for row in parts["webhooks"][job["id"]]),
                    bells=len(parts["bells"][job["id"]]),
                    versions=len(parts["versions"][job["id"]]),
                )
                for job in jobs
            ),
            endpoints=0 if endpoints is None else endpoints["n"],
            storage=storage,
        )


_QUERIES = {
    "events": "SELECT job_id::text AS job, sequence, created_at AS at, type, coalesce(data, '{}') AS data"
    " FROM job_events ORDER BY job_id, sequence",
    "saved": "SELECT job_id::text AS job, id::text, created_at AS at, attempt, branch, step,"
    " superseded AS is_superseded, deleted_at IS NOT NULL AS is_deleted, path, manifest_sha256"
    " FROM checkpoints ORDER BY seq",
    "decided": "SELECT d.job_id::text AS job, d.id::text, d.created_at AS at, d.branch, d.step, d.action,"
    " coalesce(c.step, 0) AS target_step"
    " FROM decisions d LEFT JOIN checkpoints c ON c.id = d.target_checkpoint_id ORDER BY d.seq",
    "webhooks": "SELECT e.job_id::text AS job, e.type, (e.payload #>> '{data,sequence}')::int AS sequence,"
    " e.payload #>> '{data,decision,id}' AS decision_id,"
    " count(d.id) AS deliveries, count(DISTINCT d.endpoint_id) AS endpoints"
    " FROM webhook_events e LEFT JOIN webhook_deliveries d ON d.event_id = e.id"
    " WHERE e.job_id IS NOT NULL GROUP BY e.id ORDER BY sequence",
    "bells": "SELECT job_id::text AS job FROM outbox",
    "versions": "SELECT job_id::text AS job FROM model_versions WHERE status = 'ready'",
}


def _by_job(
    connection: psycopg.Connection[dict[str, Any]], query: str
) -> defaultdict[str, list[dict[str, Any]]]:
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in connection.execute(query):
        found[row.pop("job")].append(row)
    return found

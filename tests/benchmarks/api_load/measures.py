"""The four measurements: pages beside a bare application, submitting, a long table, and a crowd that waits."""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.db.session import transaction
from app.domain.identifiers import public_id
from app.domain.states import JobState
from tests.benchmarks.api_load.client import Connection, Result, closed_loop, open_loop
from tests.benchmarks.api_load.place import Place, Server, serve

RETAIN = "app.main:create_app_from_environment"
BARE = "tests.benchmarks.api_load.bare:create_app"
CONNECTIONS = 16
JOBS = "/v1/fine_tuning/jobs"
Found = dict[str, Any]
#: Ends jobs as their workers would, each with the line that tells of it, all in one commit.
END = (
    "WITH ended AS (UPDATE jobs SET state = 'cancelled', worker_id = NULL, lease_expires_at = NULL,"
    " finished_at = clock_timestamp(), event_count = event_count + 1 WHERE id = ANY(:jobs)"
    " RETURNING id, event_count)"
    " INSERT INTO job_events (id, job_id, sequence, level, type, message)"
    " SELECT gen_random_uuid(), id, event_count, 'info', 'message', 'ended' FROM ended"
)


def compare_pages(place: Place, *, rounds: int, seconds: float) -> Found:
    """Requests a second of retrieving one job and of a page of 20, beside the bare application, in turns."""
    ids = place.add_jobs(1000)
    retrieved = [place.path_of(job_id) for job_id in ids]
    bare_jobs = f"/{place.project_id}/jobs"
    paths = {
        "retrieve": (retrieved, [f"{bare_jobs}/{job_id}" for job_id in ids]),
        "list of 20": ([JOBS], [bare_jobs]),
    }
    found: Found = {}
    with serve(place, RETAIN) as retain, serve(place, BARE) as bare:
        for name, both in paths.items():
            rows = []
            for number in range(rounds + 1):  # the first one warms up
                turns = [(retain, both[0]), (bare, both[1])]
                told = [
                    _run(place, server, some, seconds)
                    for server, some in (turns if number % 2 else turns[::-1])
                ]
                rows.append(told if number % 2 else told[::-1])
            found[name] = _compare(rows[1:])
    return found


def submit(place: Place, *, seconds: float, rate: float = 20.0, connections: int = 50) -> Found:
    """Latency of submitting at a fixed rate, counted from when each request was due."""
    body = json.dumps({"model": place.base, "training_file": place.file_id}).encode()
    with serve(place, RETAIN) as server:
        asyncio.run(
            open_loop(server.port, place.key, JOBS, body, connections=4, rate=10, seconds=2)
        )
        before = server.cpu_seconds()
        result = asyncio.run(
            open_loop(
                server.port,
                place.key,
                JOBS,
                body,
                connections=connections,
                rate=rate,
                seconds=seconds,
            )
        )
        used = server.cpu_seconds() - before
    _check(result)
    return {
        "submits": len(result.seconds),
        "server CPU ms each": round(used / len(result.seconds) * 1000, 1),
        "p50 ms": round(result.quantile(0.5) * 1000, 1),
        "p90 ms": round(result.quantile(0.9) * 1000, 1),
        "p99 ms": round(result.quantile(0.99) * 1000, 1),
        "max ms": round(max(result.seconds) * 1000, 1),
    }


def fill_table(place: Place, *, jobs: int, requests: int) -> Found:
    """Milliseconds of pages with few jobs in the table and with many, one request at a time."""
    found: Found = {}
    with serve(place, RETAIN) as server:
        for name, count in (("few", 1000), ("many", jobs)):
            ids = place.add_jobs(count)
            middle = public_id("job", ids[len(ids) // 2])
            pages = {
                "newest 20": JOBS,
                "20 in the middle": f"{JOBS}?after={middle}",
                "20 of a metadata value": f"{JOBS}?metadata[n]=7",
                "one job": place.path_of(ids[-1]),
            }
            for page, path in pages.items():
                times = asyncio.run(_in_turn(server.port, place.key, path, requests))
                found.setdefault(page, {})[name] = round(statistics.median(times) * 1000, 2)
    for row in found.values():
        row["ratio"] = round(row["many"] / row["few"], 2)
    return found


def wait_in_crowds(place: Place, *, streams: int, polls: int) -> Found:
    """Memory of a process that so many clients wait on, and how long it takes to wake them all."""
    ids = place.add_jobs(max(streams, polls), JobState.RUNNING)
    with serve(place, RETAIN) as server:
        alone = server.megabytes()
        return asyncio.run(_crowd(place, server, ids, streams=streams, polls=polls)) | {
            "MB before": round(alone),
            "MB at most": round(server.megabytes("VmHWM")),
        }


async def _crowd(
    place: Place, server: Server, ids: Sequence[UUID], *, streams: int, polls: int
) -> Found:
    streaming = [await Connection.open(server.port, place.key) for _ in range(streams)]
    polling = [await Connection.open(server.port, place.key) for _ in range(polls)]
    for connection, job_id in zip(streaming, ids, strict=False):
        connection.send("GET", f"{place.path_of(job_id)}/events?stream=true")
        await connection.receive_head()
    for number, (connection, job_id) in enumerate(zip(polling, ids, strict=False)):
        connection.send("GET", f"{place.path_of(job_id)}?wait=300")
        if number % 20 == 0:
            await asyncio.sleep(0.02)  # as clients come, not all in one moment
    await _settle(server)
    held = server.megabytes()
    probe = await Connection.open(server.port, place.key)
    beside = []
    for _ in range(50):
        asked = time.perf_counter()
        status, _ = await probe.request("GET", place.path_of(place.first))
        assert status == 200
        beside.append(time.perf_counter() - asked)
        await asyncio.sleep(0.05)
    before, waiting = server.cpu_seconds(), time.perf_counter()
    await asyncio.sleep(5)
    idle = (server.cpu_seconds() - before) / (time.perf_counter() - waiting)
    woken = [asyncio.create_task(_read_stream(one)) for one in streaming]
    woken += [asyncio.create_task(_read_poll(one)) for one in polling]
    began = time.perf_counter()
    await asyncio.to_thread(_end_jobs, place, ids)
    committed = time.perf_counter()
    at = sorted(moment - committed for moment in await asyncio.gather(*woken))
    return {
        "waiting": streams + polls,
        "MB while they wait": round(held),
        "ms of another request beside them (median)": round(statistics.median(beside) * 1000, 1),
        "share of a core while nothing happens": round(idle, 3),
        "commit took s": round(committed - began, 2),
        "half awake after s": round(at[len(at) // 2], 2),
        "99 % awake after s": round(at[int(len(at) * 0.99)], 2),
        "all awake after s": round(at[-1], 2),
    }


async def _settle(server: Server) -> None:
    """Until every request that was sent waits: the process does little more than look once a second."""
    busy = 1.0
    while busy > 0.25:
        before = server.cpu_seconds()
        await asyncio.sleep(3)
        busy = (server.cpu_seconds() - before) / 3


async def _read_stream(connection: Connection) -> float:
    """When the event of the job's end was read; the stream ends after it."""
    text_so_far = b""
    while b'"ended"' not in text_so_far:
        text_so_far += await connection.reader.read(2**16)
    moment = time.perf_counter()
    while b"[DONE]" not in text_so_far:
        text_so_far += await connection.reader.read(2**16)
    connection.close()
    return moment


async def _read_poll(connection: Connection) -> float:
    status, length = await connection.receive_head()
    body = await connection.reader.readexactly(length)
    assert status == 200, body
    assert json.loads(body)["status"] == "cancelled"
    connection.close()
    return time.perf_counter()


def _end_jobs(place: Place, ids: Sequence[UUID]) -> None:
    with transaction(place.factory) as session:
        session.execute(text(END), {"jobs": list(ids)})


async def _in_turn(port: int, key: str, path: str, requests: int) -> list[float]:
    connection = await Connection.open(port, key)
    times = []
    for _ in range(requests + 10):
        sent_at = time.perf_counter()
        status, body = await connection.request("GET", path)
        assert status == 200, body
        times.append(time.perf_counter() - sent_at)
    connection.close()
    return times[10:]


def _run(place: Place, server: Server, paths: Sequence[str], seconds: float) -> tuple[float, float]:
    """Answers a second, and for a second of the server's CPU."""
    before = server.cpu_seconds()
    result = asyncio.run(
        closed_loop(server.port, place.key, paths, connections=CONNECTIONS, seconds=seconds)
    )
    _check(result)
    used = server.cpu_seconds() - before
    return result.per_second, len(result.seconds) / used


def _check(result: Result) -> None:
    if result.failures:
        status, body = result.failures[0]
        raise RuntimeError(f"{len(result.failures)} failed; the first: {status} {body[:500]!r}")


def _compare(rows: Sequence[Sequence[tuple[float, float]]]) -> Found:
    found: Found = {}
    for place, unit in enumerate(("a second", "a CPU second")):
        ours, theirs = ([row[side][place] for row in rows] for side in (0, 1))
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        found[unit] = {
            "retain": round(statistics.median(ours)),
            "bare": round(statistics.median(theirs)),
            "ratio": round(statistics.median(ratios), 2),
            "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2),
        }
    return found


def load_average() -> str:
    """Of the machine, over one and five minutes."""
    return "/".join(f"{load:.1f}" for load in os.getloadavg()[:2])

"""The nemesis' checker on histories made by hand: a sound one, and for each rule some that break it alone."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.faults.nemesis.checker import RULES, check
from tests.faults.nemesis.history import (
    Checkpoint,
    Decision,
    Event,
    History,
    JobHistory,
    Webhook,
)

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def at(second: float) -> datetime:
    return BEGAN + timedelta(seconds=second)


def line(sequence: int, second: float, **data: object) -> Event:
    kind = "metrics" if "values" in data else "message"
    return Event(sequence, at(second), kind, data)


def metrics(sequence: int, second: float, attempt: int) -> Event:
    return line(sequence, second, step=1, values={"attempt": float(attempt)})


def saved(
    second: float, step: int, *, attempt: int = 1, branch: int = 0, is_superseded: bool = False
) -> Checkpoint:
    point = f"a{attempt}-b{branch}-{step}"
    return Checkpoint(
        *(point, at(second), attempt, branch, step),
        is_superseded=is_superseded,
        is_deleted=False,
        path=point,
        manifest_sha256="",
    )


def told(sequence: int, kind: str, decision_id: str | None = None) -> Webhook:
    return Webhook(kind, sequence, decision_id, deliveries=1, endpoints=1)


def sound() -> JobHistory:
    """Claimed, rolled back from 20 to 10, crashed, claimed again, succeeded."""
    return JobHistory(
        id="job",
        state="succeeded",
        attempt=2,
        branch=1,
        event_count=8,
        webhook_count=5,
        ended_by=2,
        events=(
            line(1, 1, status="running", code="claimed", attempt=1),
            metrics(2, 2, 1),
            line(3, 4, code="decision"),
            metrics(4, 5, 1),
            line(5, 6, status="queued", code="crashed"),
            line(6, 7, status="running", code="claimed", attempt=2),
            metrics(7, 8, 2),
            line(8, 10, status="succeeded"),
        ),
        checkpoints=(
            saved(1.5, 10),
            saved(3, 20, is_superseded=True),
            saved(5.5, 15, branch=1),
            saved(9, 30, attempt=2, branch=1),
        ),
        decisions=(
            Decision("de-c1", at(4), 0, 20, "roll_back", target_step=10),
            Decision("de-c2", at(9.5), 1, 30, "keep", target_step=0),
        ),
        webhooks=(
            told(1, "fine_tuning.job.running"),
            told(2, "retention.rolled_back", "rdec_dec1"),
            told(3, "fine_tuning.job.queued"),
            told(4, "fine_tuning.job.running"),
            told(5, "fine_tuning.job.succeeded"),
        ),
        bells=2,
        versions=1,
    )


def whole(*jobs: JobHistory, storage: Path | None = None) -> History:
    states = Counter(job.state for job in jobs)
    return History(frozenset(job.id for job in jobs), dict(states), jobs, 1, storage)


def with_lines(*lines: Event, **rest) -> JobHistory:
    """The sound history's events with some of them exchanged or added, by their number."""
    events = {event.sequence: event for event in (*sound().events, *lines)}
    kept = tuple(events[number] for number in sorted(events))
    return replace(sound(), events=kept, **{"event_count": len(kept)} | rest)


def with_saved(*more: Checkpoint) -> JobHistory:
    return replace(sound(), checkpoints=(*sound().checkpoints, *more))


def with_decided(*more: Decision) -> JobHistory:
    return replace(sound(), decisions=(*sound().decisions, *more))


def with_told(*webhooks: Webhook) -> JobHistory:
    return replace(sound(), webhooks=webhooks, webhook_count=len(webhooks))


ALL_TOLD = sound().webhooks

BROKEN: dict[str, tuple[str, JobHistory]] = {
    "a line is missing": ("log", replace(sound(), event_count=9)),
    "a number is skipped": (
        "log",
        replace(sound(), events=tuple(e for e in sound().events if e.sequence != 4)),
    ),
    "an attempt is skipped": (
        "attempts",
        with_lines(
            line(6, 7, status="running", code="claimed", attempt=3),
            metrics(7, 8, 3),
            attempt=3,
            ended_by=3,
        ),
    ),
    "an attempt that nobody claimed": ("attempts", replace(sound(), attempt=3, ended_by=3)),
    "an older attempt writes a line after a newer claim": ("fence", with_lines(metrics(7, 8, 1))),
    "an attempt writes a line after its crash": (
        "fence",
        with_lines(
            metrics(6, 6.5, 1),
            line(7, 7, status="running", code="claimed", attempt=2),
        ),
    ),
    "an older attempt saves after a newer claim": ("fence", with_saved(saved(8, 25, branch=1))),
    "a checkpoint of an attempt that never was": (
        "fence",
        with_saved(saved(9, 31, attempt=3, branch=1)),
    ),
    "a checkpoint from before its claim": (
        "fence",
        with_saved(saved(6.5, 31, attempt=2, branch=1)),
    ),
    "an older attempt ends the job": ("fence", replace(sound(), ended_by=1)),
    "a checkpoint of the branch before counts": ("branches", with_saved(saved(5, 25))),
    "a checkpoint after the target still counts": ("branches", with_saved(saved(3.5, 19))),
    "a decision on a branch that was left": (
        "branches",
        with_decided(Decision("d3", at(5), 0, 25, "keep", 0)),
    ),
    "a point decided twice": (
        "branches",
        with_decided(Decision("d3", at(9.6), 1, 30, "keep", 0)),
    ),
    "a branch without a rollback": ("branches", replace(sound(), branch=2)),
    "a claim of a running job": (
        "moves",
        replace(
            with_lines(line(5, 6, code="noted")),
            webhooks=(*ALL_TOLD[:2], *(replace(w, sequence=w.sequence - 1) for w in ALL_TOLD[3:])),
            webhook_count=4,
        ),
    ),
    "a state that the log does not know of": ("moves", replace(sound(), state="cancelled")),
    "a second end": (
        "end",
        replace(
            with_lines(line(9, 11, status="succeeded")),
            webhooks=(*ALL_TOLD, told(6, "fine_tuning.job.succeeded")),
            webhook_count=6,
        ),
    ),
    "a line after the end": ("end", with_lines(line(9, 11, code="noted"))),
    "a checkpoint after the end": ("end", with_saved(saved(11, 31, attempt=2, branch=1))),
    "two models": ("end", replace(sound(), versions=2)),
    "a success without a model": ("end", replace(sound(), versions=0)),
    "a transition that nobody is told of": (
        "webhooks",
        with_told(*ALL_TOLD[:2], *(replace(w, sequence=w.sequence - 1) for w in ALL_TOLD[3:])),
    ),
    "a transition told twice": (
        "webhooks",
        with_told(*ALL_TOLD, replace(ALL_TOLD[-1], sequence=6)),
    ),
    "a number of webhooks skipped": (
        "webhooks",
        with_told(*ALL_TOLD[:4], replace(ALL_TOLD[4], sequence=6)),
    ),
    "a rollback that nobody is told of": (
        "webhooks",
        with_told(ALL_TOLD[0], *(replace(w, sequence=w.sequence - 1) for w in ALL_TOLD[2:])),
    ),
    "a rollback told of another decision": (
        "webhooks",
        with_told(ALL_TOLD[0], told(2, "retention.rolled_back", "rdec_x"), *ALL_TOLD[2:]),
    ),
    "an event that its receiver never gets": (
        "deliveries",
        with_told(replace(ALL_TOLD[0], deliveries=0, endpoints=0), *ALL_TOLD[1:]),
    ),
    "an event that its receiver gets twice": (
        "deliveries",
        with_told(replace(ALL_TOLD[0], deliveries=2), *ALL_TOLD[1:]),
    ),
    "a return to the queue without a bell": ("bells", replace(sound(), bells=1)),
}


def test_a_sound_history_breaks_nothing():
    assert check(whole(sound())) == []


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_promise_is_found_by_its_rule(name: str):
    rule, job = BROKEN[name]
    assert rule in {found.rule for found in check(whole(job))}


@pytest.mark.parametrize("name", [name for name in BROKEN if BROKEN[name][0] == "fence"])
def test_what_breaks_the_fence_breaks_nothing_else(name: str):
    assert {found.rule for found in check(whole(BROKEN[name][1]))} == {"fence"}


def test_each_rule_has_a_history_that_breaks_it():
    assert {rule for rule, _ in BROKEN.values()} == {*RULES, "deliveries"}


def test_jobs_that_are_missing_doubled_or_uncounted_are_found():
    history = whole(sound())
    lost = replace(history, submitted=history.submitted | {"another"})
    doubled = replace(history, jobs=(sound(), sound()))
    uncounted = replace(history, states={"succeeded": 2})
    for broken in (lost, doubled, uncounted):
        assert {found.rule for found in check(broken)} == {"states"}


class TestFiles:
    def store(self, root: Path, content: bytes = b"weights") -> JobHistory:
        """The sound history, with one checkpoint whose files lie in a store."""
        directory = root / "a2-b1-30"
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(content)
        facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = json.dumps({"step": 30, "files": {"model.safetensors": facts}}).encode()
        (directory / "manifest.json").write_bytes(manifest)
        sha = hashlib.sha256(manifest).hexdigest()
        last = replace(sound().checkpoints[-1], manifest_sha256=sha)
        gone = (replace(found, is_deleted=True) for found in sound().checkpoints[:-1])
        return replace(sound(), checkpoints=(*gone, last))

    def test_files_as_they_were_saved_are_sound(self, tmp_path: Path):
        assert check(whole(self.store(tmp_path), storage=tmp_path)) == []

    @pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
    @pytest.mark.parametrize("how", ["torn", "gone"])
    def test_files_that_are_torn_or_gone_are_found(self, tmp_path: Path, name: str, how: str):
        job = self.store(tmp_path)
        file = tmp_path / "a2-b1-30" / name
        file.write_bytes(file.read_bytes()[:-1]) if how == "torn" else file.unlink()
        assert {found.rule for found in check(whole(job, storage=tmp_path))} == {"files"}

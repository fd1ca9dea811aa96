"""An independent judge of histories: its own rules and tables, nothing of the server's code."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tests.faults.nemesis.history import Event, History, JobHistory

FINAL = frozenset({"succeeded", "failed", "cancelled"})
LEASED = frozenset({"running", "pausing"})
#: Where a job may go from where; a fleet's jobs begin queued.
MOVES = {
    "queued": {"running", "cancelled"},
    "running": {"queued", "pausing", "succeeded", "failed", "cancelled"},
    "pausing": {"paused", "succeeded", "failed", "cancelled"},
    "paused": {"queued", "cancelled"},
}
TOLD_ACTIONS = {
    "raise_strength": "retention.strength_raised",
    "lower_strength": "retention.strength_lowered",
    "lower_learning_rate": "retention.learning_rate_lowered",
    "repair": "retention.repaired",
    "roll_back": "retention.rolled_back",
    "stop": "retention.stopped",
}
JOB_EVENT = "fine_tuning.job."


class Violation(NamedTuple):
    """A broken promise."""

    rule: str
    job: str
    what: str


Rule = Callable[[JobHistory], Iterator[str]]


def check(history: History) -> list[Violation]:
    """Every broken promise of a history; none where all was kept."""
    found = [Violation("states", "", what) for what in _states(history)]
    for job in history.jobs:
        found += [Violation(name, job.id, w) for name, rule in RULES.items() for w in rule(job)]
        found += [Violation("deliveries", job.id, w) for w in _deliveries(job, history.endpoints)]
        if history.storage is not None:
            found += [Violation("files", job.id, w) for w in _files(job, history.storage)]
    return found


def _states(history: History) -> Iterator[str]:
    """Each acknowledged job is there once, and the states add up to the jobs."""
    ids = Counter(job.id for job in history.jobs)
    if set(ids) != history.submitted or any(n != 1 for n in ids.values()):
        yield f"{len(history.submitted)} jobs were acknowledged, {ids.total()} are there"
    if sum(history.states.values()) != len(history.submitted):
        yield f"the states {history.states} don't add up to {len(history.submitted)}"
    if Counter(job.state for job in history.jobs) != Counter(history.states):
        yield f"the jobs are not in the states {history.states}"


def _log(job: JobHistory) -> Iterator[str]:
    """Its numbers have no gap."""
    numbers = [event.sequence for event in job.events]
    if numbers != list(range(1, len(numbers) + 1)) or job.event_count != len(numbers):
        yield f"events {numbers[-3:]} of {len(numbers)}, counted {job.event_count}"


def _attempts(job: JobHistory) -> Iterator[str]:
    """They rise by one with each claim."""
    numbers = [event.data["attempt"] for event in _claims(job)]
    if numbers != list(range(1, len(numbers) + 1)) or job.attempt != len(numbers):
        yield f"attempts {numbers}, the job's is {job.attempt}"


def _fence(job: JobHistory) -> Iterator[str]:
    """What an attempt wrote lies between its claim and the end of its lease."""
    for event in job.events:
        writer, holder = _signature(event), _holder(job, event.sequence)
        if writer is not None and writer != holder:
            yield f"attempt {writer} wrote line {event.sequence}, when {holder or 'nobody'} held the job"
    claims = _claims(job)
    for saved in job.checkpoints:
        point = f"checkpoint {saved.step} of attempt {saved.attempt}"
        if not 1 <= saved.attempt <= len(claims):
            yield f"{point}, which there never was"
            continue
        if saved.at < claims[saved.attempt - 1].at:
            yield f"{point} from before its claim"
        if any(saved.at > claim.at for claim in claims[saved.attempt :]):
            yield f"{point} from after a later claim"
    if job.state == "succeeded" and job.ended_by not in {None, job.attempt}:
        yield f"attempt {job.ended_by} ended the job, which attempt {job.attempt} held"


def _branches(job: JobHistory) -> Iterator[str]:
    """After a rollback nothing of the branch before counts, and nothing is decided on it."""
    backs = [decision for decision in job.decisions if decision.action == "roll_back"]
    if [back.branch for back in backs] != list(range(len(backs))) or job.branch != len(backs):
        yield f"branch {job.branch} after rollbacks on {[back.branch for back in backs]}"
    for back in backs:
        for saved in job.checkpoints:
            is_after = saved.at > back.at or saved.step > back.target_step
            if saved.branch <= back.branch and is_after and not saved.is_superseded:
                yield f"checkpoint {saved.step} of branch {saved.branch} counts after a rollback to {back.target_step}"
        for decision in job.decisions:
            if decision.at > back.at and decision.branch <= back.branch:
                yield f"decision on branch {decision.branch} after its rollback"
    points = Counter((decision.branch, decision.step) for decision in job.decisions)
    yield from (f"{n} decisions at {point}" for point, n in points.items() if n > 1)


def _moves(job: JobHistory) -> Iterator[str]:
    """It went along the table and stands where it came to last."""
    states = ["queued", *(event.data["status"] for event in _transitions(job))]
    for before, after in pairwise(states):
        if after not in MOVES.get(before, set()):
            yield f"from {before} to {after}"
    if states[-1] != job.state:
        yield f"it is {job.state}, its log says {states[-1]}"


def _end(job: JobHistory) -> Iterator[str]:
    """One end, after which nothing is written; a model where it succeeded."""
    ends = [event for event in _transitions(job) if event.data["status"] in FINAL]
    if len(ends) != int(job.state in FINAL):
        yield f"{len(ends)} ends of a job that is {job.state}"
    if ends:
        yield from (
            f"line {event.sequence} after the end in line {ends[0].sequence}"
            for event in job.events
            if event.sequence > ends[0].sequence
        )
        yield from (
            f"checkpoint {saved.step} after the end"
            for saved in job.checkpoints
            if saved.at > ends[0].at
        )
    if job.versions != int(job.state == "succeeded"):
        yield f"{job.versions} models of a job that is {job.state}"


def _webhooks(job: JobHistory) -> Iterator[str]:
    """One event for each transition and each decision that changed something; numbers without a gap."""
    transitions = [JOB_EVENT + event.data["status"] for event in _transitions(job)]
    told = [webhook.type for webhook in job.webhooks if webhook.type.startswith(JOB_EVENT)]
    if told != transitions:
        yield f"transitions {transitions}, told {told}"
    numbers = [webhook.sequence for webhook in job.webhooks]
    if numbers != list(range(1, len(numbers) + 1)) or job.webhook_count != len(numbers):
        yield f"webhooks {numbers}, counted {job.webhook_count}"
    wanted = Counter(
        (TOLD_ACTIONS[decision.action], decision.id.replace("-", ""))
        for decision in job.decisions
        if decision.action in TOLD_ACTIONS
    )
    kinds = set(TOLD_ACTIONS.values())
    found = Counter(
        (webhook.type, (webhook.decision_id or "").rpartition("_")[2])
        for webhook in job.webhooks
        if webhook.type in kinds
    )
    if wanted != found:
        yield f"decisions {wanted}, told {found}"


def _deliveries(job: JobHistory, endpoints: int) -> Iterator[str]:
    """Each endpoint gets each event once."""
    for webhook in job.webhooks:
        if (webhook.deliveries, webhook.endpoints) != (endpoints, endpoints):
            yield f"{webhook.type} goes out {webhook.deliveries} times to {endpoints} endpoints"


def _bells(job: JobHistory) -> Iterator[str]:
    """Each return to the queue wrote its doorbell, as the creation did."""
    returns = sum(event.data["status"] == "queued" for event in _transitions(job))
    if job.bells < returns + 1:
        yield f"{job.bells} bells for {returns + 1} times in the queue"


def _files(job: JobHistory, storage: Path) -> Iterator[str]:
    """The files of a registered checkpoint are what was saved."""
    for saved in job.checkpoints:
        if saved.is_deleted:
            continue
        directory = storage / saved.path
        manifest = directory / "manifest.json"
        if not manifest.is_file() or _sha256(manifest) != saved.manifest_sha256:
            yield f"{saved.path}: the manifest is missing or another"
            continue
        for name, facts in json.loads(manifest.read_text())["files"].items():
            file = directory / name
            if not file.is_file() or _sha256(file) != facts["sha256"]:
                yield f"{saved.path}/{name}: missing or not what was saved"


RULES: dict[str, Rule] = {
    "log": _log,
    "attempts": _attempts,
    "fence": _fence,
    "branches": _branches,
    "moves": _moves,
    "end": _end,
    "webhooks": _webhooks,
    "bells": _bells,
}


def _claims(job: JobHistory) -> list[Event]:
    return [event for event in job.events if event.data.get("code") == "claimed"]


def _transitions(job: JobHistory) -> list[Event]:
    return [event for event in job.events if "status" in event.data]


def _signature(event: Event) -> int | None:
    """The attempt that a trainer signed a line of metrics with."""
    signed = event.data.get("values", event.data).get("attempt")
    return int(signed) if event.type == "metrics" and signed is not None else None


def _holder(job: JobHistory, sequence: int) -> int | None:
    """The attempt that holds the job just before a line of its log."""
    holder = None
    for event in job.events:
        if event.sequence >= sequence:
            break
        if event.data.get("code") == "claimed":
            holder = event.data["attempt"]
        elif event.data.get("status", "running") not in LEASED:
            holder = None
    return holder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

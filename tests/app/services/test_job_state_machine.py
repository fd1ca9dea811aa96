"""The life of jobs as a state machine: random histories of everybody's acts through the real services.

`RETAIN_STATE_MACHINE_EXAMPLES=2000` has the slow test try so many.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.db.models import (
    BaseModel,
    Checkpoint,
    DecisionRow,
    Job,
    JobEvent,
    OutboxMessage,
    Project,
    WebhookEvent,
)
from app.db.repositories.jobs import JobRepository
from app.domain.messages import CheckpointSaved, DecisionReply, Evaluated, Finished, OrderApplied
from app.domain.overrides import RollBackOverride
from app.domain.runplan import BasePlan
from app.domain.scopes import Caller
from app.domain.states import TRANSITIONS, JobKind, JobState
from app.errors import Conflict, Fenced
from app.services import engine as jobs
from app.services.checkpoints import register_checkpoint
from app.services.control import request_cancel, request_pause, resume_job
from app.services.finishing import Uploads, finish_job
from app.services.monitoring import record_evaluation
from app.services.overrides import override_decision
from app.services.progress import record_order_applied
from app.services.reaping import reap
from app.services.storage import Stored
from tests.factories import lease, make_base_model, make_file, make_job, make_project, make_spec
from tests.histories import CARRY

TTL = 0.05  # shorter than the age of the tests' server, so that its guard holds nothing back
RULES = jobs.CrashRules(max_crashes=2, ttl=TTL)
WORKERS = ("a", "b", "c")
WISHES = (request_cancel, request_pause, resume_job)
STORED = Stored("models/m", 10, "0" * 64)

_LOGS = select(JobEvent.job_id, JobEvent.sequence, JobEvent.data).order_by(JobEvent.sequence)
_TOLD = select(
    WebhookEvent.job_id,
    WebhookEvent.type,
    WebhookEvent.payload["data"]["sequence"].as_integer().label("sequence"),
).order_by(WebhookEvent.seq)

pick = st.integers(0, 1000)


class Claim(NamedTuple):
    """An attempt, whoever holds the job now."""

    job_id: UUID
    attempt: int
    worker: str


class Decided(NamedTuple):
    """An evaluation point with the answer that its first report got."""

    job_id: UUID
    message: Evaluated
    reply: DecisionReply


class JobLives(RuleBasedStateMachine):
    """Some jobs; three workers, of which any attempt there ever was may act; clients; the reconciler.

    The model knows who holds which job, and so what every act has to come to.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._connection = engine.connect()
        self._outer = self._connection.begin()
        self.session = Session(
            self._connection, expire_on_commit=False, join_transaction_mode="create_savepoint"
        )
        self.project: Project
        self.base: BaseModel
        self.file_id: UUID
        self.claims: list[Claim] = []
        self.holders: dict[UUID, Claim] = {}
        self.expired: set[UUID] = set()  # held, but the lease has run out
        self.states: dict[UUID, JobState] = {}  # as last seen
        self.decided: list[Decided] = []
        self.branches: Counter[UUID] = Counter()
        self.orders: list[tuple[UUID, int]] = []

    def teardown(self) -> None:
        self.session.close()
        self._outer.rollback()
        self._connection.close()

    @initialize()
    def begin(self) -> None:
        self.project = make_project(self.session)
        self.base = make_base_model(self.session)
        self.file_id = make_file(self.session, self.project).id

    # ---- clients

    @rule(priority=st.integers(0, 2))
    def create(self, priority: int) -> None:
        plan = BasePlan(
            name=self.base.name, directory="/base", sha256=self.base.sha256, default_template=True
        )
        job = make_job(
            self.session,
            self.project,
            base_model_id=self.base.id,
            training_file_id=self.file_id,
            spec=make_spec(model=self.base.name).model_dump(mode="json"),
            run_plan={"base": plan.model_dump(mode="json"), "benchmarks": []},
            priority=priority,
        )
        JobRepository(self.session).add_bell(job.id)
        self.states[job.id] = JobState.QUEUED

    @precondition(lambda self: self.states)
    @rule(number=pick, wish=st.sampled_from(WISHES))
    def ask(self, number: int, wish: Callable[..., Job]) -> None:
        job = self._job(list(self.states)[number % len(self.states)])
        state, stop = job.state, job.stop_requested
        may = {
            request_cancel: not state.is_terminal,
            request_pause: state in {JobState.PAUSING, JobState.PAUSED}
            or (state is JobState.RUNNING and stop != "cancel"),
            resume_job: state is JobState.PAUSED,
        }
        self._refused_unless(
            may[wish],
            Conflict,
            job.id,
            lambda: wish(self.session, project_id=self.project.id, job_id=job.id),
        )

    @precondition(lambda self: self.decided)
    @rule(number=pick)
    def order_a_rollback(self, number: int) -> None:
        """A person sends a running job back to its start."""
        job_id = self.decided[number % len(self.decided)].job_id
        decision_id = self.session.scalars(
            select(DecisionRow.id).where(DecisionRow.job_id == job_id).order_by(DecisionRow.seq)
        ).first()
        assert decision_id is not None
        caller = Caller(self.project.id, "key", frozenset())
        asked = RollBackOverride(action="roll_back", reason="r", step=0)
        runs = self._job(job_id).state is JobState.RUNNING
        before = self._job(job_id).branch
        order = partial(
            override_decision,
            *(self.session, caller, job_id, decision_id, asked),
            kind=JobKind.FINE_TUNING,
        )
        self._refused_unless(runs, Conflict, job_id, order)
        if runs:
            self.branches[job_id] += 1
            assert self._job(job_id).branch == before + 1
            self.orders.append((job_id, self._job(job_id).order_version))

    # ---- workers

    @rule(worker=st.sampled_from(WORKERS), bells=st.integers(1, 2))
    def answer_bells(self, worker: str, bells: int) -> None:
        """Each bell, doubled or not, takes the best queued job or nothing."""
        self.session.execute(update(Job).values(not_before=func.clock_timestamp()))
        for _ in range(bells):
            waiting = self.session.scalars(
                select(Job.id)
                .where(Job.state == JobState.QUEUED)
                .order_by(Job.priority.desc(), Job.seq)
            ).first()
            job = jobs.claim_job(
                self.session, worker_id=worker, free_slots=1, queues=("default",), ttl=60
            )
            assert (job.id if job else None) == waiting
            if job is not None:
                before = [claim.attempt for claim in self.claims if claim.job_id == job.id]
                assert job.attempt == max(before, default=0) + 1
                self.claims.append(Claim(job.id, job.attempt, worker))
                self.holders[job.id] = self.claims[-1]

    @precondition(lambda self: self.claims)
    @rule(number=pick)
    def beat(self, number: int) -> None:
        claim = self._claim(number)
        renew = partial(
            jobs.beat,
            self.session,
            job_id=claim.job_id,
            attempt=claim.attempt,
            worker_id=claim.worker,
            ttl=60,
        )
        if self._as_holder(claim, renew):
            self.expired.discard(claim.job_id)

    @precondition(lambda self: self.claims)
    @rule(number=pick)
    def save(self, number: int) -> None:
        claim = self._claim(number)
        job = self._job(claim.job_id)
        self._as_holder(claim, lambda: self._save(claim, job.branch, job.step + 5))

    @precondition(lambda self: self.claims)
    @rule(number=pick, is_finite=st.booleans())
    def evaluate(self, number: int, is_finite: bool) -> None:
        """A point of the present branch; numbers that are not finite roll back, or stop at last."""
        claim = self._claim(number)
        job = self._job(claim.job_id)
        branch, step = job.branch, job.step + 5
        message = Evaluated(
            id=1,
            branch=branch,
            step=step,
            is_last=False,
            scores=(),
            valid_loss=1.0,
            valid_mean_token_accuracy=0.5,
            train_loss=1.0,
            seconds=1.0,
            carry=CARRY,
            losses_finite=is_finite,
        )

        def act() -> None:
            self._save(claim, branch, step)
            self.reply = record_evaluation(self.session, claim.job_id, claim.attempt, message)

        if self._as_holder(claim, act):
            is_back = self.reply.roll_back is not None
            self.branches[claim.job_id] += int(is_back)
            assert self._job(claim.job_id).branch == branch + int(is_back)
            if is_finite:
                assert not is_back
            self.decided.append(Decided(claim.job_id, message, self.reply))

    @precondition(lambda self: self.decided and self.claims)
    @rule(number=pick, attempt=pick)
    def report_again(self, number: int, attempt: int) -> None:
        """The same point a second time, from whichever attempt: the answer that was given, and nothing new."""
        known = self.decided[number % len(self.decided)]
        claims = [claim for claim in self.claims if claim.job_id == known.job_id]
        claim = claims[attempt % len(claims)]
        again = known.message.model_copy(update={"id": 77})
        before = self._job(known.job_id).event_count

        def act() -> None:
            self.reply = record_evaluation(self.session, claim.job_id, claim.attempt, again)

        if self._as_holder(claim, act):
            assert self.reply == known.reply.model_copy(update={"reply_to": 77})
            assert self._job(known.job_id).event_count == before

    @precondition(lambda self: self.orders)
    @rule(number=pick, attempt=pick)
    def confirm_an_order(self, number: int, attempt: int) -> None:
        """Twice; the first counts."""
        job_id, version = self.orders[number % len(self.orders)]
        claims = [claim for claim in self.claims if claim.job_id == job_id]
        claim = claims[attempt % len(claims)]
        for step in (number, number + 1):
            done = OrderApplied(id=1, version=version, branch=0, step=step)
            self._as_holder(
                claim,
                partial(record_order_applied, self.session, job_id, claim.attempt, done),
            )
        told = Counter(
            event.data["version"]
            for event in self._log(job_id)
            if event.data is not None and event.data.get("code") == "order_applied"
        )
        assert told[version] <= 1
        order = JobRepository(self.session).find_order(job_id, version)
        assert order is not None
        assert (order.effective_step is not None) == (told[version] == 1)

    @precondition(lambda self: self.claims)
    @rule(number=pick, how=st.sampled_from(["finish", "crash", "fail", "drain", "pause", "cancel"]))
    def end(self, number: int, how: str) -> None:
        claim = self._claim(number)
        at = (self.session, claim.job_id, claim.attempt)
        ends: dict[str, Callable[[], Any]] = {
            "finish": lambda: self._finish(claim),
            "crash": lambda: jobs.record_crash(*at, reason="crash.", rules=RULES),
            "fail": lambda: jobs.fail_job(*at, code="c", message="m", param=None),
            "drain": lambda: jobs.release_job(*at, reason="drain"),
            "pause": lambda: self._pause(claim),
            "cancel": lambda: jobs.mark_cancelled(*at),
        }
        if self._as_holder(claim, ends[how]):
            self._let_go(claim.job_id)

    # ---- time, and the reconciler

    @precondition(lambda self: self.holders)
    @rule(number=pick)
    def advance_time(self, number: int) -> None:
        """A lease runs out; whoever holds it may still renew it."""
        job_id = sorted(self.holders)[number % len(self.holders)]
        self.session.execute(
            update(Job).where(Job.id == job_id).values(lease_expires_at=lease(-60))
        )
        self.expired.add(job_id)

    @rule()
    def sweep(self) -> None:
        found = reap(self.session, rules=RULES)
        assert {reaped.job_id for reaped in found.reaped} == self.expired
        for reaped in found.reaped:
            assert reaped.attempt == self.holders[reaped.job_id].attempt
            self._let_go(reaped.job_id)

    # ---- what always holds

    @invariant()
    def everything_holds(self) -> None:
        """All promises on one snapshot; a query a table, since this runs after every act."""
        self.session.flush()
        self.session.expire_all()
        rows = self.session.scalars(select(Job)).all()
        assert {job.id for job in rows} == set(self.states)
        logs, told = self._read(_LOGS), self._read(_TOLD)
        rung = Counter(self.session.scalars(select(OutboxMessage.job_id)))
        for job in rows:
            log = logs[job.id]
            moves = [JobState(row.data["status"]) for row in log if "status" in (row.data or {})]
            self._check_lease(job)
            self._check_log(job, log, moves)
            self._check_webhooks(job, told[job.id], moves)
            assert rung[job.id] == 1 + moves.count(JobState.QUEUED)
        self._check_writers({job.id: job for job in rows})

    def _check_lease(self, job: Job) -> None:
        """One attempt at most holds the job, and what has ended stays as it is."""
        held = self.holders.get(job.id)
        assert job.state.is_leased == (held is not None)
        if held is not None:
            assert (job.attempt, job.worker_id) == (held.attempt, held.worker)
        assert job.branch == self.branches[job.id]
        if self.states[job.id].is_terminal:
            assert job.state is self.states[job.id]
        self.states[job.id] = job.state

    def _check_log(self, job: Job, log: list[Any], moves: list[JobState]) -> None:
        """Numbers without a gap, moves along the table, one end and nothing after it."""
        assert [row.sequence for row in log] == list(range(1, job.event_count + 1))
        states = [JobState.QUEUED, *moves]
        assert all(after in TRANSITIONS[before] for before, after in pairwise(states))
        assert states[-1] is job.state
        assert sum(state.is_terminal for state in moves) == int(job.state.is_terminal)
        if job.state.is_terminal:
            assert (log[-1].data or {}).get("status") == job.state.value

    def _check_webhooks(self, job: Job, told: list[Any], moves: list[JobState]) -> None:
        """Each transition and each rollback is told once, in their order and numbered."""
        transitions = [row.type for row in told if row.type.startswith("fine_tuning.job.")]
        assert transitions == [f"fine_tuning.job.{state.value}" for state in moves]
        assert [row.sequence for row in told] == list(range(1, job.webhook_count + 1))
        backs = [row.type for row in told if row.type == "retention.rolled_back"]
        assert len(backs) == self.branches[job.id]

    def _check_writers(self, found: dict[UUID, Job]) -> None:
        """Nothing is there of an attempt that never was, or counts of a branch that was left."""
        claims = {(claim.job_id, claim.attempt) for claim in self.claims}
        for row in self.session.scalars(select(Checkpoint)):
            job = found[row.job_id]
            assert (row.job_id, row.attempt) in claims
            assert row.superseded or row.branch == job.branch or row.step <= job.step

    def _read(self, query: Any) -> "defaultdict[UUID, list[Any]]":
        grouped: defaultdict[UUID, list[Any]] = defaultdict(list)
        for row in self.session.execute(query):
            grouped[row.job_id].append(row)
        return grouped

    # ---- the acts' parts

    def _as_holder(self, claim: Claim, write: Callable[[], Any]) -> bool:
        """Writes as an attempt; whether it may has to be what the model says."""
        may = self.holders.get(claim.job_id) == claim
        self._refused_unless(may, Fenced, claim.job_id, write)
        return may

    def _refused_unless(
        self, may: bool, refusal: type[Exception], job_id: UUID, act: Callable[[], Any]
    ) -> None:
        """What is refused leaves the log as it was."""
        before = self._job(job_id).event_count
        if may:
            act()
            return
        with pytest.raises(refusal):
            act()
        assert self._job(job_id).event_count == before

    def _save(self, claim: Claim, branch: int, step: int) -> None:
        message = CheckpointSaved(
            id=1,
            branch=branch,
            step=step,
            directory="",
            manifest_sha256="0" * 64,
            size_bytes=1,
            metrics={},
            is_evaluated=False,
        )
        path = f"{claim.job_id}/{claim.attempt}/{branch}/{step}"
        register_checkpoint(self.session, claim.job_id, claim.attempt, message, path)

    def _finish(self, claim: Claim) -> None:
        checkpoint_id = self._job(claim.job_id).ckpt_id
        message = Finished(
            id=1,
            checkpoint_id="" if checkpoint_id is None else str(checkpoint_id),
            artifact_directory=None if checkpoint_id is None else "/artifact",
            artifact_kind="full",
            alpha=1.0,
            report=(),
            tuned_report=(),
            valid_loss=None,
            frontier=(),
            result_csv="",
            trained_tokens=10,
            seconds={},
            failure="retention_not_met" if checkpoint_id is None else None,
        )
        uploads = Uploads(None if checkpoint_id is None else STORED, None)
        finish_job(self.session, claim.job_id, claim.attempt, message, uploads)

    def _pause(self, claim: Claim) -> None:
        """A trainer stops for a pause because one was asked for."""
        if self._job(claim.job_id).state is JobState.RUNNING and claim in self.holders.values():
            jobs.pause_by_itself(
                self.session, claim.job_id, claim.attempt, code="c", reason="No room."
            )
        jobs.mark_paused(self.session, claim.job_id, claim.attempt)

    def _let_go(self, job_id: UUID) -> None:
        del self.holders[job_id]
        self.expired.discard(job_id)

    def _claim(self, number: int) -> Claim:
        return self.claims[number % len(self.claims)]

    def _job(self, job_id: UUID) -> Job:
        return self.session.get_one(Job, job_id, populate_existing=True)

    def _log(self, job_id: UUID) -> list[JobEvent]:
        query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)
        return list(self.session.scalars(query))


def check(engine: Engine, *, max_examples: int, steps: int = 30) -> None:
    class Here(JobLives):
        def __init__(self) -> None:
            super().__init__(engine)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_life_keeps_the_promises(engine: Engine):
    check(engine, max_examples=12)


@pytest.mark.slow
def test_many_long_lives_keep_the_promises(engine: Engine):
    check(engine, max_examples=int(os.environ.get("RETAIN_STATE_MACHINE_EXAMPLES", "60")), steps=40)


def test_an_engine_without_a_fence_is_caught(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """A mutant that forgets the attempt: what these lives are for."""

    def lock_any(self: JobRepository, job_id: UUID, attempt: int) -> Job | None:
        return self.lock(job_id)

    monkeypatch.setattr(JobRepository, "lock_leased", lock_any)
    with pytest.raises((AssertionError, Conflict, pytest.fail.Exception)):
        check(engine, max_examples=30)

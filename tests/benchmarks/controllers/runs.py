"""One simulated job: a plant, its evaluations through the real sensor, and whoever turns the strength."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from app.domain.configs.quadratic import EwcConfig
from app.domain.controller import decide
from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    Decision,
    LeverState,
    Look,
    Reading,
)
from app.domain.levers import build_levers, initial_state, with_strength
from app.domain.policy import Policy
from app.domain.publishing import choose_checkpoint
from app.domain.sensing import holds, read_report, read_sensor
from app.services.decisions import build_evidence
from app.services.monitoring import checkpoint_status
from tests.benchmarks.controllers.evidence import Items
from tests.benchmarks.controllers.plants import Plant, PlantState

GATE_ITEMS: Final = 4000  # a benchmark
REPORT_ITEMS: Final = 10_000
INTERVAL: Final = 30  # steps between evaluations
LOOKS: Final = 30  # of accepted steps; rolled-back ones come on top
MOST_LOOKS: Final = 200
REPAIR_GRID: Final = tuple(k / 10 for k in range(9, -1, -1))
LOSS_NOISE: Final = 0.002  # standard deviation of the validation loss, nats

Pilot = Callable[[Policy, Sequence[LeverState], ControllerState, Look], Decision]


@dataclass(frozen=True, slots=True)
class Step:
    """One evaluation point: what was in force, what was seen and what was done."""

    strength: float  # during the interval before
    drop: float  # true
    accuracy: float
    reading: Reading
    decision: Decision
    evidence: dict[str, Any] | None = None

    @property
    def after(self) -> float:
        """The strength from here on."""
        return self.decision.state.strengths["ewc"]

    @property
    def is_holding(self) -> bool:
        """Whether every estimate is within its limit."""
        return is_within(self.reading)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished job; `published` is None where nothing may be."""

    steps: tuple[Step, ...]
    levers: tuple[LeverState, ...]
    published: PlantState | None
    report: Reading | None

    @property
    def held(self) -> bool:
        """Whether something is published and every estimate of the report set is within its limit."""
        return self.report is not None and is_within(self.report)

    @property
    def could_not_hold(self) -> bool:
        """Whether the controller gave up."""
        return self.steps[-1].decision.code == "could_not_hold"

    @property
    def raises(self) -> int:
        """Decisions after which the strength is higher, activation among them."""
        return sum(step.after > step.strength for step in self.steps)

    @property
    def reversals(self) -> int:
        """How often the strength turned back from the way it last went."""
        signs = [np.sign(step.after - step.strength) for step in self.steps]
        moves = [sign for sign in signs if sign]
        return sum(a != b for a, b in itertools.pairwise(moves))


@dataclass
class _Job:
    """What a run keeps between its evaluations."""

    state: ControllerState
    model: PlantState = field(default_factory=PlantState)
    step: int = 0
    branch: int = 0
    facts: list[CheckpointFact] = field(default_factory=list)
    saved: dict[str, PlantState] = field(default_factory=dict)


def is_within(reading: Reading) -> bool:
    """Whether what was measured is within every limit, by its estimates."""
    pairs = [(reading.drop, reading.limit), *((b.drop, b.limit) for b in reading.benchmarks)]
    measured = [(drop, limit) for drop, limit in pairs if drop is not None and limit is not None]
    return bool(measured) and all(drop <= limit for drop, limit in measured)


def simulate(
    plant: Plant,
    policy: Policy,
    seed: int,
    *,
    gate_items: int = GATE_ITEMS,
    pilot: Pilot = decide,
    armed: bool = False,
    first: float | None = None,
    looks: int = LOOKS,
    is_recorded: bool = False,
) -> Run:
    """Trains the plant for `looks` accepted intervals; equal arguments give equal runs.

    Args:
        plant: What is trained.
        policy: Of the job.
        seed: Of items, noise and validation loss.
        gate_items: A benchmark, of the set that steers.
        pilot: Who decides; by default the real controller.
        first: Strength of the first interval; None: what was asked.
        armed: Whether `ewc` starts at 0, to be activated.
        looks: Accepted intervals; a rollback repeats some.
        is_recorded: Keeps each decision's evidence, as the database does.
    """
    rng = np.random.default_rng([seed, 0])
    gate = Items(np.random.default_rng([seed, 1]), gate_items)
    strategies = [EwcConfig(armed=armed)]
    levers = build_levers(strategies, policy, lora=False)
    job = _Job(initial_state(strategies, lora=False))
    if first is not None:
        job.state = with_strength(job.state, "ewc", first)
    start = CheckpointFact(checkpoint_id="start", branch=0, step=0, status="good", valid_loss=None)
    job.facts.append(start)
    job.saved["start"] = job.model
    steps: list[Step] = []
    while len(steps) < MOST_LOOKS:
        before = job.state
        strength = before.strengths["ewc"]
        rate = before.learning_rate_scale
        job.model = plant.train(job.model, strength, rate, rng, look=len(steps))
        job.step += INTERVAL
        reading = read_sensor(policy, gate.sense(job.model.drop, rng), look=len(steps) + 1)
        look = _look(job, reading, rng, is_last=job.step >= looks * INTERVAL)
        decision = pilot(policy, levers, before, look)
        evidence = build_evidence(policy, levers, before, look) if is_recorded else None
        model = job.model
        steps.append(Step(strength, model.drop, model.accuracy, reading, decision, evidence))
        _carry_out(job, plant, policy, decision, gate, rng)
        if decision.action is Action.STOP or (
            look.is_last and decision.action is not Action.ROLL_BACK
        ):
            break
    chosen = choose_checkpoint(job.facts, policy)
    if chosen is None:
        return Run(tuple(steps), levers, None, None)
    published = job.saved[chosen.checkpoint_id]
    report = Items(np.random.default_rng([seed, 2]), REPORT_ITEMS, documents=500)
    return Run(
        tuple(steps), levers, published, read_report(policy, report.sense(published.drop, rng))
    )


def _look(job: _Job, reading: Reading, rng: np.random.Generator, *, is_last: bool) -> Look:
    """Saves the checkpoint of this point, as every evaluation does, and says what `decide` is told."""
    loss = 1.5 * (1.0 - job.model.accuracy) + float(rng.normal(0.0, LOSS_NOISE))
    name = f"b{job.branch}s{job.step}"
    job.saved[name] = job.model
    job.facts.append(
        CheckpointFact(
            checkpoint_id=name,
            branch=job.branch,
            step=job.step,
            status=checkpoint_status(reading, losses_finite=True).value,
            valid_loss=loss,
        )
    )
    return Look(
        branch=job.branch,
        step=job.step,
        is_last=is_last,
        reading=reading,
        valid_loss=loss,
        checkpoints=tuple(job.facts),
    )


def _carry_out(
    job: _Job,
    plant: Plant,
    policy: Policy,
    decision: Decision,
    gate: Items,
    rng: np.random.Generator,
) -> None:
    job.state = decision.state
    if decision.action is Action.ROLL_BACK:
        target = next(f for f in job.facts if f.checkpoint_id == decision.target_checkpoint_id)
        job.facts = [fact for fact in job.facts if fact.step <= target.step]
        job.model, job.step = job.saved[target.checkpoint_id], target.step
        job.branch = decision.state.branch
    elif decision.action is Action.REPAIR:
        job.model = next(
            candidate
            for candidate in (plant.scaled_back(job.model, alpha) for alpha in REPAIR_GRID)
            if candidate.drop == 0 or holds(policy, gate.sense(candidate.drop, rng))
        )

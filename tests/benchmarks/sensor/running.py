"""One scenario: jobs looked at until the end, each look read by the sensor and answered by the controller."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from app.domain.controller import decide
from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    LeverState,
    Look,
    Reading,
    Verdict,
)
from app.domain.policy import Policy
from app.domain.sensing import read_sensor
from app.domain.statistics import alpha_spent
from tests.benchmarks.sensor.screen import smallest_p
from tests.benchmarks.sensor.simulation import Counts, Jobs, Looked, Suite, Truth, sensed

POLICY = Policy()
NEAR = 10.0  # a look whose p-value is up to so many times the alpha is read by the sensor
SPOT_CHECKS = 5e-4  # share of all other looks that it reads as well
HARMFUL = frozenset(
    {
        Action.RAISE_STRENGTH,
        Action.LOWER_LEARNING_RATE,
        Action.REPAIR,
        Action.ROLL_BACK,
        Action.STOP,
    }
)
LEVER = LeverState(strategy="ewc", asked=1.0, default=1.0, cap=1000.0)
START = CheckpointFact(checkpoint_id="start", branch=0, step=0, status="good", valid_loss=None)


class Missed(Exception):
    """The sensor says `regress` of a look that was not to be read, or the controller acts without that verdict."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is true of the jobs, how they are watched and how often."""

    key: str
    suite: Suite
    n_items: int
    n_jobs: int
    n_looks: int
    drop: float = 0.0  # relative, of every benchmark above chance
    drops: tuple[float, ...] | None = None  # of each benchmark, in place of `drop`
    rise: float = 0.0
    stickiness: float = 0.0
    is_late: bool = (
        False  # damage begins at a look drawn for each job, else it is there at the first
    )
    after: int = 0  # more looks than `n_looks`, in which late damage may still be seen
    read_all_until: int = 1
    passes_at: tuple[int, ...] = ()  # looks at which every job's verdict is counted
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of each job the look at which the controller first acted (0: never), and how many passed at some looks."""

    acted_J: Counts
    onset_J: Counts
    passed: dict[int, int]  # by look
    actions: dict[str, int]
    n_read: int
    n_spots: int

    def acted_by(self, look: int) -> int:
        """How many jobs were acted on at this look or before."""
        return int(np.count_nonzero((self.acted_J > 0) & (self.acted_J <= look)))

    def acted_before_damage(self) -> int:
        """How many jobs were acted on while nothing was wrong."""
        return int(np.count_nonzero((self.acted_J > 0) & (self.acted_J < self.onset_J)))

    def seen_within(self, looks: int) -> int:
        """How many jobs were acted on within so many looks of the damage, its first one included."""
        since = self.acted_J - self.onset_J
        return int(np.count_nonzero((self.acted_J > 0) & (since >= 0) & (since < looks)))


def run(scenario: Scenario, policy: Policy = POLICY) -> Outcome:
    """Looks at the scenario's jobs.

    Raises:
        Missed: The screen or the controller is not what the figures rest on.
    """
    rng = np.random.default_rng([scenario.seed, 1])
    jobs = Jobs(
        scenario.suite,
        scenario.n_items,
        scenario.n_jobs,
        stickiness=scenario.stickiness,
        seed=scenario.seed,
    )
    n_jobs = scenario.n_jobs
    onset = (
        rng.integers(1, scenario.n_looks + 1, n_jobs) if scenario.is_late else np.ones(n_jobs, int)
    )
    acted = np.zeros(n_jobs, dtype=np.int64)
    passed: dict[int, int] = {}
    actions: Counter[str] = Counter()
    n_read = n_spots = 0
    for look in range(1, scenario.n_looks + scenario.after + 1):
        looked = jobs.look(_truth(scenario, look >= onset))
        is_open = acted == 0
        near = smallest_p(policy, scenario.suite, looked) <= NEAR * alpha_spent(look)
        if look <= scenario.read_all_until:
            near[:] = True
        spots = is_open & ~near & (rng.random(n_jobs) < SPOT_CHECKS)
        reads_all = look in scenario.passes_at
        for job in np.flatnonzero((near | spots) & is_open | reads_all):
            verdict, action = read(policy, scenario.suite, looked, int(job), look)
            n_read += 1
            n_spots += int(spots[job])
            if reads_all:
                passed[look] = passed.get(look, 0) + (verdict is Verdict.PASS)
            if action in HARMFUL and is_open[job]:
                if not near[job]:
                    raise Missed(f"{scenario.key}: look {look} of job {job} was not to be read")
                acted[job] = look
                actions[action.value] += 1
        if look >= max(scenario.passes_at, default=0) and (acted > 0).all():
            break
    return Outcome(acted, np.asarray(onset, dtype=np.int64), passed, dict(actions), n_read, n_spots)


def read(
    policy: Policy, suite: Suite, looked: Looked, job: int, look: int
) -> tuple[Verdict, Action]:
    """The sensor's verdict of one job's look, and what the controller makes of it.

    Raises:
        Missed: Another action than the verdict asks for.
    """
    reading = read_sensor(policy, sensed(policy, suite, looked, job), look=look)
    action = answer(policy, reading)
    if (action in HARMFUL) != (reading.verdict is Verdict.REGRESS):
        raise Missed(f"{reading.verdict} was answered by {action}")
    return reading.verdict, action


def answer(policy: Policy, reading: Reading) -> Action:
    """What the controller does with a reading in the midst of a run, nothing having happened before."""
    look = Look(
        branch=0,
        step=reading.look,
        is_last=False,
        reading=reading,
        valid_loss=None,
        checkpoints=(START,),
    )
    state = ControllerState(strengths={LEVER.strategy: LEVER.asked})
    return decide(policy, [LEVER], state, look).action


def _truth(scenario: Scenario, is_damaged: np.ndarray) -> Truth:
    suite = scenario.suite
    drops = scenario.drops or (scenario.drop,) * len(suite.accuracies) + (0.0,) * suite.n_at_chance
    damaged_J1 = is_damaged[:, None].astype(np.float64)
    return Truth(damaged_J1 * np.asarray(drops), damaged_J1 * scenario.rise)

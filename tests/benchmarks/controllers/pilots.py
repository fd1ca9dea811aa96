"""Who turns the strength: ours, and what anybody could do without looking."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from app.domain.controller import decide
from app.domain.decisions import Action, ControllerState, Decision, LeverState, Look
from app.domain.levers import with_strength
from app.domain.policy import Policy
from tests.benchmarks.controllers.figures import GRID
from tests.benchmarks.controllers.plants import ASKED, Plant
from tests.benchmarks.controllers.runs import GATE_ITEMS, Pilot, Run, simulate

CAP: Final = 1000.0 * ASKED


class Contender(NamedTuple):
    """A way to steer, as the tables name it."""

    name: str
    policy: Policy
    pilot: Pilot = decide
    first: float | None = None
    gate_items: int = GATE_ITEMS
    is_ours: bool = True

    def run(self, plant: Plant, seed: int) -> Run:
        """One job of this plant."""
        return simulate(
            plant,
            self.policy,
            seed,
            gate_items=self.gate_items,
            pilot=self.pilot,
            first=self.first,
        )


def stay(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    """Nothing is ever turned."""
    return _set(state, look, state.strengths["ewc"])


def wander(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    """A strength of the sweep's range, log-uniform, anew at every look; its seed is the look's own noise."""
    rng = np.random.default_rng([look.step, int(abs(look.reading.drop or 0.0) * 1e12)])
    return _set(state, look, math.exp(rng.uniform(math.log(GRID[0]), math.log(GRID[-1]))))


def _set(state: ControllerState, look: Look, strength: float) -> Decision:
    before = state.strengths["ewc"]
    action = Action.KEEP
    if strength != before:
        action = Action.RAISE_STRENGTH if strength > before else Action.LOWER_STRENGTH
    return Decision(
        action=action,
        reason="By its own rule.",
        code="contender",
        state=with_strength(state, "ewc", strength).model_copy(
            update={"evals": state.evals + 1, "branch": look.branch}
        ),
    )


OURS: Final = (
    Contender("deadband", Policy()),
    Contender("dual", Policy(controller="dual")),
)
OTHERS: Final = (
    Contender("always at the cap", Policy(), stay, CAP, is_ours=False),
    Contender("always default", Policy(), stay, is_ours=False),
    Contender("random", Policy(), wander, is_ours=False),
)
SHARPER: Final = Contender("deadband, 16,000 gate items", Policy(), gate_items=16_000)
